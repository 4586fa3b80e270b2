"""What training data are made of: batches, the sources of their rows, and what sources are read
from."""

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from .config import TrainConfig
from .tokenizer import Vocabulary

IGNORE = -100  # a target that is no target


class Batch(NamedTuple):
    """Rows of tokens, what each is to predict, and the document that each belongs to."""

    tokens: Tensor  # (B, T) int64
    targets: Tensor  # (B, T) int64, IGNORE where there is none
    segment_ids: Tensor | None = None  # (B, T) int32; None: a row is one document

    def each(self, f: Callable[[Tensor], Tensor]) -> "Batch":
        """f of every tensor."""
        segment_ids = None if self.segment_ids is None else f(self.segment_ids)
        return Batch(f(self.tokens), f(self.targets), segment_ids)

    def lengths(self) -> Tensor:
        """(B,): each row's tokens up to its last target; what is behind it teaches nothing."""
        there = self.targets != IGNORE
        ends = torch.arange(1, there.shape[1] + 1, device=there.device)
        return torch.where(there, ends, 0).amax(1)


def padded(rows: Sequence[tuple[np.ndarray, np.ndarray]], context: int, pad: int) -> Batch:
    """Tokens and targets (T,) of each row, padded by the token `pad` to a multiple of 8, for few
    distinct shapes, or to the context, which is the most that a row may have."""
    width = min(context, -(-max(len(ids) for ids, _ in rows) // 8) * 8)
    tokens, targets = (np.full((len(rows), width), rest) for rest in (pad, IGNORE))
    for i, (ids, goal) in enumerate(rows):
        tokens[i, : len(ids)], targets[i, : len(ids)] = ids, goal
    return Batch(torch.from_numpy(tokens), torch.from_numpy(targets))


class Epochs:
    """`count` rows, each once an epoch, in an order of its own for each."""

    def __init__(self, count: int, seed: int):
        self.count = count
        self.order = lru_cache(2)(  # a batch may span two epochs
            lambda epoch: np.random.default_rng([seed, epoch]).permutation(count)
        )

    def rows(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The `count` rows that follow the first `start`, and their epochs, both (count,)."""
        epochs, places = np.divmod(np.arange(start, start + count), self.count)
        pairs = zip(epochs.tolist(), places.tolist(), strict=True)
        return np.array([self.order(epoch)[place] for epoch, place in pairs], np.int64), epochs


class Source(Protocol):
    """Rows as a function of the step: what a mixture draws from. Its str() says what it holds."""

    fingerprint: Any
    """equal for sources that give the same rows; JSON"""
    # One that repeats itself has rows_once, a float: the rows that hold all of it once. One that is
    # of no task has beginnings, which samples continue.

    def rows(self, step: int, start: int, count: int) -> Batch:
        """`count` rows for a step, before which the source has given `start`."""
        ...

    def validation(self) -> Iterator[Batch]:
        """Batches that hold every validation token once."""
        ...


class Corpus(Protocol):
    """Data before they are tokens."""

    name: str
    identity: Any
    """what its content depends on; JSON"""

    @property
    def alphabet(self) -> str | None:
        """Every character that it can hold, where that is known without reading it."""
        ...

    def thinks(self) -> bool:
        """Whether its rows hold <think> and </think>."""
        ...

    def texts(self) -> Iterator[str]:
        """What a tokenizer learns from, free of special tokens."""
        ...

    def source(self, config: TrainConfig, vocabulary: Vocabulary) -> Source: ...


def join(parts: list[Batch], pad: int) -> Batch:
    """The rows of all parts, the narrower ones padded by the token `pad`."""
    if len(parts) == 1:
        return parts[0]
    width = max(part.tokens.shape[1] for part in parts)

    def joined(tensors: list[Tensor], value: int) -> Tensor:
        wide = [torch.nn.functional.pad(x, (0, width - x.shape[1]), value=value) for x in tensors]
        return torch.cat(wide)

    segment_ids = None
    if any(part.segment_ids is not None for part in parts):
        # A row of one document needs no ids: nothing looks ahead at the padding behind it.
        one = [torch.zeros_like(part.tokens, dtype=torch.int32) for part in parts]
        ids = [
            x if p.segment_ids is None else p.segment_ids for p, x in zip(parts, one, strict=True)
        ]
        segment_ids = joined(ids, -1)
    tokens = joined([part.tokens for part in parts], pad)
    return Batch(tokens, joined([part.targets for part in parts], IGNORE), segment_ids)
