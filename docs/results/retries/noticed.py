"""What a model does behind a right and a wrong first attempt: noticed.py NAME=samples.sqlite ...

One row for each model and case, of single samples with unlimited thinking: how many there are, the
share that is right in the end, and the share of the other samples of the same problems that is.
"""

import csv
import sqlite3
import sys
from collections import defaultdict

from ponder import tasks

TASK = tasks.get("countdown:traces=path")
QUERY = """
    SELECT prompt, text, correct FROM sample JOIN problem ON problem.id = sample.problem
    WHERE budget IS NULL AND params = 'temperature=1.0' ORDER BY problem.id, sample
"""


def case(prompt: str, text: str) -> tuple[str, str]:
    """("right" or "wrong" first attempt, "yes" or "no" for another one behind it)."""
    problem = TASK.read(prompt)
    thought = text.removeprefix("<think>").partition("</think>")[0]
    first, cue, _ = thought.partition(TASK.cue)
    labels = TASK.step_labels(problem, first)
    right = bool(labels) and all(labels) and first.endswith(f":{problem.data[1]};")
    return "right" if right else "wrong", "yes" if cue else "no"


def main() -> None:
    table = csv.writer(sys.stdout, lineterminator="\n")
    table.writerow("model first_attempt tried_again samples right others_right".split())
    for argument in sys.argv[1:]:
        name, _, path = argument.partition("=")
        pools = defaultdict(list)
        for prompt, text, correct in sqlite3.connect(path).execute(QUERY):
            pools[prompt].append((case(prompt, text), correct))
        found = defaultdict(list)
        for pool in pools.values():
            total = sum(correct for _, correct in pool)
            for kind, correct in pool:
                found[kind].append((correct, (total - correct) / (len(pool) - 1)))
        for kind, pairs in sorted(found.items()):
            shares = (f"{sum(column) / len(pairs):.4f}" for column in zip(*pairs, strict=True))
            table.writerow([name, *kind, len(pairs), *shares])


main()
