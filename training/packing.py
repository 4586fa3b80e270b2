"""Documents packed into rows of a fixed context: whole where they fit, cut where they must be."""

from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from .batch import IGNORE, Batch

Ints = NDArray[np.int64]
DENSE = 0.8  # where a batch needs more than this share of its rows, they stay as they are


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
        """These rows; in each the documents' ids count from 0, and the padding has the last.

        epochs (B,): those that the rows are drawn in, which `shorten` depends on.
        """
        # All pieces of all rows end to end, then what is left of them back into rows.
        first, last = self.ends[rows], self.ends[rows + 1]
        row = np.repeat(np.arange(len(rows)), last - first)
        number = _ramp(last - first)
        pieces = first[row] + number
        length = self.length[pieces].astype(np.int64)
        source = np.repeat(self.start[pieces], length) + _ramp(length)
        ids, goal = self.tokens[source].astype(np.int64), self.tokens[source + 1].astype(np.int64)
        if self.loss is not None:
            goal[~self.loss[source + 1]] = IGNORE
        of = np.repeat(np.arange(len(pieces)), length)
        if shorten is not None and epochs is not None:
            kept = shorten(ids, goal, of, pieces, epochs[row])
            ids, goal, of = ids[kept], goal[kept], of[kept]
        filled = np.bincount(row[of], minlength=len(rows))
        place = row[of] * self.context + _ramp(filled)
        tokens = np.full(len(rows) * self.context, self.pad, dtype=np.int64)
        targets = np.full(len(rows) * self.context, IGNORE, dtype=np.int64)
        segment_ids = np.repeat((last - first).astype(np.int32), self.context)
        tokens[place], targets[place], segment_ids[place] = ids, goal, number[of]
        arrays = (a.reshape(len(rows), self.context) for a in (tokens, targets, segment_ids))
        return Batch(*map(torch.from_numpy, arrays))


def compacted(batch: Batch) -> Batch:
    """The same to be learned from fewer tokens: where rows are mostly padding, several in one.

    A row is taken up to its last target; its segments stay apart, and so do the rows. They keep
    their width; their number is a multiple of 8, for few distinct shapes.
    """
    tokens, targets = batch.tokens.numpy(), batch.targets.numpy()
    rows, width = tokens.shape
    length = batch.lengths().numpy()
    pieces = np.flatnonzero(length)
    row = best_fit(length[pieces], width)
    needed = -(-int(row.max(initial=0) + 1) // 8) * 8
    if needed > DENSE * rows:
        return batch
    order = np.argsort(row, kind="stable")
    pieces, row = pieces[order], row[order]
    length = length[pieces]
    source = np.repeat(pieces * width, length) + _ramp(length)
    row = np.repeat(row, length)
    place = row * width + _ramp(np.bincount(row))
    own = 0 if batch.segment_ids is None else batch.segment_ids.numpy().flat[source]
    apart = 1 if batch.segment_ids is None else int(batch.segment_ids.max()) + 1

    def laid(x: np.ndarray | torch.Tensor, rest: int, dtype: type) -> torch.Tensor:
        flat = np.full(needed * width, rest, dtype=dtype)
        flat[place] = x
        return torch.from_numpy(flat.reshape(needed, width))

    return Batch(
        laid(tokens.flat[source], int(tokens[0, -1]), np.int64),
        laid(targets.flat[source], IGNORE, np.int64),
        laid(np.repeat(np.arange(len(pieces)), length) * apart + own, -1, np.int32),
    )


def _ramp(lengths: Ints) -> Ints:
    """0 to n - 1 for every n of the lengths, end to end."""
    return np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)


class Shorten:
    """Cuts chains of thought at random tokens, as a budget at inference does.

    The `</think>` of a chain that was cut is no target: it is forced, and a model that learned to
    write it would stop thinking at random.
    """

    def __init__(self, think: int, end_think: int, whole: float, pieces: int, seed: int):
        """whole: the fraction of chains that stay as they are. pieces: how many there are."""
        self.marks, self.whole = (think, end_think), whole
        self.draws = lru_cache(2)(  # of an epoch; a batch may span two
            lambda epoch: np.random.default_rng([seed, epoch, 1]).random((pieces, 2))
        )

    def __call__(
        self, ids: Ints, goal: Ints, of: Ints, pieces: Ints, epochs: Ints
    ) -> NDArray[np.bool_]:
        """Which tokens stay, (N,); `goal` is changed where the thinking now ends.

        ids, goal (N,): tokens and targets of pieces end to end, `of` (N,) says of which; pieces,
        epochs (P,): their numbers and epochs.
        """
        draws = np.empty((len(pieces), 2))
        for epoch in np.unique(epochs):
            draws[epochs == epoch] = self.draws(int(epoch))[pieces[epochs == epoch]]
        begin, end = (self._first(ids == mark, of, len(pieces)) for mark in self.marks)
        # Where a document was cut, one of the two may be in another piece.
        thoughts = np.where((begin >= 0) & (end > begin), end - begin - 1, 0)
        left = np.where(draws[:, 0] < self.whole, 1.0, draws[:, 1])
        left = np.minimum(thoughts, (left * (thoughts + 1)).astype(np.int64))
        cut = np.flatnonzero(left < thoughts)
        goal[begin[cut] + left[cut]] = IGNORE
        kept = np.zeros(len(ids) + 1, dtype=np.int64)
        kept[begin[cut] + left[cut] + 1] -= 1
        kept[end[cut]] += 1
        return np.cumsum(kept[:-1]) == 0

    @staticmethod
    def _first(found: NDArray[np.bool_], of: Ints, count: int) -> Ints:
        """Where each piece has the first of what was found, -1 where it has none."""
        where = np.full(count, -1)
        places = np.flatnonzero(found)[::-1]
        where[of[places]] = places
        return where
