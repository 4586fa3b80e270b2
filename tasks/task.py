"""What a task is, and a problem of one; what the tasks of this package share.

A trace is a run of steps, a step being the unit that budgets count; a problem's difficulty is the
number of steps that its whole trace takes.
"""

import random
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice
from typing import Protocol

SPLITS = ("train", "val", "test")
# Draws in a row that bring nothing new before the rest is enumerated. At 1 draw in 20 for a
# held-out split, this many misses mean that less than a hundredth of the split is left.
PATIENCE = 20_000


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem: its prompt (up to, not including, `<think>`) and its canonical answer.

    difficulty is the number of steps of the whole trace (or the level that a data set tells); data
    is what the task itself computes from.
    """

    task: str
    prompt: str
    answer: str
    difficulty: int
    data: tuple


class Task(Protocol):
    """What training and inference ask of a task."""

    @property
    def name(self) -> str: ...

    @property
    def alphabet(self) -> str:
        """Every character that the task's prompts, traces and answers use."""
        ...

    def problems(self, split: str, count: int, seed: int) -> list[Problem]:
        """count problems of a split ("train", "val" or "test"); (split, seed) decides which. Raises
        TooFew where the split holds fewer."""
        ...

    def trace(self, problem: Problem, budget: int | None = None) -> str:
        """A worked chain of thought, of at most `budget` steps where given."""
        ...

    def verify(self, problem: Problem, text: str) -> bool:
        """Whether a completion is right: any string is allowed, and what is right has an answer."""
        ...

    def answer(self, text: str) -> str | None:
        """The canonical answer that a completion gives, for votes; None where it gives none."""
        ...


def split_of(key: str) -> str:
    """The split that a problem belongs to: 90 % train, 5 % val, 5 % test, by a hash of its key."""
    digest = blake2b(key.encode(), digest_size=8).digest()
    return {0: "val", 1: "test"}.get(int.from_bytes(digest, "little") % 20, "train")


def final_text(text: str) -> str | None:
    """What follows the last `</think>`, or the whole where there is none, stripped.

    None where a thought was opened and not closed.
    """
    tail = text.rpartition("</think>")[2]
    return None if "<think>" in tail else tail.strip()


class TooFew(ValueError):
    """A split has fewer problems than are asked for: `held`, all of which can be asked for."""

    def __init__(self, sentence: str, held: int):
        super().__init__(sentence)
        self.held = held


def problems_of(task: Task, split: str, count: int, seed: int) -> list[Problem]:
    """`task.problems`, looked at; ValueError, naming the task, where they are none."""
    try:
        found = task.problems(split, count, seed)
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(f"{task.name}: problems() failed ({said(error)})") from error
    if not isinstance(found, list) or not found:
        raise ValueError(f"{task.name}: problems() gives {found!r}; it must be a list of problems")
    for p in found:
        texts = isinstance(getattr(p, "prompt", None), str) and isinstance(p.answer, str)
        if not texts or type(p.difficulty) is not int or abs(p.difficulty) >= 1 << 63:
            raise ValueError(
                f"{task.name}: problems() gives {p!r}; prompt and answer must be text, and "
                "difficulty a whole number of at most 63 bits"
            )
    return found


def at_most(task: Task, split: str, count: int, seed: int) -> list[Problem]:
    """`problems_of`, of all that there are where the task says by `TooFew` that it holds fewer."""
    try:
        return problems_of(task, split, count, seed)
    except TooFew as few:
        return problems_of(task, split, max(1, few.held), seed)


def judge(task: Task, problem: Problem, text: str) -> tuple[str | None, bool]:
    """The answer that a completion gives, and whether it is right.

    Raises ValueError, naming the task and the problem, where the task's own code raises: a verifier
    that breaks is a fault to mend, not a wrong answer. So is one that finds right what has no
    answer: pass@k would count it, and votes could not.
    """
    try:
        given, right = task.answer(text), bool(task.verify(problem, text))
        if not isinstance(given, str | None):
            raise TypeError(f"answer() gives {given!r}, which is neither text nor None")
        if right and given is None:
            raise ValueError("verify() finds it right and answer() finds none, which votes need")
        return given, right
    except Exception as error:
        raise ValueError(
            f"{task.name}: its verifier failed on {text[:80]!r} for the problem "
            f"{problem.prompt[:80]!r} ({said(error)})"
        ) from error


def said(error: Exception) -> str:
    """An error in words, its kind first."""
    return f"{type(error).__name__}: {error}"


def check_ask(task: str, split: str, count: int) -> None:
    """Raise ValueError for an unknown split or a negative count of problems."""
    if split not in SPLITS:
        raise ValueError(f"{task}: unknown split {split!r}; known: {', '.join(SPLITS)}")
    if count < 0:
        raise ValueError(f"{task}: count is {count}; it must be 0 or more")


