"""Attention in bf16 on a CPU: PyTorch's products, over blocks whose scores stay in the cache.

PyTorch's fused attention does bf16 there without the processor's bf16 units. Here the scores of a
block of queries are one product for many heads and rows, of the keys that the block may see, and
are computed again in the backward pass: memory grows with T + S. Where all queries are one block
the backward pass keeps their weights instead.

Shapes: B batch, Hq query heads, Hkv key/value heads, T queries, S keys, D and Dv head dimensions.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ._attention_masks import Segments, diagonal
from ._runtime import operation, traced

QUERIES = 128  # of a block
SCORES = 2**20  # bytes of a block's scores for each thread: they lie in its level-2 cache
PAIRS = 640 * 640  # of a query and a key, beyond which PyTorch's fused attention is as fast
DTYPES = (torch.bfloat16,)  # in fp32 a training step gains 10 % at 512 positions, else nothing


@dataclass(frozen=True)
class _Block:
    """Some rows of the batch, some of their queries, and the keys that those may see."""

    rows: slice
    queries: slice
    keys: slice
    offset: int
    width: int | None
    """query i sees the keys offset - width < j - i <= offset"""

    def of_queries(self, x: Tensor, n_kv_heads: int) -> Tensor:
        """(B, Hq, T, D) -> (rows · Hkv, Hq / Hkv · queries, D), as a batched product takes it."""
        part = x[self.rows, :, self.queries]
        return part.reshape(part.shape[0] * n_kv_heads, -1, part.shape[3])

    def of_keys(self, x: Tensor) -> Tensor:
        """(B, Hkv, S, D) -> (rows · Hkv, keys, D)."""
        return x[self.rows, :, self.keys].flatten(0, 1)

    def hide(self, scores: Tensor, ids: Tensor | None) -> None:
        """-inf at what a query does not see, in place; scores: (rows, Hq, queries, keys)."""
        if self.width is None and ids is None:
            last = self.queries.start + self.offset  # that the first query sees
            if last < self.keys.stop - 1:
                part = scores[..., last:]
                part += part.new_full(part.shape[2:], -math.inf).triu_(1)
            return
        queries = torch.arange(self.queries.start, self.queries.stop)[:, None] + self.offset
        behind = queries - torch.arange(self.keys.start, self.keys.stop)
        hidden = behind < 0
        if self.width is not None:
            hidden |= behind >= self.width
        if ids is not None:
            of_queries, of_keys = ids[self.rows, self.queries], ids[self.rows, self.keys]
            hidden = hidden | (of_queries[:, None, :, None] != of_keys[:, None, None, :])
        scores += scores.new_zeros(hidden.shape).masked_fill_(hidden, -math.inf)


def _blocks(q: Tensor, k: Tensor, causal: bool, window: int | None) -> Iterator[_Block]:
    (batch, n_heads, n_queries), n_keys = q.shape[:3], k.shape[2]
    offset, width = diagonal(n_queries, n_keys, causal, window)
    for start in range(0, n_queries, QUERIES):
        end = min(start + QUERIES, n_queries)
        first = 0 if width is None else max(0, start + offset + 1 - width)
        last = min(n_keys, end + offset)
        size = q.element_size() * n_heads * (end - start) * (last - first)
        n_rows = max(1, SCORES * torch.get_num_threads() // size)
        for row in range(0, batch, n_rows):
            rows = slice(row, row + n_rows)
            yield _Block(rows, slice(start, end), slice(first, last), offset, width)


def _weights(
    q: Tensor, k: Tensor, ids: Tensor | None, block: _Block, scale: float, room: Tensor | None
) -> Tensor:
    """The softmax's weights of one block, (rows · Hkv, Hq / Hkv · queries, keys)."""
    b_q, b_k = block.of_queries(q, k.shape[1]), block.of_keys(k)
    scores = torch.baddbmm(b_q.new_empty(()), b_q, b_k.mT, beta=0, alpha=scale)
    n_queries = block.queries.stop - block.queries.start
    block.hide(scores.view(-1, q.shape[1], n_queries, scores.shape[2]), ids)
    return torch.softmax(scores, -1, out=room)


