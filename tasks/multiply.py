"""Products of two whole numbers of n digits each, worked by long multiplication.

    12*34=   is worked as  +84=84 +063=804  (without the space): 12·4 = 48, sum 48; 12·30 = 360,
                                            sum 408

Trace and answer are written with the least significant digit first, so that carries run the way
that the text does (Lee et al. 2023, "Teaching Arithmetic to Small Transformers", section 3).
"""

import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product

from . import Problem, WorkedTask, check_range, final_text


def _reversed(number: int) -> str:
    return str(number)[::-1]


@dataclass(frozen=True)
class Multiply(WorkedTask):
    """`12*34=` → `+84=84+063=804` → `804`: a step adds one partial product to the running sum.

    digits: the fewest and the most digits of the two factors, every number equally likely; both
    have the same, and neither starts with 0. A product and its mirror image (12*34, 34*12) are
    in the same split.
    """

    digits: tuple[int, int] = (2, 4)

    name = "multiply"
    alphabet = "0123456789*+="
    cue = "*"

    def __post_init__(self):
        check_range(self.name, "digits", self.digits, least=1)

    def draw(self, rng: random.Random) -> tuple[int, int]:
        low, high = self.digits
        least = 10 ** (low + int(rng.random() * (high - low + 1)) - 1)
        return (
            rng.randrange(least, 10 * least),
            rng.randrange(least, 10 * least),
        )

    def every(self) -> Iterable[tuple]:
        for length in range(self.digits[0], self.digits[1] + 1):
            yield from product(range(10 ** (length - 1), 10**length), repeat=2)

    def prompt(self, statement: tuple) -> str:
        return f"{statement[0]}*{statement[1]}="

    def key(self, statement: tuple) -> str:
        return self.prompt(tuple(sorted(statement)))

    def solve(self, statement: tuple) -> Problem:
        a, b = statement
        return Problem(self.name, self.prompt(statement), _reversed(a * b), len(str(b)), statement)

    def steps(self, problem: Problem) -> Iterator[str]:
        return self._steps(*problem.data)

    def _steps(self, a: int, b: int, wrong: int = -1, by: int = 0) -> Iterator[str]:
        """The steps, with a partial product at the place `wrong`, before its zeros, off by `by`."""
        total = 0
        for place, digit in enumerate(_reversed(b)):
            partial = a * int(digit) * 10**place
            if place == wrong:
                partial += by * 10**place
            total += partial
            yield f"+{_reversed(partial)}={_reversed(total)}"

    def slip(self, problem: Problem, rng: random.Random) -> str:
        """A partial product that is off in one of its digits, and the sums that follow from it."""
        a, b = problem.data
        wrong = rng.randrange(len(str(b)))
        product = a * int(_reversed(b)[wrong])
        off = 10 ** rng.randrange(len(str(product)))
        return "".join(self._steps(a, b, wrong, off if product < off else rng.choice((-off, off))))

    def answer(self, text: str) -> str | None:
        """The product that a completion answers with, least significant digit first."""
        final = final_text(text)
        return final if final and re.fullmatch("[0-9]*[1-9]", final) else None
