"""Timing side by side, and the rows of benchmarks/results/*.csv."""

import csv
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from datetime import date
from functools import cache
from pathlib import Path

import numpy as np
import torch

from ponder import provenance
from ponder.kernels._runtime import tiles_file

RESULTS = Path(__file__).parent / "results"
WRONG: list[str] = []  # what was left out because ponder's own result was wrong
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Row:
    """One measurement. `case` is the same string for every implementation of it."""

    benchmark: str
    case: str
    dtype: str
    implementation: str  # ponder, or the peer's name
    ms_p20: float
    ms_p50: float
    ms_p80: float
    tflops: float | str  # empty where it means nothing
    gb_per_s: float | str
    roofline: float | str  # fraction of the ceiling measured in the same run
    peak_mib: float | str
    error: float | str  # relative to the truth, in norm
    gpu: str
    driver: str
    torch: str
    triton: str
    commit: str
    date: str


def _commit() -> str:
    """Twelve digits of the commit, `+` where the code differs, and `+tiles` where PONDER_TILES has
    kernels take other tiles. A copy without .git is told which commit it is, by PONDER_COMMIT."""
    found = provenance.commit() or os.environ.get("PONDER_COMMIT", "")
    return found[:12] + "+" * found.endswith("+") + "+tiles" * bool(tiles_file())


@cache  # nvidia-smi and git take a while, and rows are many
def machine() -> dict[str, str]:
    """The columns of a row that say what it was measured on, and when."""
    versions = provenance.versions()
    facts = provenance.machine()
    driver = ""
    if DEVICE == "cuda":
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    return {
        "gpu": facts.get("gpu") or f"{facts['processor']}, {facts['cores']} cores (CPU)",
        "driver": driver,
        "torch": versions["torch"],
        "triton": versions.get("triton", ""),
        "commit": _commit(),
        "date": date.today().isoformat(),
    }


def side_by_side(module: str, processes: int) -> int:
    """This command in so many processes, `--part` telling each which of them it is: what compiles
    takes a core each. The worst of their exit codes."""
    words = [sys.executable, "-u", "-m", module, *sys.argv[1:], "--part"]
    environment = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": "1"}
    running = [subprocess.Popen([*words, str(i)], env=environment) for i in range(processes)]
    return max(abs(process.wait()) for process in running)


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def milliseconds(
    implementations: Mapping[str, Callable[[], object]],
    *,
    repeats: int,
    warmup: int = 3,
    queued: bool = False,
) -> dict[str, list[float]]:
    """Times of each, taken in turns, so that a noisy neighbour meets all of them alike.

    queued: the GPU sleeps before a call, which is then queued whole before its first kernel starts,
    up to two milliseconds of launching: what that costs is overhead.py's.
    """
    times: dict[str, list[float]] = {name: [] for name in implementations}
    for work in implementations.values():
        for _ in range(warmup):
            work()
    flush = torch.empty(1 << 26, device=DEVICE) if DEVICE == "cuda" else None  # over the L2 cache
    for _ in range(repeats):
        for name, work in implementations.items():
            if flush is not None:
                flush.zero_()
                if queued:
                    # Cycles, 2 ms at 2 GHz: attention with its backward takes Python 1.1 ms.
                    torch.cuda._sleep(4_000_000)
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                work()
                end.record()
                torch.cuda.synchronize()
                times[name].append(start.elapsed_time(end))
            else:
                begin = time.perf_counter()
                work()
                times[name].append(1e3 * (time.perf_counter() - begin))
    return times


def peak_mib(work: Callable[[], object]) -> float | str:
    """Device memory that a call takes beyond what is there, in MiB; empty on a CPU."""
    if DEVICE != "cuda":
        return ""
    work()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def left_out(name: str, fault: str) -> None:
    """Say what gets no row; ponder's own fault is remembered."""
    print(fault, flush=True)
    if name.startswith("ponder"):
        WRONG.append(fault)


@contextmanager
def left_out_if_it_fails(what: str, name: str) -> Iterator[None]:
    """A peer that cannot run here must not end the comparison, nor a case those after it."""
    try:
        yield
    except Exception as error:
        reason = str(error).strip().partition("\n")[0][:120]
        left_out(name, f"{what}: {name} fails: {type(error).__name__} {reason}")


