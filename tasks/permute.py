"""Permutations of five letters, applied in turn to the word abcde.

    abcde:31254,21345=   is worked as  cabed, then acbed

A permutation such as 31254 gives the word whose letters are the old word's 3rd, 1st, 2nd, 5th and
4th. This is the word problem of the group S5, complete for NC1 (Barrington 1989, "Bounded-width
polynomial-size branching programs recognize exactly those languages in NC1"): no circuit of fixed
depth, and so no transformer without a chain of thought, is believed to solve it at every length.
"""

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import permutations, product
from operator import itemgetter

from .task import Problem, WorkedTask, check_range, final_text

LETTERS = "abcde"
_PERMUTATIONS = ["".join(digits) for digits in permutations("12345")]
_WORDS = {"".join(letters) for letters in permutations(LETTERS)}


# _PLACES["31254"] takes a word's 3rd, 1st, 2nd, 5th and 4th letter.
_PLACES = {digits: itemgetter(*(int(digit) - 1 for digit in digits)) for digits in _PERMUTATIONS}


def _apply(permutation: str, word: str) -> str:
    return "".join(_PLACES[permutation](word))


@dataclass(frozen=True)
class Permute(WorkedTask):
    """`abcde:31254,21345=` → `cabed;acbed;` → `acbed`: a step is the word after a permutation.

    length: the fewest and the most permutations, every number equally likely. Each is uniform
    over all 120, so the answer is uniform over the 120 words.
    """

    length: tuple[int, int] = (2, 10)

    name = "permute"
    step_end = ";"
    alphabet = LETTERS + "12345:,=;"
    cue = "="

    def __post_init__(self):
        check_range(self.name, "length", self.length, least=1)

    def draw(self, rng: random.Random) -> tuple[str, ...]:
        low, high = self.length
        return tuple(rng.choices(_PERMUTATIONS, k=low + int(rng.random() * (high - low + 1))))

    def every(self) -> Iterable[tuple]:
        for length in range(self.length[0], self.length[1] + 1):
            yield from product(_PERMUTATIONS, repeat=length)

    def prompt(self, statement: tuple) -> str:
        return f"{LETTERS}:{','.join(statement)}="

    def solve(self, statement: tuple) -> Problem:
        word = LETTERS
        for permutation in statement:
            word = _apply(permutation, word)
        return Problem(self.name, self.prompt(statement), word, len(statement), statement)

    def steps(self, problem: Problem) -> Iterator[str]:
        word = LETTERS
        for permutation in problem.data:
            word = _apply(permutation, word)
            yield word + ";"

    def slip(self, problem: Problem, rng: random.Random) -> str:
        """Two letters of a word exchanged somewhere, and the chain carried on from it."""
        word, wrong = LETTERS, rng.randrange(len(problem.data))
        text = ""
        for i, permutation in enumerate(problem.data):
            word = _apply(permutation, word)
            if i == wrong:
                a, b = rng.sample(LETTERS, 2)
                word = word.translate(str.maketrans(a + b, b + a))
            text += word + ";"
        return text

    def answer(self, text: str) -> str | None:
        """The word that a completion answers with, a rearrangement of abcde."""
        final = final_text(text)
        return final if final in _WORDS else None
