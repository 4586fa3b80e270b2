"""docs/figures/*.png, drawn from benchmarks/results/*.csv and from nothing else.

A figure shows one benchmark on one machine: for each case how many times as fast as each peer
ponder is. Right of 1 it is faster. Of training runs it shows the losses.
"""

import csv
import math
import re
from collections import defaultdict
from dataclasses import fields
from pathlib import Path

from ponder.benchmarks.measure import RESULTS, Row
from ponder.figures import CYCLE, GRID, INK, MUTED, STYLE

FIGURES = Path(__file__).parents[1] / "docs" / "figures"
COLUMNS = {column.name for column in fields(Row)}
CURVES: tuple[str, ...] = ("gpu", "implementation", "step", "seconds", "train_loss", "val_loss")
COLOURS = (*CYCLE, "#8b5fa8", "#6f9cc9")
TICKS = (1, 1.25, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 12, 16, 24, 32, 64, 0.8, 0.5, 0.3, 0.2, 0.1)
COMPILED = ", torch.compile"


def ratios(rows: list[dict[str, str]]) -> dict[str, dict[str, float]]:
    """{case and dtype: {peer: its median time over ponder's}}; compiled against compiled."""
    times: dict[str, dict[str, float]] = defaultdict(dict)
    for row in rows:
        times[f"{row['case']}, {row['dtype']}"][row["implementation"]] = float(row["ms_p50"])
    found = {}
    for case, measured in times.items():
        ours = {name: ms for name, ms in measured.items() if name.startswith("ponder")}
        peers = {}
        for name, ms in measured.items():
            if name not in ours:
                like = f"ponder{COMPILED}" if name.endswith(COMPILED) else "ponder"
                if own := ours.get(like) or ours.get("ponder"):
                    peers[name] = ms / own
        if peers:
            found[case] = peers
    return found


def _labels(cases: list[str]) -> tuple[dict[str, str], list[str]]:
    """What tells each case from the others, and what all of them have in common."""
    parts = {case: case.split(", ") for case in cases}
    common = [p for p in parts[cases[0]] if len(cases) > 1 and all(p in o for o in parts.values())]
    return {case: ", ".join(p for p in o if p not in common) for case, o in parts.items()}, common


def _in_order(label: str) -> list:
    """A key that sorts 16 before 128."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", label)]


def _ticks(low: float, high: float) -> list[float]:
    """1, and as many more as have room on a logarithmic axis."""
    found: list[float] = []
    for tick in TICKS:
        apart = (abs(math.log(tick / other)) for other in found)
        if low <= tick <= high and all(gap > math.log(high / low) / 14 for gap in apart):
            found.append(tick)
    return found


def figure(benchmark: str, machine: str, rows: list[dict[str, str]], path: Path) -> bool:
    """Draw one; False where no case has both ponder's time and a peer's."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter, NullLocator

    found = ratios(rows)
    if not found:
        return False
    peers = list(dict.fromkeys(name for values in found.values() for name in values))
    labels, common = _labels(list(found))
    cases = sorted(found, key=lambda case: _in_order(labels[case]))
    height = 1.5 + 0.26 * len(found)
    drawing, axes = plt.subplots(figsize=(8.2, height), layout="constrained")
    axes.axvline(1.0, color=INK, linewidth=1)
    for i, peer in enumerate(peers):
        points = [(found[case][peer], -y) for y, case in enumerate(cases) if peer in found[case]]
        axes.scatter(*zip(*points, strict=True), s=42, color=COLOURS[i % len(COLOURS)], label=peer)
    axes.set_ylim(0.5 - len(found), 0.5)
    axes.set_yticks([-y for y in range(len(cases))], [labels[case] for case in cases])
    values = [x for case in found.values() for x in case.values()]
    low, high = min(0.8, 0.9 * min(values)), max(1.6, 1.15 * max(values))
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    axes.set_xticks(_ticks(low, high))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.3g}×"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(axis="x", color=GRID)
    axes.set_axisbelow(True)
    axes.tick_params(colors=MUTED, labelsize=8, length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(MUTED)
    axes.set_xlabel("times as fast as the peer (median)", fontsize=9, color=INK)
    title = "\n".join(filter(None, [f"{benchmark} on {machine}", ", ".join(common)]))
    drawing.suptitle(title, x=0.01, ha="left", fontsize=10, color=INK)
    drawing.legend(fontsize=8, frameon=False, loc="outside lower right", ncols=min(3, len(peers)))
    path.parent.mkdir(parents=True, exist_ok=True)
    drawing.savefig(path, dpi=160, metadata={"Software": None})
    plt.close(drawing)
    return True


def curves(benchmark: str, machine: str, rows: list[dict[str, str]], path: Path) -> bool:
    """Draw the training losses of some runs by steps and by seconds, True; rows of CURVES."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    runs: dict[str, list[dict[str, str]]] = defaultdict(list)
    for row in rows:
        runs[row["implementation"]].append(row)
    with plt.rc_context(STYLE):
        drawing, both = plt.subplots(1, 2, figsize=(9, 4), sharey=True)
        for axes, column in zip(both, ("step", "seconds"), strict=True):
            for (name, run), colour in zip(runs.items(), COLOURS, strict=False):
                label = f"{name}: validation {float(run[-1]['val_loss']):.3f}"
                x, y = ([float(row[c]) for row in run] for c in (column, "train_loss"))
                axes.plot(x, y, color=colour, label=label)
            axes.set_xlabel({"step": "steps", "seconds": "seconds of training"}[column])
        both[0].set_ylabel("training loss, nats a token")
        both[0].set_title(f"{benchmark.removesuffix('_curves')} on {machine}")
        both[1].legend(fontsize=8)
        path.parent.mkdir(parents=True, exist_ok=True)
        drawing.savefig(path, dpi=160, metadata={"Software": None})
        plt.close(drawing)
    return True


def draw(results: Path = RESULTS, folder: Path = FIGURES) -> list[Path]:
    """Every figure that the result files allow; their paths."""
    drawn = []
    for source in sorted(results.glob("*.csv")):
        machines: dict[str, list[dict[str, str]]] = defaultdict(list)
        with open(source, newline="") as file:
            for row in csv.DictReader(file):
                if row.keys() in (COLUMNS, set(CURVES)):  # not the tables of another kind
                    machines[row["gpu"]].append(row)
        for machine, rows in machines.items():
            name = re.sub(r"[^a-z0-9]+", "-", machine.lower()).strip("-")
            path = folder / f"{source.stem}-{name}.png"
            kind = figure if rows[0].keys() == COLUMNS else curves
            if kind(source.stem, machine, rows, path):
                drawn.append(path)
                print(path)
    return drawn


if __name__ == "__main__":
    draw()
