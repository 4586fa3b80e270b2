"""`python -m ponder.benchmarks [GROUP ...] [--only TEXT]`: what this machine can compare.

Kernels are compared on a GPU alone: on a CPU the functions are PyTorch's own. Rows land in
benchmarks/results/ case by case, so that a run that is cut short keeps what it has; then the
figures in docs/figures/ are drawn anew. --smoke tries the code on tiny shapes and keeps nothing.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from ponder.benchmarks import (
    attention,
    decode,
    losses,
    mlp,
    overhead,
    pointwise,
    sampling,
    tiles,
    train_step,
)
from ponder.benchmarks.comparison import measure
from ponder.benchmarks.figures import draw
from ponder.benchmarks.measure import DEVICE, RESULTS, WRONG, Row, write

CASES = {
    module.__name__.rpartition(".")[2]: module.cases
    for module in (attention, mlp, losses, pointwise, decode, tiles)
}
RUNS = {"overhead": overhead.run}
WHOLE = {"train_step": lambda: [train_step.run()], "sampling": sampling.run}
GROUPS = [*CASES, *RUNS, *WHOLE]
BY_NAME_ALONE = ("tiles",)  # compares our kernels with themselves


def results(group: str, only: str, smoke: bool) -> Iterator[list[Row]]:
    """The rows of a group, as they come."""
    if group in WHOLE:
        if not smoke:
            yield from WHOLE[group]()
    elif DEVICE == "cpu" and not smoke:
        print(f"{group}: no GPU here, so there is nothing to compare")
    elif group in RUNS:
        yield list(RUNS[group](smoke))
    else:
        for case in CASES[group](smoke):
            if only in case.name:
                yield list(measure(case, repeats=2 if smoke else 20))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m ponder.benchmarks")
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=", ".join(GROUPS))
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name has it")
    parser.add_argument("--smoke", action="store_true", help="try the code, keep nothing")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the folder of the CSV files")
    args = parser.parse_args()
    unknown = set(args.groups) - set(GROUPS)
    if unknown:
        parser.error(f"no group is named {', '.join(unknown)}; there are {', '.join(GROUPS)}")
    for group in args.groups or [g for g in GROUPS if g not in BY_NAME_ALONE]:
        for rows in results(group, args.only, args.smoke):
            if not args.smoke:
                write(rows, args.out)
    if not args.smoke and args.out == RESULTS:
        draw()
    for fault in WRONG:
        print(fault)
    return bool(WRONG)


if __name__ == "__main__":
    sys.exit(main())
