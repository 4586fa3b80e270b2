"""What goes wrong first in the samples of a store: errors.py sweep/samples.sqlite > errors.csv

One row for each temperature and fault: the share of all its samples that are wrong by it, and of
those whose thought begins with the last digit of a factor, with the middle one, with the first.
"""

import csv
import re
import sqlite3
import sys
from collections import Counter

PLACES = (0, 1, 2)


def fault(prompt: str, text: str) -> str:
    factors = prompt.rstrip("=").split("*")
    steps = re.findall(r"\+(0*)(\d)x(\d+)=(\d+)=(\d+)", text)
    if sorted(len(zeros) for zeros, *_ in steps) != [*PLACES]:
        return "a digit left out or taken twice"
    used = {factor[::-1] for _, _, factor, _, _ in steps}
    if len(used) > 1 or not used <= set(factors):
        return "a factor copied wrongly"
    (factor,) = used
    others = factors if factors[0] == factors[1] else [f for f in factors if f != factor]
    if any(others[0][-1 - len(zeros)] != digit for zeros, digit, *_ in steps):
        return "a digit copied wrongly"
    total = 0
    for zeros, digit, _, partial, running in steps:
        product = int(factor) * int(digit) * 10 ** len(zeros)
        if int(partial[::-1]) != product:
            return "a partial product"
        total += product
        if int(running[::-1]) != total:
            return "a sum"
    return "the answer"


def main() -> None:
    store = sqlite3.connect(sys.argv[1])
    rows = store.execute(
        "SELECT params, prompt, text, correct FROM sample JOIN problem ON problem.id = problem"
    )
    samples: Counter = Counter()
    faults: dict[str, Counter] = {}
    for params, prompt, text, right in rows:
        begin = re.match(r"<think>\+(0*)\d", text)
        kinds = [(params, None), (params, len(begin[1]) if begin else -1)]
        samples.update(kinds)
        named = "none: right" if right else fault(prompt, text)
        faults.setdefault(named, Counter()).update(kinds)
    write = csv.writer(sys.stdout, lineterminator="\n").writerow
    write(["params", "first_fault", "share", "last_digit_first", "middle_first", "first_first"])
    for params in sorted({of for of, _ in samples}):
        write([params, "samples", *(samples[params, place] for place in (None, *PLACES))])
        for named, count in sorted(faults.items(), key=lambda item: -item[1][params, None]):
            shares = [count[params, p] / max(1, samples[params, p]) for p in (None, *PLACES)]
            write([params, named, *(f"{share:.4f}" for share in shares)])


if __name__ == "__main__":
    main()
