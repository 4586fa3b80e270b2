"""Documents packed into rows of a fixed context: whole where they fit, cut where they must be."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from .batch import IGNORE, Batch

Ints = NDArray[np.int64]


class Pieces(NamedTuple):
    """Parts of documents: `length` tokens from `start` on, each to predict its successor."""

    start: Ints
    length: Ints


def cut(offsets: Ints, context: int) -> tuple[Pieces, Ints]:
    """Documents in pieces of at most `context` tokens to predict from, and each one's document.

    Document d is the tokens offsets[d] to offsets[d + 1] of one long array. Every token but a
    document's first is predicted by exactly one piece.
    """
    slots = np.diff(offsets) - 1
    count = -(-slots // context)
    document = np.repeat(np.arange(len(slots)), count)
    number = np.arange(len(document)) - np.repeat(np.cumsum(count) - count, count)
    start = offsets[document] + number * context
    length = np.minimum(context, slots[document] - number * context)
    return Pieces(start, length), document


def best_fit(lengths: Ints, context: int) -> Ints:
    """The row of every piece, by best-fit decreasing: each where it leaves the least room.

    Ding et al. 2024, "Fewer Truncations Improve Language Modeling".
    """
    rows_of = np.empty(len(lengths), dtype=np.int64)
    full = lengths == context
    rows = int(full.sum())
    rows_of[full] = np.arange(rows)
    order = np.argsort(-lengths, kind="stable")[rows:]
    by_room: list[list[int]] = [[] for _ in range(context)]
    rooms = 0  # bit n: there is a row with room for n tokens
    for piece, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = by_room[room].pop()
            if not by_room[room]:
                rooms ^= 1 << room
        else:
            row, room = rows, context
            rows += 1
        rows_of[piece] = row
        room -= length
        if room:
            by_room[room].append(row)
            rooms |= 1 << room
    return rows_of


def pack(folder: Path, name: str, pieces: Pieces, context: int) -> dict[str, int]:
    """Write the rows `name` into a folder; how many they are and how many tokens they hold."""
    rows_of = best_fit(pieces.length, context)
    order = np.argsort(rows_of, kind="stable")
    ends = np.cumsum(np.bincount(rows_of)) if len(rows_of) else np.zeros(0, dtype=np.int64)
    np.save(folder / f"{name}_start.npy", pieces.start[order])
    np.save(folder / f"{name}_length.npy", pieces.length[order].astype(np.int32))
    np.save(folder / f"{name}_rows.npy", np.concatenate([[0], ends]))
    return {"rows": len(ends), "tokens": int(pieces.length.sum())}


class PackedRows:
    """What `pack` wrote, as rows of tokens; everything stays on disk until a row is asked for."""

    def __init__(
        self,
        folder: Path,
        name: str,
        context: int,
        tokens: np.ndarray,
        loss: np.ndarray | None,
        pad: int,
    ):
        """tokens (N,); loss (N,) bool: which of them are targets, None: all."""
        self.start, self.length, self.ends = (
            np.load(folder / f"{name}_{part}.npy", mmap_mode="r")
            for part in ("start", "length", "rows")
        )
        self.context, self.tokens, self.loss, self.pad = context, tokens, loss, pad

    def __len__(self) -> int:
        return len(self.ends) - 1

    def batch(self, rows: Ints, shorten: "Shorten | None" = None, epochs: Ints | None = None):
        """These rows; in each the documents' ids count from 0, and the padding has the last."""
        shape = len(rows), self.context
        tokens = np.full(shape, self.pad, dtype=np.int64)
        targets = np.full(shape, IGNORE, dtype=np.int64)
        segment_ids = np.zeros(shape, dtype=np.int32)
        for i, row in enumerate(rows.tolist()):
            first, last = int(self.ends[row]), int(self.ends[row + 1])
            draw = None
            if shorten is not None and epochs is not None:
                draw = shorten.draw(int(epochs[i]), row)
            at = 0
            for segment, piece in enumerate(range(first, last)):
                start = int(self.start[piece])
                span = slice(start, start + int(self.length[piece]) + 1)
                ids = self.tokens[span].astype(np.int64)
                goal = ids[1:]
                if self.loss is not None:
                    goal = np.where(self.loss[span][1:], goal, IGNORE)
                ids = ids[:-1]
                if shorten is not None and draw is not None:
                    ids, goal = shorten(ids, goal, draw)
                end = at + len(ids)
                tokens[i, at:end], targets[i, at:end] = ids, goal
                segment_ids[i, at:end] = segment
                at = end
            segment_ids[i, at:] = last - first
        return Batch(*map(torch.from_numpy, (tokens, targets, segment_ids)))


class Shorten(NamedTuple):
    """Cuts chains of thought at random tokens, as a budget at inference does.

    The `</think>` of a chain that was cut is no target: it is forced, and a model that learned to
    write it would stop thinking at random.
    """

    think: int
    end_think: int
    whole: float  # the fraction of chains that stay as they are
    seed: int

    def draw(self, epoch: int, row: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, epoch, row])

    def __call__(
        self, ids: np.ndarray, goal: np.ndarray, draw: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        whole, place = draw.random(2)
        begin, end = np.flatnonzero(ids == self.think), np.flatnonzero(ids == self.end_think)
        # One of the two lies in another piece where a document was cut.
        if whole < self.whole or not len(begin) or not len(end):
            return ids, goal
        begin, end = int(begin[0]) + 1, int(end[0])
        stop = begin + int(place * (end - begin + 1))  # thoughts are ids[begin:stop]
        if stop >= end:
            return ids, goal
        ids = np.concatenate([ids[:stop], ids[end:]])
        goal = np.concatenate([goal[: stop - 1], [IGNORE], goal[end:]])
        return ids, goal
