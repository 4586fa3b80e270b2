"""benchmarks/results/*.csv as Markdown tables, as README and docs take them.

`python -m ponder.benchmarks.tables [FOLDER]`. A line a case: ponder's median, how many times as
fast as the fastest peer it is, and its fraction of the roofline. Nothing is in a table that is not
in a row.
"""

import sys
from collections import defaultdict
from pathlib import Path

from ponder.benchmarks.measure import RESULTS, Row, read


def table(rows: list[Row]) -> str:
    """Of one benchmark on one machine; cases of which ponder has no time are left out."""
    cases: dict[tuple[str, str], dict[str, Row]] = defaultdict(dict)
    for row in rows:
        cases[row.case, row.dtype][row.implementation] = row
    lines = [
        "| case | ponder, ms | fastest peer | its ms | ratio | TFLOP/s, GB/s | of roofline | MiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (case, dtype), found in cases.items():
        own = [name for name in found if name.startswith("ponder")]
        peers = [name for name in found if name not in own]
        for name in own:
            # Compiled against compiled, as in figures.py, where both are there.
            suffix = ", torch.compile"
            alike = [p for p in peers if p.endswith(suffix) == name.endswith(suffix)] or peers
            row, more = found[name], name.removeprefix("ponder")
            best = min(alike, key=lambda p: float(found[p].ms_p50), default=None)
            other = f"{float(found[best].ms_p50):.3f}" if best else ""
            ratio = f"{float(found[best].ms_p50) / float(row.ms_p50):.2f}×" if best else ""
            fraction = f"{float(row.roofline):.0%}" if row.roofline else ""
            cells = [f"{case}, {dtype}{more}", f"{float(row.ms_p50):.3f}", best or "", other, ratio]
            cells += [
                str(row.tflops or row.gb_per_s),
                fraction,
                str(row.peak_mib).partition(".")[0],
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) if len(lines) > 2 else ""


def tables(folder: Path = RESULTS) -> str:
    parts = []
    for path in sorted(folder.glob("*.csv")):
        machines: dict[str, list[Row]] = defaultdict(list)
        for row in read(path) or []:
            machines[row.gpu].append(row)
        for gpu, rows in machines.items():
            if text := table(rows):
                last = rows[-1]
                versions = f"torch {last.torch}, triton {last.triton}, {last.commit}, {last.date}"
                parts.append(f"# {path.stem} on {gpu}\n\n{versions}\n\n{text}")
    return "\n\n".join(parts)


if __name__ == "__main__":
    print(tables(Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS))
