"""Tasks as training data: problems with worked chains of thought, drawn anew for every step."""

import random
from collections.abc import Iterator

import numpy as np
import torch

from .. import tasks
from .batch import IGNORE, Batch
from .config import TrainConfig
from .tokenizer import Vocabulary

VALIDATION_PROBLEMS = 1024
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
    """

    def __init__(self, corpus: Problems, config: TrainConfig, vocabulary: Vocabulary):
        self.name, self.task = corpus.name, corpus.task
        self.config, self.vocabulary = config, vocabulary
        self.fingerprint = corpus.identity
        self.think, self.end_think = vocabulary.id("<think>"), vocabulary.id("</think>")
        self.eos = vocabulary.id(vocabulary.eos)

    def __str__(self) -> str:
        return f"{self.name}: new problems at every step"

    def rows(self, step: int, start: int, count: int) -> Batch:
        return self._rows("train", count, f"{self.config.seed}/{step}")

    def validation(self) -> Iterator[Batch]:
        yield self._rows("val", VALIDATION_PROBLEMS, "0")

    def _rows(self, split: str, count: int, key: str) -> Batch:
        draw = random.Random(f"{split}/{key}")
        texts, forced = [], []
        for problem in self.task.problems(split, count, draw.getrandbits(62)):
            trace = whole = self.task.trace(problem)
            if draw.random() >= self.config.full_traces:
                trace = self.task.trace(problem, draw.randint(0, problem.difficulty))
            forced.append(trace != whole)
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
        tokens = np.full((count, width), self.eos)
        targets = np.full((count, width), IGNORE)
        for i, row in enumerate(rows):
            start = int(np.flatnonzero(row == self.think)[0])
            tokens[i, : len(row) - 1] = row[:-1]
            targets[i, start : len(row) - 1] = row[start + 1 :]
        targets[np.array(forced)[:, None] & (targets == self.end_think)] = IGNORE
        return Batch(torch.from_numpy(tokens), torch.from_numpy(targets))
