"""Keys and values of sequences that grow: a cache for each row, and prefixes that rows share.

Shapes: B rows, N groups of rows that share a prefix, T new tokens, H query heads, G key-value
heads, S and P positions of the rows' own and of the prefixes' caches, D head width.
"""

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..kernels import attention, decode_attention

if TYPE_CHECKING:
    from .gpt import GPTConfig


class LayerPrefix(NamedTuple):
    """One layer's view of a `Prefix`: N groups of rows, each of equally many places."""

    keys: Tensor  # (N, G, P, D)
    values: Tensor
    lengths: Tensor  # (N,)
    order: Tensor  # the row at each place
    place: Tensor  # (B,), the place of each row
    place_lengths: Tensor  # the row's own length at each place, the new tokens included

    def attend(self, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """q (B, H, T, D) against each row's prefix and its own keys and values (B, G, S, D): in
        the order of the places, where the own ones are pages of a row each."""
        y = decode_attention(
            q[self.order],
            keys,
            values,
            self.place_lengths,
            prefix=(self.keys, self.values),
            prefix_lengths=self.lengths,
            block_table=self.order[:, None].int(),
        )
        return y[self.place]


class LayerCache:
    """One layer's view of a KVCache during one forward pass."""

    def __init__(
        self,
        keys: Tensor,
        values: Tensor,
        lengths: Tensor,
        index: Tensor | None,
        prefix: LayerPrefix | None = None,
    ):
        self.keys, self.values = keys, values  # (B, G, S, D), contiguous
        self.lengths = lengths  # (B,), the new tokens included
        self.index = index  # where they go, among the B·G·S positions; None: in front
        self.prefix = prefix

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Write the T new keys and values at each row's own position, then attend."""
        self.write(k, v)
        if self.index is None:
            return attention(q, k, v, causal=True)
        if self.prefix is not None:
            return self.prefix.attend(q, self.keys, self.values)
        return decode_attention(q, self.keys, self.values, self.lengths)

    def write(self, k: Tensor, v: Tensor) -> None:
        """Put the new keys and values (B, G, T, D) where they belong."""
        T, D = k.shape[2:]
        for cache, new in ((self.keys, k), (self.values, v)):
            if self.index is None:
                cache[:, :, :T] = new
            else:
                cache.view(-1, D).index_copy_(0, self.index, new.reshape(-1, D).to(cache.dtype))


class Prefix:
    """Keys and values that rows of a KVCache share, in front of their own: those of a prompt.

    Rows share them in groups of `width` places, so that each is read once a group. keys, values
    (n_layer, N, n_kv_head, capacity, head_dim) and lengths (N,) of N groups; order (N · width,):
    the row at each place, of which taken (N · width,) is 1, or any row, and taken is 0; place
    (B,): where each row is. All indices are int64.
    """

    def __init__(
        self,
        config: "GPTConfig",
        batch: int,
        capacity: int,
        width: int,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        shape = (config.n_layer, 0, config.n_kv_head, capacity, config.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.width = width
        self.place = torch.zeros(batch, device=device, dtype=torch.int64)
        self.lengths, self.order, self.taken = self.place.new_zeros(3, 0)

    @property
    def groups(self) -> int:
        return self.keys.shape[1]

    @property
    def capacity(self) -> int:
        return self.keys.shape[3]

    def resize(self, groups: int, capacity: int) -> None:
        """Room for so many groups of so many positions; what is beyond is lost, new room zero."""
        self.keys = _resized(self.keys, groups, capacity)
        self.values = _resized(self.values, groups, capacity)
        for name, size in (("lengths", 1), ("order", self.width), ("taken", self.width)):
            old = getattr(self, name)
            new = old.new_zeros(groups * size)
            kept = min(len(old), len(new))
            new[:kept] = old[:kept]
            setattr(self, name, new)


def _resized(old: Tensor, rows: int, capacity: int) -> Tensor:
    """A cache (L, B, G, S, D) of other B and S; what is new is zero."""
    new = old.new_zeros((old.shape[0], rows, old.shape[2], capacity, old.shape[4]))
    kept_rows, kept = min(rows, old.shape[1]), min(capacity, old.shape[3])
    new[:, :kept_rows, :, :kept] = old[:, :kept_rows, :, :kept]
    return new


class KVCache:
    """The keys and values of B sequences, each with its own length.

    keys, values (n_layer, B, n_kv_head, capacity, head_dim); lengths (B,) int64, the number of
    tokens that each row holds. A forward pass writes behind them and leaves `lengths` to the
    caller, so that right-padded prompts can be prefilled together. Every pass reads the whole
    capacity, so `resize` keeps it near the longest row. With a `prefix`, a row's sequence is its
    group's prefix and then its own tokens, which alone `lengths` counts.
    """

    prefix: Prefix | None = None

    def __init__(
        self,
        config: "GPTConfig",
        batch: int,
        capacity: int,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        shape = (config.n_layer, batch, config.n_kv_head, capacity, config.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.lengths = torch.zeros(batch, device=device, dtype=torch.int64)
        self.empty = True  # a host-side fact, so that a prefill needs no device sync

    @property
    def capacity(self) -> int:
        return self.keys.shape[3]

    def resize(self, capacity: int) -> None:
        """Change the capacity; positions past it are lost, new ones are zero.

        A slice of a larger cache would do on a GPU; on a CPU the batched products of attention
        run 3 to 4 times as fast on contiguous matrices (2048 of 32 × 32: 0.4 ms against 1.6).
        """
        rows = self.keys.shape[1]
        self.keys = _resized(self.keys, rows, capacity)
        self.values = _resized(self.values, rows, capacity)

    def offsets(self) -> Tensor | int:
        """(B,), the tokens that each row's prefix holds."""
        prefix = self.prefix
        return 0 if prefix is None else prefix.lengths[prefix.place // prefix.width]

    def positions(self, count: int) -> Tensor:
        """(B, count), where in its sequence each row's next tokens stand."""
        starts = self.lengths + self.offsets()
        return starts[:, None] + torch.arange(count, device=starts.device)

    def views(self, positions: Tensor | None, count: int) -> list[LayerCache]:
        """Each layer's part in a pass of `count` tokens at `positions` (B, T); None: an empty
        cache's first ones. ValueError where they have no room (rows that are not empty are looked
        at on a CPU alone, where it costs nothing)."""
        index, last = None, count
        seen = type(self.lengths) is Tensor and not torch.compiler.is_compiling()  # else a fake one
        if positions is not None and seen and self.lengths.is_cpu and len(self.lengths):
            last += int(self.lengths.max())
        if last > self.capacity:
            raise ValueError(f"the cache has room for {self.capacity} tokens a row, not for {last}")
        if positions is not None:
            own = self.lengths[:, None] + torch.arange(count, device=positions.device)
            heads = torch.arange(self.keys[0, :, :, 0, 0].numel(), device=positions.device)
            first = (heads * self.capacity).view(*self.keys.shape[1:3], 1)
            index = (first + own[:, None]).flatten()
        lengths = self.lengths + count
        shared: list[LayerPrefix | None] = [None] * len(self.keys)
        if self.prefix is not None:
            p = self.prefix
            # The row of a place that is none reads one position.
            place_lengths = lengths[p.order] * p.taken
            shared = [
                LayerPrefix(keys, values, p.lengths, p.order, p.place, place_lengths)
                for keys, values in zip(p.keys, p.values, strict=True)
            ]
        return [
            LayerCache(keys, values, lengths, index, prefix)
            for keys, values, prefix in zip(self.keys, self.values, shared, strict=True)
        ]