def rows(
    benchmark: str,
    case: str,
    dtype: str,
    implementations: Mapping[str, Callable[[], object]],
    *,
    repeats: int = 20,
    warmup: int = 3,
    flops: float | None = None,
    nbytes: float | None = None,
    ceiling: float | None = None,
    errors: Mapping[str, float] | None = None,
    allowed: float | None = None,
    queued: bool = False,
) -> list[Row]:
    """Measure, print and return a row for each implementation.

    flops, nbytes: what one call must compute and move at least. ceiling: FLOP/s where flops is
    given, else bytes/s. errors: relative errors; where one is above `allowed` there is no row, as
    the time of a wrong result means nothing, and ponder's fault is noted in `WRONG`. queued: see
    `milliseconds`.
    """
    errors = errors or {}
    good = {}
    for name, work in implementations.items():
        error = errors.get(name, 0.0)
        if allowed is not None and not error <= allowed:
            left_out(name, f"{benchmark} {case}: {name} is wrong by {error:.2e} and left out")
            continue
        good[name] = work
    times = milliseconds(good, repeats=repeats, warmup=warmup, queued=queued)
    result = []
    for name, work in good.items():
        seconds = statistics.median(times[name]) / 1e3
        rate = (flops or nbytes or 0) / seconds
        found = row(
            benchmark,
            case,
            dtype,
            name,
            times[name],
            tflops=round(flops / seconds / 1e12, 4) if flops else "",
            gb_per_s=round(nbytes / seconds / 1e9, 2) if nbytes else "",
            roofline=round(rate / ceiling, 4) if ceiling and rate else "",
            peak_mib=peak_mib(work),
            error=f"{errors[name]:.3e}" if name in errors else "",
        )
        result.append(found)
        print(f"{benchmark:12} {case:40} {dtype:5} {name:24} {found.ms_p50:10.3f} ms")
    return result


def row(
    benchmark: str, case: str, dtype: str, implementation: str, times: list[float], **more
) -> Row:
    """The row of some times in ms, one or more of them; `more` are the columns behind them."""
    p20, p50, p80 = np.quantile(times, (0.2, 0.5, 0.8)).round(4).tolist()
    more = dict.fromkeys(("tflops", "gb_per_s", "roofline", "peak_mib", "error"), "") | more
    return Row(benchmark, case, dtype, implementation, p20, p50, p80, **more, **machine())


def read(path: Path) -> list[Row] | None:
    """The rows of a file of `write`; None if it is a table of another kind."""
    with open(path, newline="") as file:
        table = csv.DictReader(file)
        if list(table.fieldnames or []) != [f.name for f in fields(Row)]:
            return None
        return [Row(**line) for line in table]  # type: ignore[arg-type]  (numbers as text)


def measured_here(path: Path, column: str) -> set[str]:
    """What the rows of this machine, in a table of any kind, have in a column."""
    if not path.exists():
        return set()
    with open(path, newline="") as file:
        return {row[column] for row in csv.DictReader(file) if row["gpu"] == machine()["gpu"]}


def write(measured: list[Row], folder: Path = RESULTS, *, whole_cases: bool = True) -> None:
    """Put rows into the file of their benchmark, in place of this machine's of the same cases;
    whole_cases False: of the same cases and implementations, where those are measured apart."""
    key = ("gpu", "case", "dtype") + (() if whole_cases else ("implementation",))
    for name in {found.benchmark: None for found in measured}:
        new = [asdict(found) for found in measured if found.benchmark == name]
        merge(folder / f"{name}.csv", [f.name for f in fields(Row)], new, key)


def merge(path: Path, columns: Sequence[str], new: list[dict], key: Sequence[str]) -> None:
    """Put rows into a table, in place of those that equal one of them in the columns of `key`."""
    replaced = {tuple(row[k] for k in key) for row in new}
    kept: list[dict] = []
    if path.exists():
        with open(path, newline="") as file:
            kept = [r for r in csv.DictReader(file) if tuple(r[k] for k in key) not in replaced]
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".tmp")  # a run that is killed here leaves the old table
    with open(aside, "w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(kept + new)
    os.replace(aside, path)
    print(path)
