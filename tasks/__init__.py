"""Problems with exact verifiers and worked chains of thought.

A completion reads `<think>` trace `</think>` answer. A trace is a run of steps, a step being the
unit that budgets count; a problem's difficulty is the number of steps that its whole trace takes.
Texts are plain characters of the task's alphabet; the special tokens are not among them.
"""

import random
import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from importlib.util import module_from_spec, spec_from_file_location
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

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
        """Whether a completion is right: any string is allowed."""
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
        raise ValueError(f"{task.name}: problems() failed ({_said(error)})") from error
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
    that breaks is a fault to mend, not a wrong answer.
    """
    try:
        given, right = task.answer(text), bool(task.verify(problem, text))
        if not isinstance(given, str | None):
            raise TypeError(f"answer() gives {given!r}, which is neither text nor None")
        return given, right
    except Exception as error:
        raise ValueError(
            f"{task.name}: its verifier failed on {text[:80]!r} for the problem "
            f"{problem.prompt[:80]!r} ({_said(error)})"
        ) from error


def _said(error: Exception) -> str:
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


def _tasks() -> dict[str, type[WorkedTask]]:
    # Imported here because the tasks build on the definitions above.
    from .countdown import Countdown
    from .last_digit import LastDigit
    from .multiply import Multiply
    from .permute import Permute

    return {task.name: task for task in (LastDigit, Permute, Multiply, Countdown)}


def names() -> list[str]:
    """The names that `get` knows, besides gym:NAME."""
    from .word_problems import SOURCES

    return [*_tasks(), *SOURCES]


def _settings(name: str, text: str) -> dict[str, Any]:
    """The settings in a task's name: whole numbers, LOW-HIGH for a range, or words."""
    settings: dict[str, Any] = {}
    for part in filter(None, text.split(",")):
        field, equals, value = part.partition("=")
        if not (field and equals and value):
            raise ValueError(
                f"task {name!r}: {part!r} is no setting; say NAME:SETTING=VALUE,… and a range as "
                "LOW-HIGH"
            )
        numbers = [int(n) for n in value.split("-") if n.isdecimal()]
        whole = "-".join(map(str, numbers)) == value
        settings[field] = (tuple(numbers) if len(numbers) > 1 else numbers[0]) if whole else value
    return settings


MEMBERS = ("name", "alphabet", "problems", "trace", "verify", "answer")  # of a Task
OWN = re.compile(r"(?P<file>.+\.py):(?P<kind>\w+)(?::(?P<rest>.*))?")


def _own(file: str, kind: str) -> type[Any]:
    """The class of a user's own file, whose code runs. Its `code` is a digest of the file, so that
    no run goes on with a task that has changed."""
    path = Path(file)
    if not path.is_file():
        raise ValueError(f"task {file}:{kind}: there is no file {file}")
    spec = spec_from_file_location(f"task {path.resolve()}", path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = module_from_spec(spec)  # where dataclasses look
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"{file} does not run ({_said(error)})") from error
    found = getattr(module, kind, None)
    if not isinstance(found, type):
        classes = [n for n, c in vars(module).items() if getattr(c, "__module__", "") == spec.name]
        raise ValueError(f"{file} has no class {kind}; it has {', '.join(classes) or 'none'}")
    found.code = blake2b(path.read_bytes(), digest_size=8).hexdigest()
    if not hasattr(found, "content"):  # which training asks for
        found.content = found.code
    return found


def get(name: str, **settings: Any) -> Task:
    """The task of that name.

    Settings are the fields of a task's class, such as operands=(3, 8); the name may carry them:
    `multiply:digits=3-3`, `countdown:traces=path,size=3`. `gsm8k:PATH` is a data set from outside
    read from a local file, `gym:NAME` a task of reasoning-gym, `FILE.py:CLASS` a class of one's
    own, whose file is run. Raises ValueError for a name, a setting or a value that is not known.
    """
    from .gym import Gym
    from .word_problems import SOURCES, WordProblems

    kind, _, rest = name.partition(":")
    made, own = _tasks().get(kind), OWN.fullmatch(name)
    if own:
        made, rest = _own(own["file"], own["kind"]), own["rest"] or ""
        kind = f"{own['file']}:{own['kind']}"
    if made:
        settings = _settings(name, rest) | settings
        name = kind
    elif not (kind in SOURCES or (kind == "gym" and rest)):
        known = ", ".join([*names(), "gym:NAME", "FILE.py:CLASS"])
        raise ValueError(f"unknown task {name!r}; known: {known}")
    fields = list(getattr(made, "__dataclass_fields__", ()))
    for setting in settings:
        if setting not in fields:
            known = f"known: {', '.join(fields)}" if fields else "it has none"
            raise ValueError(f"{name}: unknown setting {setting!r}; {known}")
    if made is None:
        return Gym(rest) if kind == "gym" else WordProblems(kind, rest or None)
    try:
        task = made(**settings)
    except TypeError as error:  # abstract, or with fields that have no default
        raise ValueError(f"{name}: {error}") from error
    if lacking := [member for member in MEMBERS if own and not hasattr(task, member)]:
        raise ValueError(f"{name} is no task: it has no {', '.join(lacking)}")
    return task
