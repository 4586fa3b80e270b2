"""How wrong samples end: wrong.py samples.sqlite

One row: the single samples, those of them that are wrong, and the share of these whose last
equation gives the target and is false.
"""

import re
import sqlite3
import sys
from operator import add, floordiv, mul, sub

QUERY = """
    SELECT prompt, text, correct FROM sample JOIN problem ON problem.id = sample.problem
    WHERE budget IS NULL AND params = 'temperature=1.0'
"""
EQUATION = re.compile(r"(\d+)([-+*/])(\d+)=(\d+):")
RESULT = {"+": add, "-": sub, "*": mul, "/": floordiv}


def bent(prompt: str, text: str) -> bool:
    equations = EQUATION.findall(text.partition("</think>")[0])
    if not equations or equations[-1][3] != prompt.partition(">")[2]:
        return False
    left, operation, right, said = equations[-1]
    try:
        result = RESULT[operation](int(left), int(right))
    except ZeroDivisionError:
        return True
    return result != int(said) or (operation == "/" and int(left) % int(right) != 0)


def main() -> None:
    samples = sqlite3.connect(sys.argv[1]).execute(QUERY).fetchall()
    wrong = [bent(prompt, text) for prompt, text, correct in samples if not correct]
    print("samples,wrong,false_equation_to_the_target")
    print(len(samples), len(wrong), f"{sum(wrong) / len(wrong):.4f}", sep=",")


main()
