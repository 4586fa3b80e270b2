"""Data, as functions of the step: batch(step) depends on (data, seed, step) alone.

So a resumed run needs no position, no shuffling state and no random state to see what it would
have seen, and every process can take its own rows of the same batch.
"""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from .. import tasks
from .config import TrainConfig
from .tokenizer import build_tokenizer, character_tokenizer

IGNORE = -100  # a target that is no target
VALIDATION_PROBLEMS = 1024


class Batch(NamedTuple):
    """Rows of tokens, what each is to predict, and the document that each belongs to."""

    tokens: Tensor  # (B, T) int64
    targets: Tensor  # (B, T) int64, IGNORE where there is none
    segment_ids: Tensor | None = None  # (B, T) int32; None: a row is one document


class Data(Protocol):
    tokenizer: Tokenizer

    def batch(self, step: int) -> Batch:
        """The global batch of a step."""
        ...

    def validation(self) -> Iterator[Batch]:
        """Batches that hold every validation token once."""
        ...


class TaskData:
    """Problems with worked chains of thought, drawn anew for every step.

    A row is `prompt<think>trace</think>answer<eos>`; the loss is on what follows `<think>`. A
    fraction of the traces is whole, the rest is cut after a random number of steps, so that at
    inference a forced `</think>` is nothing new. The `</think>` of a cut trace is no target: it is
    forced, and a model that learned to write it would stop thinking at random.
    """

    def __init__(self, config: TrainConfig, name: str):
        self.task = tasks.get(name)
        self.tokenizer = character_tokenizer(self.task.alphabet)
        self.config = config
        self.think = self.tokenizer.token_to_id("<think>")
        self.end_think = self.tokenizer.token_to_id("</think>")
        self.eos = self.tokenizer.token_to_id("<eos>")

    def batch(self, step: int) -> Batch:
        return self._batch("train", self.config.batch_size, f"{self.config.seed}/{step}")

    def validation(self) -> Iterator[Batch]:
        yield self._batch("val", VALIDATION_PROBLEMS, "0")

    def _batch(self, split: str, count: int, key: str) -> Batch:
        draw = random.Random(f"{split}/{key}")
        texts, forced = [], []
        for problem in self.task.problems(split, count, draw.getrandbits(62)):
            trace = whole = self.task.trace(problem)
            if draw.random() >= self.config.full_traces:
                trace = self.task.trace(problem, draw.randint(0, problem.difficulty))
            forced.append(trace != whole)
            texts.append(f"{problem.prompt}<think>{trace}</think>{problem.answer}<eos>")
        # One call for the whole batch: a call costs more than the characters.
        flat = np.array(self.tokenizer.encode("".join(texts)).ids)
        rows = np.split(flat, np.flatnonzero(flat == self.eos)[:-1] + 1)
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


class TextData:
    """One long text: random windows to train on, the last part to validate, each token once."""

    def __init__(self, config: TrainConfig, train: str, validation: str):
        self.config = config
        self.tokenizer = build_tokenizer(config.tokenizer, [train, validation])
        self.train = self._encode(train)
        self.held_out = self._encode(validation)
        for name, part in (("training", self.train), ("validation", self.held_out)):
            if len(part) <= config.context:
                raise ValueError(
                    f"the {name} part of {config.data} has {len(part)} tokens; "
                    f"a context of {config.context} needs at least {config.context + 1}"
                )

    def _encode(self, text: str) -> np.ndarray:
        return np.array(self.tokenizer.encode(text).ids, dtype=np.int32)

    def batch(self, step: int) -> Batch:
        c = self.config
        draw = np.random.default_rng([c.seed, step])
        start = draw.integers(len(self.train) - c.context, size=c.batch_size)
        index = start[:, None] + np.arange(c.context + 1)
        rows = torch.from_numpy(self.train[index].astype(np.int64))
        return Batch(rows[:, :-1], rows[:, 1:])

    def validation(self) -> Iterator[Batch]:
        context = self.config.context
        count = -(-(len(self.held_out) - 1) // context)
        tokens = np.zeros(count * context, dtype=np.int64)
        targets = np.full(count * context, IGNORE, dtype=np.int64)
        tokens[: len(self.held_out) - 1] = self.held_out[:-1]
        targets[: len(self.held_out) - 1] = self.held_out[1:]
        rows = max(1, 8192 // context)
        pairs = (torch.from_numpy(a.reshape(count, context)) for a in (tokens, targets))
        yield from map(Batch, *(a.split(rows) for a in pairs))


def read_text(path: str) -> str:
    """The text of a UTF-8 file; ValueError where there is none."""
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"there is no text file {path}")
    try:
        text = file.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: byte {error.start} cannot be read") from None
    if not text.strip():
        raise ValueError(f"{path} is empty; there is nothing to train on")
    return text


def read_hub(name: str) -> tuple[str, str]:
    """The texts of a `datasets` data set, for training and for validation.

    `name` is an id or a local folder, optionally with `:COLUMN` (default: text). Documents are
    joined by `<eos>`. Where there is no validation split, the last 5 % of the documents are one.
    """
    import datasets

    name, _, column = name.partition(":")
    column = column or "text"
    try:
        loaded = datasets.load_dataset(name)
    except Exception as error:
        raise ValueError(f"datasets cannot load {name!r}: {error}") from None
    if "train" not in loaded:
        raise ValueError(f"{name} has no train split; it has {', '.join(map(str, loaded))}")
    train = loaded["train"]
    if column not in train.column_names:
        raise ValueError(
            f"{name} has no column {column!r}; it has {', '.join(train.column_names)} "
            f"(say hub:{name}:COLUMN)"
        )
    documents = list(train[column])
    if "validation" in loaded:
        held_out = list(loaded["validation"][column])
    else:
        cut = min(len(documents) - 1, round(0.95 * len(documents)))
        documents, held_out = documents[:cut], documents[cut:]
    return "<eos>".join(documents), "<eos>".join(held_out)


def load_data(config: TrainConfig) -> Data:
    """What `config.data` names: task:NAME, text:PATH or hub:NAME[:COLUMN]."""
    kind, _, name = config.data.partition(":")
    if kind == "task":
        return TaskData(config, name)
    if kind == "hub":
        return TextData(config, *read_hub(name))
    text = read_text(name)
    cut = int(0.9 * len(text))  # nanoGPT's split: the last 10 % of the characters
    return TextData(config, text[:cut], text[cut:])