def _product(a: Tensor, b: Tensor, target: Tensor, add: bool = False) -> None:
    """target = a @ b, or += where add; target (rows, heads, …, D) may be a part of a tensor."""
    if target.is_contiguous() and not add:
        torch.bmm(a, b, out=target.view(len(a), -1, target.shape[3]))
    else:
        product = torch.bmm(a, b).view(target.shape)
        target.add_(product) if add else target.copy_(product)


def blocks_pay(q: Tensor, k: Tensor, segments: Segments | None) -> bool:
    """Whether the blocks are the faster way, and every query sees a key, at least itself."""
    n_queries, n_keys = q.shape[2], k.shape[2]
    return (
        q.device.type == "cpu"
        and q.dtype in DTYPES
        and 1 < n_queries <= n_keys
        and n_queries * n_keys <= PAIRS
        and (segments is None or segments[0] is segments[1])
        and (torch.compiler.is_compiling() or not traced())
    )


def attention_in_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    window: int | None,
    segments: Segments | None,
    scale: float,
) -> Tensor:
    """`attention` where the blocks pay: (B, Hq, T, Dv)."""
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    keep = learns and q.shape[2] <= QUERIES and window is None
    ids = None if segments is None else segments[0]
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    return _attention_cpu(q, k, v, ids, causal, window, scale, keep)[0]


@operation("ponder::attention_cpu")
def _attention_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ids: Tensor | None,
    causal: bool,
    window: int | None,
    scale: float,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """(out, the weights where they are to be kept: all queries are one block, and see all keys)."""
    out = q.new_empty(*q.shape[:3], v.shape[3])
    kept = q.new_empty(*q.shape[:3], k.shape[2] if keep else 0)
    with torch.autocast("cpu", enabled=False):
        for block in _blocks(q, k, causal, window):
            room = block.of_queries(kept, k.shape[1]) if keep else None
            weights = _weights(q, k, ids, block, scale, room)
            _product(weights, block.of_keys(v), out[block.rows, :, block.queries])
    return out, kept


@_attention_cpu.register_fake
def _(q, k, v, ids, causal, window, scale, keep):
    kept = q.new_empty(*q.shape[:3], k.shape[2] if keep else 0)
    return q.new_empty(*q.shape[:3], v.shape[3]), kept


@operation("ponder::attention_cpu_backward")
def _attention_cpu_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kept: Tensor,
    ids: Tensor | None,
    causal: bool,
    window: int | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv)."""
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    add = q.shape[2] > QUERIES  # several blocks see a key
    make = torch.zeros_like if add or window is not None else torch.empty_like
    dk, dv = (make(x, dtype=torch.float32 if add else None) for x in (k, v))
    for block in _blocks(q, k, causal, window):
        b_q, b_dout = (block.of_queries(x, k.shape[1]) for x in (q, dout))
        b_k, b_v = block.of_keys(k), block.of_keys(v)
        if kept.shape[3]:
            weights = block.of_queries(kept, k.shape[1])
        else:
            weights = _weights(q, k, ids, block, scale, None)
        dscores = torch.bmm(b_dout, b_v.mT)
        dscores = torch.ops.aten._softmax_backward_data(dscores, weights, -1, q.dtype)
        _product(dscores, b_k, dq[block.rows, :, block.queries])
        _product(dscores.mT, b_q, dk[block.rows, :, block.keys], add)
        _product(weights.mT, b_dout, dv[block.rows, :, block.keys], add)
    return dq.mul_(scale), dk.mul_(scale).to(k.dtype), dv.to(v.dtype)


@_attention_cpu_backward.register_fake
def _(dout, q, k, v, *_):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _setup_context(ctx, inputs, output):
    q, k, v, ids, *ctx.rules, _ = inputs
    ctx.save_for_backward(q, k, v, output[1], ids)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, dout, _):
    return *_attention_cpu_backward(dout, *ctx.saved_tensors, *ctx.rules), *[None] * 5


_attention_cpu.register_autograd(_backward, setup_context=_setup_context)
