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
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing
from functools import cached_property, lru_cache, partial
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from .. import tasks
from ..models.verifier import Reading, encode_solutions, places_of_steps, step_ends
from .batch import IGNORE, Batch
from .cache import digest
from .config import TrainConfig
from .tokenizer import Vocabulary

HELD_OUT = 0.1  # of the problems
HELD_OUT_SOLUTIONS = 4096  # at most so many of them are evaluated
VALIDATION_PROBLEMS = 1024
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
        if tasks.OWN.fullmatch(about.get("task", "")):
            raise ValueError(
                f"{name} holds samples of the task {about['task']}, whose file would be run as "
                "a store names it; verifiers learn from ponder's own tasks alone"
            )
        self.task = tasks.get(about.get("task", ""))
        if self.kind == "process":
            solver(self.task)
        self.identity = [name, digest(self.solutions)]

    @property
    def alphabet(self) -> str | None:
        return self.task.alphabet

    def thinks(self) -> bool:
        return True

    def texts(self) -> Iterator[str]:
        for solution in self.solutions:
            yield from (solution.prompt, solution.text)

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

    def __init__(self, reading: Reading, task: tasks.Task, vocabulary: Vocabulary):
        self.reading, self.task, self.vocabulary = reading, task, vocabulary
        self.end, self.close = vocabulary.id(vocabulary.eos), vocabulary.id("</think>")
        self.step_ends = step_ends(vocabulary.tokenizer, reading.step_end)
        self.of_steps = lru_cache(1 << 14)(self._of_steps)

    def _of_steps(self, prompt: str, trace: str) -> list[bool]:
        task = solver(self.task)
        return task.step_labels(task.read(prompt), trace)

    def write(self, solutions: Sequence[Solution]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Tokens and targets (T,) of each: 0 or 1, IGNORE where there is no label."""
        texts = [(s.prompt, s.text, self.end if s.whole else None) for s in solutions]
        written = []
        for solution, (ids, start) in zip(
            solutions, encode_solutions(self.vocabulary.tokenizer, texts), strict=True
        ):
            tokens = np.array(ids)
            targets = np.full(len(ids), IGNORE)
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


class Flat:
    """Tokens and targets of many solutions, end to end."""

    def __init__(
        self,
        written: Sequence[tuple[np.ndarray, np.ndarray]],
        context: int,
        pad: int,
        *,
        cut: bool = False,
    ):
        """cut: what the context does not hold is left out, instead of a ValueError."""
        if cut:
            written = [(tokens[:context], targets[:context]) for tokens, targets in written]
        lengths = [len(tokens) for tokens, _ in written]
        if max(lengths, default=0) > context:
            raise ValueError(
                f"a solution has {max(lengths)} tokens; context is {context}, so set it to at "
                f"least {max(lengths)}"
            )
        self.context, self.pad = context, pad
        self.ends = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        self.tokens = _joined([tokens for tokens, _ in written], np.int32)
        self.targets = _joined([targets for _, targets in written], np.int8)

    def __len__(self) -> int:
        return len(self.ends) - 1

    def batch(self, rows: Sequence[int]) -> Batch:
        """These rows, padded to a multiple of 8 tokens, or to the context."""
        spans = [slice(self.ends[row], self.ends[row + 1]) for row in rows]
        width = max(span.stop - span.start for span in spans)
        width = min(self.context, -(-width // 8) * 8)  # few distinct shapes
        tokens = np.full((len(spans), width), self.pad, dtype=np.int64)
        targets = np.full((len(spans), width), IGNORE, dtype=np.int64)
        for i, span in enumerate(spans):
            n = span.stop - span.start
            tokens[i, :n], targets[i, :n] = self.tokens[span], self.targets[span]
        return Batch(torch.from_numpy(tokens), torch.from_numpy(targets))


def _joined(parts: list[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate(parts).astype(dtype) if parts else np.zeros(0, dtype)


class SolutionRows:
    """Stored samples in an order of their own for every epoch (a `Source`)."""

    def __init__(self, corpus: Solutions, config: TrainConfig, vocabulary: Vocabulary):
        self.name, self.config = corpus.name, config
        self.reading = Reading(corpus.kind, getattr(corpus.task, "step_end", ""))
        labels = Labels(self.reading, corpus.task, vocabulary)
        pad = vocabulary.id(vocabulary.eos)
        train, groups = held_out(corpus.solutions)
        self.train = Flat(labels.write(train), config.context, pad)
        self.fingerprint = [corpus.identity[1], corpus.kind]
        chosen = [solution for group in groups for solution in group]
        self.held_out = Flat(labels.write(chosen), config.context, pad)
        self.groups = [len(group) for group in groups]
        self.problems = len({s.prompt for s in train}), len(groups)
        targets = self.train.targets
        self.share = float((targets == 1).sum() / (targets != IGNORE).sum())
        if self.share in (0.0, 1.0):
            verdict = "right" if self.share else "wrong"
            raise ValueError(
                f"{self.name}: everything that a verifier could learn from is {verdict}; it needs "
                "right and wrong solutions"
            )
        self.order = lru_cache(2)(self._order)  # a batch may span two epochs

    def _order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.config.seed, epoch]).permutation(len(self.train))

    def rows(self, step: int, start: int, count: int) -> Batch:
        epochs, places = np.divmod(np.arange(start, start + count), len(self.train))
        pairs = zip(epochs.tolist(), places.tolist(), strict=True)
        return self.train.batch([int(self.order(epoch)[place]) for epoch, place in pairs])

    def validation(self) -> Iterator[Batch]:
        """Whole problems in each batch, and at least two batches: a calibration is fitted on every
        second one and measured on the others."""
        size = min(BATCH, -(-len(self.held_out) // 4))
        first = last = 0
        for group in self.groups:
            last += group
            if last - first >= size:
                yield self.held_out.batch(range(first, last))
                first = last
        if last > first:
            yield self.held_out.batch(range(first, last))

    def __str__(self) -> str:
        train, held_out = self.problems
        return (
            f"{self.name}: {len(self.train):,} solutions of {train:,} problems to learn from, "
            f"{self.share:.0%} of their labels right; {len(self.held_out):,} of {held_out:,} "
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
        self.identity = [self.name, self.alphabet, "steps"]

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
        return self._rows("train", count, f"{self.config.seed}/{step}")

    @cached_property
    def held_out(self) -> Flat:
        """What is validated on, drawn once."""
        return self._flat("val", VALIDATION_PROBLEMS, "0")

    def validation(self) -> Iterator[Batch]:
        every = self.held_out
        for first in range(0, len(every), BATCH):
            yield every.batch(range(first, min(first + BATCH, len(every))))

    def _rows(self, split: str, count: int, key: str) -> Batch:
        return self._flat(split, count, key).batch(range(count))

    def _flat(self, split: str, count: int, key: str) -> Flat:
        draw = random.Random(f"{split}/{key}")
        drawn = partial(tasks.at_most, self.task) if split == "val" else self.task.problems
        problems = drawn(split, count, draw.getrandbits(62))
        solutions = [
            Solution(p.prompt, f"<think>{self.task.trace(p)}</think>{p.answer}", True, True)
            for p in problems
        ]
        # A value knows only what is before it, so a trace may be cut.
        return Flat(self.labels.write(solutions), self.config.context, self.pad, cut=True)
