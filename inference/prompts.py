"""Prompts: their keys and values, prefilled once each, and the groups of rows that share them."""

import heapq
import time
from collections import Counter
from collections.abc import Iterable
from itertools import islice
from typing import Any, NamedTuple

import torch

from ..models import KVCache, Prefix
from .request import Request

LENGTH_STEP = 32  # attended lengths and prompt blocks are rounded up to a multiple of it

Prompt = tuple[int, ...]


def round_up(length: int, step: int = LENGTH_STEP) -> int:
    return -(-length // step) * step


class Place(NamedTuple):
    """Where a prefilled prompt lies: a row of a block."""

    block: KVCache
    row: int


def copy_rows(source: KVCache, target: KVCache | Prefix, pairs: list[tuple[int, int]]) -> None:
    """Copy rows' keys and values, as far as both reach: (a row of source, one of target)."""
    rows, targets = torch.tensor(pairs, device=source.keys.device).t()
    n = min(source.capacity, target.capacity)
    for old, new in ((source.keys, target.keys), (source.values, target.values)):
        new[:, :, :, :n].index_copy_(1, targets, old[:, :, :, :n].index_select(1, rows))


class Prompts:
    """The keys and values of the prompts that waiting requests need.

    Where PyTorch computes them, prompts are prefilled in blocks of fixed shape, right-padded to a
    length that a prompt's own length decides, so that no prompt's numbers depend on its companions.
    """

    def __init__(self, engine: Any, network: Any):
        self.engine, self.network, self.config = engine, network, engine.model.config
        self.waiting: Counter[Prompt] = Counter()
        self.ready: dict[Prompt, Place] = {}
        self.owed: dict[Prompt, float] = {}  # seconds that none paid yet

    def expect(self, prompt: Prompt) -> None:
        self.waiting[prompt] += 1

    def take(self, prompt: Prompt) -> tuple[Place, float]:
        """Where the prompt lies, and the seconds that this request owes for it."""
        place = self.ready[prompt]
        seconds = self.owed[prompt] / self.waiting[prompt]
        self.owed[prompt] -= seconds
        self.waiting[prompt] -= 1
        if not self.waiting[prompt]:
            del self.waiting[prompt], self.ready[prompt], self.owed[prompt]
        return place, seconds

    def prefill(self, batch: Iterable[Request], ahead: Iterable[Request]) -> None:
        """Make the batch's prompts ready; requests further ahead fill what is left of a block."""
        needed: dict[int, dict[Prompt, None]] = {}
        for request in batch:
            if request.prompt not in self.ready:
                needed.setdefault(self._width(request.prompt), {})[request.prompt] = None
        if not needed:
            return
        start = time.perf_counter()
        spare = {}
        if not self.engine.native:
            spare = {width: -len(prompts) % self._rows(width) for width, prompts in needed.items()}
        for request in ahead:
            prompt, width = request.prompt, self._width(request.prompt)
            if spare.get(width) and prompt not in self.ready and prompt not in needed[width]:
                needed[width][prompt] = None
                spare[width] -= 1
        blocks = []
        for width, prompts in needed.items():
            source = iter(prompts)
            while block := list(islice(source, self._rows(width))):
                blocks.append((width, block))
        for width, prompts in blocks:
            self._prefill_block(width, prompts)
        if self.engine.device.type == "cuda":  # else others would pay what it has still to do
            torch.cuda.synchronize(self.engine.device)
        seconds = (time.perf_counter() - start) / sum(width for width, _ in blocks)
        for width, prompts in blocks:
            self.owed.update(dict.fromkeys(prompts, seconds * width / len(prompts)))

    def _width(self, prompt: Prompt) -> int:
        return (
            len(prompt) if self.engine.native else min(round_up(len(prompt)), self.config.context)
        )

    def _rows(self, width: int) -> int:
        return max(1, self.engine.block_tokens // width)

    @torch.inference_mode()
    def _prefill_block(self, width: int, prompts: list[Prompt]) -> None:
        padded = [p[:width] + (0,) * (width - len(p)) for p in prompts]
        if not self.engine.native:
            padded += [(0,) * width] * (self._rows(width) - len(prompts))
        device, dtype = self.engine.device, self.engine.dtype
        block = KVCache(self.config, len(padded), width, device=device, dtype=dtype)
        tokens = torch.tensor(padded, device=device)
        if self.engine.native:
            self.network.prefill(tokens, block)
        else:
            self.network.hidden(tokens, block)
        for row, prompt in enumerate(prompts):
            self.ready[prompt] = Place(block, row)


class Groups:
    """Which rows of a cache share a prompt, in groups of as many places as its prefix has.

    A prompt may have several groups, and a group places that no row has; rows come and go.
    """

    def __init__(self, prefix: Prefix):
        self.prefix = prefix
        self.rows: list[list[int | None]] = []  # at each place of each group
        self.lengths: list[int] = []  # 0 where a group is nobody's
        self.place = [0] * len(prefix.place)
        self.open: dict[Prompt, list[int]] = {}  # groups with places left
        self.idle: list[int] = []  # a heap
        self.copies: dict[KVCache, list[tuple[int, int]]] = {}  # block → (row, group)

    def add(self, row: int, prompt: Prompt, source: Place) -> None:
        """Give the row a place beside others of its prompt. It is there after `update`."""
        groups = self.open.setdefault(prompt, [])
        if not groups:
            groups.append(self._begin(prompt, source))
        group = groups[-1]
        place = self.rows[group].index(None)
        self.rows[group][place] = row
        self.place[row] = group * self.prefix.width + place
        if None not in self.rows[group]:
            groups.pop()
        if not groups:
            del self.open[prompt]

    def _begin(self, prompt: Prompt, source: Place) -> int:
        if not self.idle:
            self.idle.append(len(self.rows))
            self.rows.append([None] * self.prefix.width)
            self.lengths.append(0)
        group = heapq.heappop(self.idle)
        self.lengths[group] = len(prompt) - 1  # a row's own first token is the prompt's last
        self.copies.setdefault(source.block, []).append((source.row, group))
        return group

    def remove(self, row: int, prompt: Prompt) -> None:
        """The row's place falls free, and its group where that was the last."""
        group, place = divmod(self.place[row], self.prefix.width)
        self.rows[group][place], self.place[row] = None, 0
        groups = self.open.setdefault(prompt, [])
        if group not in groups:
            groups.append(group)
        if not any(r is not None for r in self.rows[group]):
            groups.remove(group)
            self.lengths[group] = 0
            heapq.heappush(self.idle, group)
        if not groups:
            del self.open[prompt]

    @torch.inference_mode()
    def update(self) -> None:
        """Tell the device."""
        prefix = self.prefix
        while self.rows and not any(r is not None for r in self.rows[-1]):
            self.idle.remove(len(self.rows) - 1)
            self.rows.pop()
            self.lengths.pop()
        heapq.heapify(self.idle)
        self._fit()
        places = [row for group in self.rows for row in group]
        places += [None] * (prefix.groups * prefix.width - len(places))
        lengths = self.lengths + [0] * (prefix.groups - len(self.lengths))
        for told, known in (
            (prefix.order, [row or 0 for row in places]),
            (prefix.taken, [int(row is not None) for row in places]),
            (prefix.place, self.place),
            (prefix.lengths, lengths),
        ):
            told.copy_(torch.tensor(known, device="cpu"))
        for block, pairs in self.copies.items():
            copy_rows(block, prefix, pairs)
        self.copies.clear()

    def _fit(self) -> None:
        """Keep the prefix's shape near what is needed: on a CPU every step reads all of it. On a
        GPU it never shrinks, so that a captured step is of use for long."""
        prefix = self.prefix
        groups = max(1, len(self.rows))
        capacity = max(LENGTH_STEP, round_up(max(self.lengths, default=0)))
        if prefix.place.is_cuda:
            groups = min(1 << (groups - 1).bit_length(), len(self.place))
            groups, capacity = max(groups, prefix.groups), max(capacity, prefix.capacity)
        elif groups <= prefix.groups < 2 * groups and capacity <= prefix.capacity < 2 * capacity:
            return
        if (groups, capacity) != (prefix.groups, prefix.capacity):
            prefix.resize(groups, capacity)
