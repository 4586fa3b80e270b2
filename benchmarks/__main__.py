"""`python -m ponder.benchmarks [GROUP ...] [--only TEXT]`: what this machine can compare.

A GPU is compared in bf16; a CPU in fp32, at smaller sizes, and in bf16 where it has products for
it, but for overhead, which is a GPU's. Rows land in benchmarks/results/ (or --out) case by case, so
that a run that is cut short keeps what it has, and with --resume goes on there; then the figures in
docs/figures/ are drawn anew. --smoke tries the code on tiny shapes and keeps nothing; --warm-up N
has N processes compile what the cases need, so that a run after it, on the same machine, does not.
"""

import argparse
import sys
from collections.abc import Collection, Iterator
from pathlib import Path

from ponder.benchmarks import (
    attention,
    decode,
    losses,
    mlp,
    overhead,
    pointwise,
    sampling,
    train_step,
)
from ponder.benchmarks.comparison import Case, compile_all, measure, settings
from ponder.benchmarks.figures import draw
from ponder.benchmarks.measure import (
    DEVICE,
    RESULTS,
    WRONG,
    Row,
    machine,
    read,
    side_by_side,
    write,
)

CASES = {
    module.__name__.rpartition(".")[2]: module.cases
    for module in (attention, mlp, losses, pointwise, decode)
}
CASES["mlp_autotuned"] = mlp.autotuned
RUNS = {"overhead": overhead.run}
WHOLE = ("train_step", "sampling")
GROUPS = [*CASES, *RUNS, *WHOLE]
BY_NAME_ALONE = ("mlp_autotuned",)  # minutes of compiling for each case


Done = Collection[tuple[str, str, str, str]]  # (benchmark, case, dtype, implementation)


def measured(folder: Path) -> Done:
    """What this machine has a row of."""
    found = [row for path in folder.glob("*.csv") for row in read(path) or []]
    own = [row for row in found if row.gpu == machine()["gpu"]]
    return {(row.benchmark, row.case, row.dtype, row.implementation) for row in own}


def results(group: str, only: str, smoke: bool, done: Done = ()) -> Iterator[list[Row]]:
    """The rows of a group, as they come, but for the cases that ponder has a row of in `done`."""
    there = {row[:3] for row in done if row[3] == "ponder"}
    if group in WHOLE:
        if smoke:
            return
        if group == "sampling":
            yield from sampling.run(done={row[1:] for row in done if row[0] == group})
        else:
            last = f"ponder{train_step.COMPILED}"
            yield from train_step.run(
                done={dtype for name, _, dtype, who in done if (name, who) == (group, last)}
            )
    elif group in RUNS:
        if DEVICE == "cpu" and not smoke:
            print(f"{group}: no GPU here, so there is nothing to compare")
        else:
            yield from RUNS[group](smoke, only, there)
    else:
        for case in to_measure(group, only, smoke, there):
            yield list(measure(case, repeats=2 if smoke else 20))


def to_measure(group: str, only: str, smoke: bool, there: Collection[tuple]) -> Iterator[Case]:
    """The cases of a group that are not `there`: (benchmark, case, dtype)."""
    for setting in settings(smoke):
        for case in CASES[group](setting):
            cases = {(case.benchmark, f"{case.name} {mode}", case.dtype) for mode in case.modes}
            if only in case.name and not cases <= there:
                yield case


def warm_up(cases: Iterator[Case], part: int, processes: int) -> None:
    """Each of the cases once, of which this process takes a part."""
    for i, case in enumerate(cases):
        if i % processes == part:
            compile_all(case)
            print(f"{case.benchmark} {case.name} is compiled", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m ponder.benchmarks")
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=", ".join(GROUPS))
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name has it")
    parser.add_argument("--smoke", action="store_true", help="try the code, keep nothing")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the folder of the CSV files")
    parser.add_argument("--resume", action="store_true", help="leave out cases that --out has")
    parser.add_argument("--warm-up", type=int, metavar="N", help="compile, in N processes")
    parser.add_argument("--part", type=int, help="which of these processes this one is")
    args = parser.parse_args()
    unknown = set(args.groups) - set(GROUPS)
    if unknown:
        parser.error(f"no group is named {', '.join(unknown)}; there are {', '.join(GROUPS)}")
    if args.warm_up:
        if args.part is None:
            return side_by_side("ponder.benchmarks", args.warm_up)
        done = measured(args.out) if args.resume else set()
        there = {row[:3] for row in done if row[3] == "ponder"}
        groups = [group for group in args.groups if group in CASES]
        cases = (case for g in groups for case in to_measure(g, args.only, args.smoke, there))
        warm_up(cases, args.part, args.warm_up)
        return 0
    for group in args.groups or [g for g in GROUPS if g not in BY_NAME_ALONE]:
        done = measured(args.out) if args.resume else set()
        for rows in results(group, args.only, args.smoke, done):
            if not args.smoke:
                write(rows, args.out)
    if not args.smoke and args.out == RESULTS:
        draw()
    for fault in WRONG:
        print(fault)
    return bool(WRONG)


if __name__ == "__main__":
    sys.exit(main())
