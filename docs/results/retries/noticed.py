"""What a model does behind a right and a wrong first attempt: noticed.py samples.sqlite

One row for each case, of single samples with unlimited thinking: how many there are, the share that
is right in the end, the share of the other samples of the same problems that is, and the share
whose second attempt is the first one, word for word.
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


def case(prompt: str, text: str) -> tuple[tuple[str, str], bool]:
    """("right" or "wrong" first attempt, "yes" or "no" for another one behind it), and whether that
    one repeats it."""
    problem = TASK.read(prompt)
    thought = text.removeprefix("<think>").partition("</think>")[0]
    first, *more = thought.split(TASK.cue)
    labels = TASK.step_labels(problem, first)
    right = bool(labels) and all(labels) and first.endswith(f":{problem.data[1]};")
    kind = "right" if right else "wrong", "yes" if more else "no"
    return kind, more[:1] == [first]


def main() -> None:
    table = csv.writer(sys.stdout, lineterminator="\n")
    table.writerow("first_attempt tried_again samples right others_right repeated".split())
    pools = defaultdict(list)
    for prompt, text, correct in sqlite3.connect(sys.argv[1]).execute(QUERY):
        pools[prompt].append((case(prompt, text), correct))
    found = defaultdict(list)
    for pool in pools.values():
        total = sum(correct for _, correct in pool)
        for (kind, repeats), correct in pool:
            found[kind].append((correct, (total - correct) / (len(pool) - 1), repeats))
    for kind, rows in sorted(found.items()):
        shares = (f"{sum(column) / len(rows):.4f}" for column in zip(*rows, strict=True))
        table.writerow([*kind, len(rows), *shares])


main()