def check_budget(task: str, budget: int | None) -> None:
    """Raise ValueError for a negative number of steps; None is all of them."""
    if budget is not None and budget < 0:
        raise ValueError(f"{task}: budget is {budget}; it must be 0 or more")


def check_range(task: str, field: str, bounds: tuple[int, int], least: int) -> None:
    """Raise ValueError unless bounds is (low, high), whole numbers with least <= low <= high."""
    pair = isinstance(bounds, tuple | list) and [type(bound) for bound in bounds] == [int, int]
    if not pair or not least <= bounds[0] <= bounds[1]:
        raise ValueError(
            f"{task}: {field} is {bounds!r}; it must be (low, high), whole numbers with "
            f"{least} <= low <= high"
        )


class WorkedTask(ABC):
    """What the built-in tasks share: splits, draws, budgets and votes.

    A task says how a statement (the bare problem: a tuple) is drawn, written down and worked out
    in steps. cue is the character of the alphabet that takes a thought up again: behind it the
    problem is worked from the beginning; no trace holds it. A task without one is trained without
    retries.
    """

    name: str
    alphabet: str
    step_end: str = ""  # the text behind every step of a trace, where there is one
    cue: str

    @abstractmethod
    def draw(self, rng: random.Random) -> tuple | None:
        """A random statement; None where the attempt gave none."""

    @abstractmethod
    def every(self) -> Iterable[tuple]:
        """Every statement that `draw` can give; repeats are allowed."""

    @abstractmethod
    def prompt(self, statement: tuple) -> str:
        """The statement as text: two statements are the same where this is."""

    @abstractmethod
    def solve(self, statement: tuple) -> Problem: ...

    @abstractmethod
    def steps(self, problem: Problem) -> Iterable[str]:
        """The texts of the trace's steps, in order."""

    @abstractmethod
    def answer(self, text: str) -> str | None:
        """The canonical answer that a completion gives; None where it gives none."""

    def slip(self, problem: Problem, rng: random.Random) -> str:
        """An attempt at the trace in which a step goes wrong, as a model's may: never the trace.
        Only a task that has a cue is asked for one."""
        raise NotImplementedError(f"{self.name} has no wrong attempts to show")

    def key(self, statement: tuple) -> str:
        """What decides the split: equal for statements that are the same problem in substance."""
        return self.prompt(statement)

    def statements(self, split: str, count: int, seed: int) -> Iterator[tuple]:
        """The statements of `problems`, one by one; the same errors as `problems`."""
        check_ask(self.name, split, count)
        rng = random.Random(f"{self.name}/{split}/{seed}")
        seen: set[str] = set()
        misses = found = 0
        while found < count and misses < PATIENCE:
            statement = self.draw(rng)
            if statement is None or split_of(self.key(statement)) != split:
                misses += 1
                continue
            if split != "train":
                prompt = self.prompt(statement)
                if prompt in seen:
                    misses += 1
                    continue
                seen.add(prompt)
            misses = 0
            found += 1
            yield statement
        if found < count:
            yield from self._remaining(split, count - found, seen, rng)

    def _remaining(
        self, split: str, count: int, seen: set[str], rng: random.Random
    ) -> Iterator[tuple]:
        """The split's statements that are not in seen, shuffled; train repeats them at will."""
        every = {self.prompt(statement): statement for statement in self.every()}
        rest = [
            statement
            for prompt, statement in sorted(every.items())
            if prompt not in seen and split_of(self.key(statement)) == split
        ]
        if split == "train" and rest:
            yield from rng.choices(rest, k=count)
            return
        if len(rest) < count:
            held, asked = len(seen) + len(rest), len(seen) + count
            raise TooFew(
                f"{self.name}: {split} holds {held} distinct problems with these settings; {asked} "
                "were asked for",
                held,
            )
        rng.shuffle(rest)
        yield from rest[:count]

    def problems(self, split: str, count: int, seed: int) -> list[Problem]:
        """count random problems of a split ("train", "val" or "test").

        They depend on (split, seed) alone and a longer list begins with the shorter one. The
        splits are disjoint, whatever the seeds. Those of val and test are distinct; train may
        repeat. Raises ValueError for an unknown split or a negative count, TooFew where val or test
        holds fewer than count problems.
        """
        return [self.solve(statement) for statement in self.statements(split, count, seed)]

    def trace(self, problem: Problem, budget: int | None = None) -> str:
        """The worked chain of thought, cut after budget steps where given (0 gives "").

        Raises ValueError for a negative budget.
        """
        check_budget(self.name, budget)
        return "".join(islice(self.steps(problem), budget))

    def verify(self, problem: Problem, text: str) -> bool:
        """Whether a completion's answer is right. Any string is allowed."""
        return self.answer(text) == problem.answer
