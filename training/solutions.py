"""Solutions with labels, which a verifier learns from: a sweep's samples, or a solver's traces.

What the labels are, `config.verifier` says:

- outcome: whether the solution is right, at its last token. Cobbe et al. 2021, "Training Verifiers
  to Solve Math Word Problems" (its solution-level verifier).
- value: the same at every token of it, so that the beginning of a solution has a value too: how
  likely it ends well (its token-level verifier, which generalized better there).
- process: at the end of each step, whether that step was right, by the task's own solver, and at a
  sample's last token whether all of it is. Lightman et al. 2023, "Let's Verify Step by Step".

Samples are held out by problem.
"""

import json
import random
import re
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing
from functools import cached_property, lru_cache, partial
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from .. import tasks
from ..models.verifier import Reading, encode_solutions, places_of_steps, step_ends
from .batch import IGNORE, Batch, Epochs, padded
from .cache import digest
from .config import TrainConfig
from .tokenizer import Vocabulary

HELD_OUT = 0.1  # of the problems
HELD_OUT_SOLUTIONS = 4096  # at most so many of them are evaluated
VALIDATION_PROBLEMS = 1024
THOUGHT_TAGS = re.compile("</?think>")
BATCH = 64  # rows of a validation batch, about


class Solution(NamedTuple):
    """A stored sample, judged."""

    prompt: str
    text: str
    whole: bool
    """whether it came to its end, or was cut"""
    right: bool


def read_samples(path: Path) -> tuple[dict[str, Any], list[Solution]]:
    """Whose samples a sweep's store holds, and all of them; ValueError for what is no store."""
    if path.is_dir():
        path = path / "sweep" / "samples.sqlite"
    if not path.is_file():
        raise ValueError(f"there is no sample store {path}; ponder sweep leaves one")
    try:
        with closing(sqlite3.connect(path, timeout=60)) as db:
            identity = dict(db.execute("SELECT name, value FROM identity"))
            rows = db.execute(
                "SELECT prompt, text, finish, correct FROM sample JOIN problem"
                " ON problem.id = problem ORDER BY params, seed, budget, problem, sample"
            ).fetchall()
    except sqlite3.DatabaseError as error:
        raise ValueError(f"{path} is not a sample store ({error})") from None
    known = {name: json.loads(value) for name, value in identity.items()}
    return known, [Solution(p, t, f == "stop", bool(c)) for p, t, f, c in rows]


class Solutions:
    """The samples that a sweep stored (a `Corpus`)."""

    def __init__(self, config: TrainConfig, name: str, place: str):
        assert config.verifier is not None
        self.name = name
        self.kind: Literal["outcome", "value", "process"] = config.verifier
        about, self.solutions = read_samples(Path(place))
        if about.get("split", "test") == "test":
            raise ValueError(
                f"{name} holds samples of the test split, which a verifier must not learn from: "
                "sample others with ponder sweep --split train"
            )
        if not self.solutions:
            raise ValueError(f"{name} holds no samples: run the sweep first")
        task = about.get("task", "")
        # No file is run because a store names it.
        self.task = None if tasks.OWN.fullmatch(task) else tasks.get(task)
        if self.kind == "process":
            if self.task is None:
                raise ValueError(
                    f"verifier is process, and {name} holds samples of the task {task}, whose file "
                    "would be run as a store names it; outcome and value need no task"
                )
            solver(self.task)
        self.identity = [name, digest(self.solutions)]

    @property
    def alphabet(self) -> str | None:
        return None if self.task is None else self.task.alphabet

    def thinks(self) -> bool:
        return True

    def texts(self) -> Iterator[str]:
        for solution in self.solutions:
            yield from (solution.prompt, *THOUGHT_TAGS.split(solution.text))

    def source(self, config: TrainConfig, vocabulary: Vocabulary) -> "SolutionRows":
        return SolutionRows(self, config, vocabulary)


def solver(task: tasks.Task) -> Any:
    """The task, if it can tell the right steps; ValueError where it cannot."""
    if not hasattr(task, "step_labels"):
        raise ValueError(
            f"verifier is process, and {task.name} cannot judge steps (countdown can); outcome and "
            "value need no more than whole solutions"
        )
    return task


