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
from typing import Literal

from .task import Problem, WorkedTask, check_range, final_text


def _reversed(number: int) -> str:
    return str(number)[::-1]


@dataclass(frozen=True)
class Multiply(WorkedTask):
    """`12*34=` → `+84=84+063=804` → `804`: a step adds one partial product to the running sum.

    digits: the fewest and the most digits of the two factors, every number equally likely; both
    have the same, and neither starts with 0. A product and its mirror image (12*34, 34*12) are
    in the same split.

    ways: "one" takes the second factor apart, from its last digit on. "any" takes either factor
    apart, its digits in any order, and says in each step what it multiplies: `+03x21=063=804` for
    30·12 = 360, sum 408. The prompt decides which way is shown, so a product has many right traces,
    and a model of them draws a way anew in every sample.
    """

    digits: tuple[int, int] = (2, 4)
    ways: Literal["one", "any"] = "one"

    name = "multiply"
    cue = "*"

    def __post_init__(self):
        check_range(self.name, "digits", self.digits, least=1)
        if self.ways not in ("one", "any"):
            raise ValueError(f"{self.name}: ways is {self.ways!r}; it must be one or any")

    @property
    def alphabet(self) -> str:
        return "0123456789*+=" + "x" * (self.ways == "any")

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
        return self._steps(*self._way(problem.data))

    def _way(self, statement: tuple[int, int]) -> tuple[int, list[tuple[int, int]]]:
        """A factor, and the places and digits of the other in the order that they are taken."""
        factor, other = statement
        rng = random.Random(self.prompt(statement))
        if self.ways == "any" and rng.random() < 0.5:
            factor, other = other, factor
        digits = [(place, int(digit)) for place, digit in enumerate(_reversed(other))]
        if self.ways == "any":
            rng.shuffle(digits)
        return factor, digits

    def _steps(
        self, factor: int, digits: list[tuple[int, int]], wrong: int = -1, by: int = 0
    ) -> Iterator[str]:
        """The steps; the partial product at the place `wrong` is off by `by`, before its zeros."""
        total = 0
        for place, digit in digits:
            partial = (factor * digit + by * (place == wrong)) * 10**place
            total += partial
            said = f"{'0' * place}{digit}x{_reversed(factor)}=" if self.ways == "any" else ""
            yield f"+{said}{_reversed(partial)}={_reversed(total)}"

    def slip(self, problem: Problem, rng: random.Random) -> str:
        """A partial product that is off in one of its digits, and the sums that follow from it."""
        factor, digits = self._way(problem.data)
        wrong = rng.randrange(len(digits))
        product = factor * dict(digits)[wrong]
        off = 10 ** rng.randrange(len(str(product)))
        by = off if product < off else rng.choice((-off, off))
        return "".join(self._steps(factor, digits, wrong, by))

    def answer(self, text: str) -> str | None:
        """The product that a completion answers with, least significant digit first."""
        final = final_text(text)
        return final if final and re.fullmatch("[0-9]*[1-9]", final) else None
