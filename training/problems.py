"""Tasks as training data: problems with worked chains of thought, drawn anew for every step."""

import random
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch

from .. import tasks
from .batch import IGNORE, Batch
from .config import TrainConfig
from .tokenizer import Vocabulary

VALIDATION_PROBLEMS = 1024
ATTEMPTS = 3  # before the last one, in a thought with retries, at most
LEARN_PROBLEMS = 4096  # for a tokenizer to learn from


class Problems:
    """A task (a `Corpus`)."""

    def __init__(self, config: TrainConfig, name: str):
        self.name, self.task = f"task:{name}", tasks.get(name)
        self.alphabet: str = self.task.alphabet
        self.identity = [self.name, self.alphabet]

    def thinks(self) -> bool:
        return True

    def texts(self) -> Iterator[str]:
        yield self.alphabet
        for problem in self.task.problems("train", LEARN_PROBLEMS, 0):
            yield from (problem.prompt, self.task.trace(problem), problem.answer)

    def source(self, config: TrainConfig, vocabulary: Vocabulary) -> "ProblemRows":
        return ProblemRows(self, config, vocabulary)


class ProblemRows:
    """A row is `prompt<think>trace</think>answer<eos>`; the loss is on what follows `<think>`.

    A fraction of the traces is whole, the rest is cut after a random number of steps, so that at
    inference a forced `</think>` is nothing new. The `</think>` of a cut trace is no target: it is
    forced, and a model that learned to write it would stop thinking at random.

    With `retries` a thought may be several attempts, the cue between them, the last one right. A
    wrong one is no target, but the cue behind it is: the model learns to notice. The cue behind a
    right one is forced, and no target. Source: Ye et al. 2024, "Physics of Language Models: Part
    2.2, How to Learn From Mistakes on Grade-School Math Problems" (retry data).
    """

    def __init__(self, corpus: Problems, config: TrainConfig, vocabulary: Vocabulary):
        self.name, self.task = corpus.name, corpus.task
        self.config, self.vocabulary = config, vocabulary
        self.fingerprint = corpus.identity
        self.think, self.end_think = vocabulary.id("<think>"), vocabulary.id("</think>")
        self.eos = vocabulary.id(vocabulary.eos)
        self.cue = self._cue() if config.retries else None

    def _cue(self) -> int:
        """The token that takes a thought up again; ValueError where there is none."""
        cue = getattr(self.task, "cue", None)
        if cue is None:
            raise ValueError(
                f"retries is {self.config.retries}; {self.task.name} has no wrong attempts to show"
            )
        return self.vocabulary.id(cue)

    def __str__(self) -> str:
        return f"{self.name}: new problems at every step"

    def rows(self, step: int, start: int, count: int) -> Batch:
        return self._rows("train", count, f"{self.config.seed}/{step}")

    def validation(self) -> Iterator[Batch]:
        yield self._rows("val", VALIDATION_PROBLEMS, "0")

    def _rows(self, split: str, count: int, key: str) -> Batch:
        draw = random.Random(f"{split}/{key}")
        texts, forced, attempts = [], [], []
        # A small task may hold out fewer than are asked for.
        drawn = partial(tasks.at_most, self.task) if split == "val" else self.task.problems
        for problem in drawn(split, count, draw.getrandbits(62)):
            trace = whole = self.task.trace(problem)
            if draw.random() >= self.config.full_traces:
                trace = self.task.trace(problem, draw.randint(0, problem.difficulty))
            wrong = []
            if self.cue is not None and draw.random() < self.config.retries:
                trace, wrong = self._attempts(problem, whole, draw)
            attempts.append(wrong)
            forced.append(trace != whole and not wrong)
            end = self.vocabulary.eos
            texts.append(f"{problem.prompt}<think>{trace}</think>{problem.answer}{end}")
        # One call for the whole batch: a call costs more than the characters.
        tokenizer = self.vocabulary.tokenizer
        flat = np.array(tokenizer.encode("".join(texts), add_special_tokens=False).ids)
        rows = np.split(flat, np.flatnonzero(flat == self.eos)[:-1] + 1)
        prefix = self.vocabulary.prefix
        rows = [np.concatenate([prefix, row]) for row in rows] if prefix else rows
        width = max(map(len, rows)) - 1
        if width > self.config.context:
            raise ValueError(
                f"an example of {self.task.name} has {width} tokens; context is "
                f"{self.config.context}, so set it to at least {width}"
            )
        width = -(-width // 8) * 8  # few distinct shapes
        tokens = np.full((len(rows), width), self.eos)
        targets = np.full((len(rows), width), IGNORE)
        for i, row in enumerate(rows):
            start = int(np.flatnonzero(row == self.think)[0])
            tokens[i, : len(row) - 1] = row[:-1]
            targets[i, start : len(row) - 1] = row[start + 1 :]
        targets[np.array(forced)[:, None] & (targets == self.end_think)] = IGNORE
        for row, target, wrong in zip(tokens, targets, attempts, strict=True):
            if wrong:
                self._hide(row, target, wrong)
        return Batch(torch.from_numpy(tokens), torch.from_numpy(targets))

    def _attempts(
        self, problem: tasks.Problem, whole: str, draw: random.Random
    ) -> tuple[str, list[bool]]:
        """A thought of several attempts, as many as the context has room for, and which of those
        before the last are wrong."""
        task: Any = self.task
        wrong = [draw.random() < 0.5 for _ in range(draw.randint(1, ATTEMPTS))]
        texts = [task.slip(problem, draw) if w else whole for w in wrong]
        # At most a token a character, and <think>, </think> and <eos>.
        room = self.config.context - len(problem.prompt + whole + problem.answer) - 3
        room -= len(self.vocabulary.prefix)
        while texts and sum(map(len, texts)) + len(texts) > room:
            texts.pop()
        return task.cue.join([*texts, whole]), wrong[: len(texts)]

    def _hide(self, row: np.ndarray, target: np.ndarray, wrong: list[bool]) -> None:
        """Takes wrong attempts, and the cues behind right ones, out of the targets."""
        start = int(np.flatnonzero(row == self.think)[0])
        cues = start + np.flatnonzero(row[start:] == self.cue)
        if len(cues) != len(wrong):
            raise ValueError(
                f"retries is {self.config.retries}; the tokenizer joins the cue with its "
                "neighbours: take --tokenizer char"
            )
        for cue, is_wrong in zip(cues, wrong, strict=True):
            # target[i] is the token behind row[i]: the cue itself is target[cue - 1].
            if is_wrong:
                target[start : cue - 1] = IGNORE
            else:
                target[cue - 1] = IGNORE
            start = cue