class Labels:
    """Writes targets beside the tokens of solutions."""

    def __init__(self, reading: Reading, task: tasks.Task | None, vocabulary: Vocabulary):
        self.reading, self.task, self.vocabulary = reading, task, vocabulary
        self.end, self.close = vocabulary.id(vocabulary.eos), vocabulary.id("</think>")
        self.step_ends = step_ends(vocabulary.tokenizer, reading.step_end)
        self.of_steps = lru_cache(1 << 14)(self._of_steps)

    def _of_steps(self, prompt: str, trace: str) -> list[bool]:
        assert self.task is not None
        task = solver(self.task)
        return task.step_labels(task.read(prompt), trace)

    def write(self, solutions: Sequence[Solution]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Tokens and targets (T,) of each: 0 or 1, IGNORE where there is no label."""
        texts = [(s.prompt, s.text, self.end if s.whole else None) for s in solutions]
        written = []
        for solution, (ids, start) in zip(
            solutions, encode_solutions(self.vocabulary.tokenizer, texts), strict=True
        ):
            tokens = np.array(ids, np.int32)
            targets = np.full(len(ids), IGNORE, np.int8)
            if self.reading.labels == "process":
                places = places_of_steps(ids, start, self.step_ends, self.close)
                # A token may hold the ends of several steps: it is labelled as the last of them.
                numbers = np.cumsum([self.step_ends[ids[place]] for place in places], dtype=int) - 1
                labels = self.of_steps(solution.prompt, _trace(solution.text))
                targets[places] = np.array(labels, dtype=int)[numbers]
            if self.reading.labels == "value":
                targets[start:] = solution.right
            elif self.reading.end:
                targets[-1] = solution.right
            written.append((tokens, targets))
        return written


def _trace(text: str) -> str:
    return text.removeprefix("<think>").partition("</think>")[0]


class SolutionRows:
    """Stored samples in an order of their own for every epoch (a `Source`)."""

    def __init__(self, corpus: Solutions, config: TrainConfig, vocabulary: Vocabulary):
        self.name, self.config = corpus.name, config
        self.reading = Reading(corpus.kind, getattr(corpus.task, "step_end", ""))
        labels = Labels(self.reading, corpus.task, vocabulary)
        self.pad = vocabulary.id(vocabulary.eos)
        train, groups = held_out(corpus.solutions)
        self.train = labels.write(train)
        self.held_out = [labels.write(group) for group in groups]
        self.fingerprint = [corpus.identity[1], corpus.kind]
        longest = max(len(ids) for ids, _ in chain(self.train, *self.held_out))
        if longest > config.context:
            raise ValueError(
                f"a solution has {longest} tokens; context is {config.context}, so set it to at "
                f"least {longest}"
            )
        self.problems = len({s.prompt for s in train}), len(groups)
        targets = np.concatenate([goal for _, goal in self.train])
        self.share = float((targets == 1).sum() / (targets != IGNORE).sum())
        if self.share in (0.0, 1.0):
            verdict = "right" if self.share else "wrong"
            raise ValueError(
                f"{self.name}: everything that a verifier could learn from is {verdict}; it needs "
                "right and wrong solutions"
            )
        self.epochs = Epochs(len(self.train), config.seed)

    def rows(self, step: int, start: int, count: int) -> Batch:
        rows, _ = self.epochs.rows(start, count)
        return padded([self.train[row] for row in rows], self.config.context, self.pad)

    def validation(self) -> Iterator[Batch]:
        """Whole problems in each batch, and at least two batches: a calibration is fitted on every
        second one and measured on the others."""
        size = min(BATCH, -(-sum(map(len, self.held_out)) // 4))
        rows = []
        for number, group in enumerate(self.held_out, 1):
            rows += group
            if len(rows) >= size or number == len(self.held_out):
                yield padded(rows, self.config.context, self.pad)
                rows = []

    def __str__(self) -> str:
        train, held_out = self.problems
        count = sum(map(len, self.held_out))
        return (
            f"{self.name}: {len(self.train):,} solutions of {train:,} problems to learn from, "
            f"{self.share:.0%} of their labels right; {count:,} of {held_out:,} "
            "problems held out"
        )


def held_out(solutions: Sequence[Solution]) -> tuple[list[Solution], list[list[Solution]]]:
    """The solutions to learn from, and those of the problems that are held out, by problem.

    A tenth of the problems, one at least, those whose prompts' hashes are the smallest. ValueError
    for fewer than three problems.
    """
    prompts = sorted({s.prompt for s in solutions}, key=lambda p: blake2b(p.encode()).digest())
    if len(prompts) < 3:
        raise ValueError(
            f"there are samples of {len(prompts)} problem{'s' * (len(prompts) > 1)}; a verifier "
            "needs 3 at least, of which two are held out"
        )
    of: dict[str, list[Solution]] = {p: [] for p in prompts[: max(2, int(HELD_OUT * len(prompts)))]}
    train = []
    for solution in solutions:
        of.get(solution.prompt, train).append(solution)
    groups, count = [], 0
    for group in of.values():
        if count < HELD_OUT_SOLUTIONS:
            groups.append(group)
            count += len(group)
    return train, groups


def reading(sources: Sequence[Any]) -> Reading:
    """What the sources' labels together say of the verifier; ValueError where they disagree."""
    readings = [source.reading for source in sources]
    kinds = sorted({(r.labels, r.step_end) for r in readings})
    if len(kinds) > 1:
        raise ValueError(
            f"the data end their steps with {' and '.join(repr(end) for _, end in kinds)}; a "
            "verifier reads one kind of steps"
        )
    return Reading(*kinds[0], end=any(r.end for r in readings))


class SolverTraces:
    """A task whose solver judges the steps of its own traces (a `Corpus`)."""

    def __init__(self, config: TrainConfig, name: str):
        self.name, self.task = f"task:{name}", solver(tasks.get(name))
        self.alphabet: str = self.task.alphabet
        content = tasks.content_of(self.task)
        self.identity = [self.name, self.alphabet, "steps", *([content] if content else [])]

    def thinks(self) -> bool:
        return True

    def texts(self) -> Iterator[str]:
        yield self.alphabet

    def source(self, config: TrainConfig, vocabulary: Vocabulary) -> "TraceRows":
        return TraceRows(self, config, vocabulary)


class TraceRows:
    """Problems drawn anew for every step, with the solver's trace, each step labelled by whether
    the goal can still be reached; the end, which is always right, is not labelled."""

    def __init__(self, corpus: SolverTraces, config: TrainConfig, vocabulary: Vocabulary):
        self.name, self.task, self.config = corpus.name, corpus.task, config
        self.reading = Reading("process", self.task.step_end, end=False)
        self.labels = Labels(self.reading, self.task, vocabulary)
        self.pad = vocabulary.id(vocabulary.eos)
        self.fingerprint = corpus.identity

    def __str__(self) -> str:
        return f"{self.name}: a solver's steps, new problems at every step"

    def rows(self, step: int, start: int, count: int) -> Batch:
        rows = self._drawn("train", count, f"{self.config.seed}/{step}")
        return padded(rows, self.config.context, self.pad)

    @cached_property
    def held_out(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Tokens and targets (T,) of what is validated on, drawn once."""
        return self._drawn("val", VALIDATION_PROBLEMS, "0")

    def validation(self) -> Iterator[Batch]:
        for first in range(0, len(self.held_out), BATCH):
            rows = self.held_out[first : first + BATCH]
            yield padded(rows, self.config.context, self.pad)

    def _drawn(self, split: str, count: int, key: str) -> list[tuple[np.ndarray, np.ndarray]]:
        draw = random.Random(f"{split}/{key}")
        drawn = partial(tasks.at_most, self.task) if split == "val" else self.task.problems
        problems = drawn(split, count, draw.getrandbits(62))
        solutions = [
            Solution(p.prompt, f"<think>{self.task.trace(p)}</think>{p.answer}", True, True)
            for p in problems
        ]
        # A value knows only what is before it, so a trace may be cut.
        context = self.config.context
        return [(ids[:context], goal[:context]) for ids, goal in self.labels.write(solutions)]
