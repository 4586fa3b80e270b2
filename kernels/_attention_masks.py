"""Which keys a query of attention sees, and which blocks of keys or queries need no visit at all.

Query i stands beside key i + S - T, so that the last query stands beside the last key. It sees the
keys j at or before it (causal) less than `window` away (on both sides where not causal), of its
own segment. To the kernels the first two rules are one interval, offset - width < j - i <= offset,
and the third comes with tables of where each row's segment begins and ends on the other side.

Shapes: B batch, T queries, S keys.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ._runtime import jit, tl

ROW = 128  # the kernels' blocks divide it

Segments = tuple[Tensor, Tensor]  # the queries' (B, T) and the keys' (B, S), any integers


def distances(n_queries: int, n_keys: int, device: torch.device) -> Tensor:
    """(T, S): how far before its query a key stands."""
    positions = torch.arange(n_queries, device=device) + (n_keys - n_queries)
    return positions[:, None] - torch.arange(n_keys, device=device)


def visible(
    n_queries: int,
    n_keys: int,
    causal: bool,
    window: int | None,
    segments: Segments | None,
    device: torch.device,
) -> Tensor:
    """The definition: whether a query sees a key, (T, S), or (B, 1, T, S) where segments differ."""
    distance = distances(n_queries, n_keys, device)
    seen = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
    if window is not None:
        seen = seen & (distance.abs() < window)
    if segments is not None:
        queries, keys = segments
        seen = seen & (queries[:, None, :, None] == keys[:, None, None, :])
    return seen


def packed_segments(cu_seqlens: Tensor, length: int) -> Segments:
    """Of sequences laid end to end from cu_seqlens[i] to cu_seqlens[i + 1], with no host sync."""
    positions = torch.arange(length, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    ids = torch.searchsorted(cu_seqlens[1:], positions, right=True)[None]
    return ids, ids


def diagonal(
    n_queries: int, n_keys: int, causal: bool, window: int | None
) -> tuple[int, int | None]:
    """(offset, width): query i sees the keys offset - width < j - i <= offset."""
    if window is None:
        return (n_keys - n_queries if causal else n_keys), None
    window = min(window, n_queries + n_keys)  # beyond that it hides nothing, and fits in 32 bits
    if causal:
        return n_keys - n_queries, window
    return n_keys - n_queries + window - 1, 2 * window - 1


def _span(rows: Tensor, others: Tensor) -> list[Tensor]:
    """Of each of `rows`: where its segment begins and ends among `others`, and the end again where
    the segment has no gap, else 0. A segment that is not there begins after the last of them."""
    ordered, order = others.sort(dim=-1, stable=True)
    low, high = (torch.searchsorted(ordered, rows, right=right) for right in (False, True))
    absent = low == high
    order = F.pad(order, (0, 1))  # low may lie past the end
    first = order.gather(-1, low).masked_fill(absent, others.shape[-1])
    end = (order.gather(-1, (high - 1).clamp_min(0)) + 1).masked_fill(absent, 0)
    return [first, end, end.masked_fill(end - first != high - low, 0)]


def padded(table: Tensor) -> Tensor:
    """int32, of `row_length`."""
    missing = -table.shape[-1] % ROW
    return F.pad(table.to(torch.int32), (0, missing)) if missing else table.to(torch.int32)


def spans(segments: Segments) -> tuple[Tensor, Tensor]:
    """The kernels' tables (B, 3, T) and (B, 3, S), `padded`; segments in any order, with any gaps.

    Of a query: its segment's first key, which also names the segment; the key after its last; that
    again where the segment has no gap, else 0. Of a key: its segment's first key; its segment's
    first query; the query after its last.
    """
    queries, keys = (ids.to(torch.int64).contiguous() for ids in segments)
    of_queries = _span(queries, keys)
    alike = segments[0] is segments[1]
    of_keys = of_queries if alike else _span(keys, queries)
    name = of_queries[0] if alike else _span(keys, keys)[0]
    tables = torch.stack(of_queries, 1), torch.stack([name, *of_keys[:2]], 1)
    return padded(tables[0]), padded(tables[1])


def packed_spans(cu_seqlens: Tensor, segments: Segments) -> tuple[Tensor, Tensor]:
    """The tables of packed_segments(cu_seqlens, …), with no sort."""
    ids = segments[0]
    edges = F.pad(F.pad(cu_seqlens[1:], (1, 0)), (0, 1), value=ids.shape[1]).to(torch.int32)
    first, end = edges[ids], edges[ids + 1]
    return padded(torch.stack([first, end, end], 1)), padded(torch.stack([first, first, end], 1))


# In the kernels a query block and a key block meet in a tile (BLOCK_T, BLOCK_S). Of a query block's
# keys, those in [whole_first, whole_end) are seen by all of its queries and need no mask; those
# before it from `first` on and those after it until `end` do.


@jit
def row_length(n):
    """From one row of numbers for each query or key to the next, a multiple of ROW. Whole blocks of
    them are read, for with a mask each number would be copied by itself."""
    return tl.cdiv(n, 128) * 128


@jit
def key_bounds(
    q_spans_ptr,
    o_t,
    start_t,
    n_queries,
    n_keys,
    offset,
    width,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """(first, whole_first, whole_end, end) of a query block; all but the end whole blocks of keys.

    A window counts the block's queries past the last one too: they can only call for masks.
    """
    first = 0
    whole_first = 0
    whole_end = tl.minimum(n_keys, start_t + offset + 1)
    if width is not None:
        first = tl.maximum(start_t + offset + 1 - width, 0)
        whole_first = tl.maximum(start_t + BLOCK_T + offset - width, 0)
    m_t = o_t < n_queries
    if q_spans_ptr is not None:
        b_first = tl.load(q_spans_ptr + o_t, mask=m_t, other=0)
        b_unbroken = tl.load(q_spans_ptr + 2 * row_length(n_queries) + o_t, mask=m_t, other=n_keys)
        first = tl.maximum(first, tl.min(tl.where(m_t, b_first, n_keys), 0))
        whole_first = tl.maximum(whole_first, tl.max(b_first, 0))
        whole_end = tl.minimum(whole_end, tl.min(b_unbroken, 0))
    whole_end = tl.maximum(whole_end, 0) // BLOCK_S * BLOCK_S
    end = tl.minimum(n_keys, start_t + BLOCK_T + offset)
    if q_spans_ptr is not None:
        b_end = tl.load(q_spans_ptr + row_length(n_queries) + o_t, mask=m_t, other=0)
        end = tl.minimum(end, tl.max(b_end, 0))
    if width is not None or q_spans_ptr is not None:
        first = first // BLOCK_S * BLOCK_S
        whole_first = tl.cdiv(whole_first, BLOCK_S) * BLOCK_S
        whole_end = tl.maximum(whole_end, whole_first)
    return first, whole_first, whole_end, end


@jit
def query_bounds(
    kv_spans_ptr,
    o_s,
    start_s,
    n_queries,
    n_keys,
    offset,
    width,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """(first, end): the queries that see a key of the block lie in it; first starts a block."""
    first = tl.maximum(start_s - offset, 0)
    end = n_queries
    if width is not None:
        end = tl.minimum(end, start_s + BLOCK_S - 1 - offset + width)
    if kv_spans_ptr is not None:
        m_s = o_s < n_keys
        b_first = tl.load(kv_spans_ptr + row_length(n_keys) + o_s, mask=m_s, other=n_queries)
        b_end = tl.load(kv_spans_ptr + 2 * row_length(n_keys) + o_s, mask=m_s, other=0)
        first = tl.maximum(first, tl.min(b_first, 0))
        end = tl.minimum(end, tl.max(b_end, 0))
    return first // BLOCK_T * BLOCK_T, end


@jit
def near(o_t, o_s, offset, width):
    """offset - width < o_s - o_t <= offset; a column and a row, whichever way around."""
    if width is None:
        return o_s <= o_t + offset
    else:  # both sides in one comparison: what is below 0 is large without a sign
        return (o_t + offset - o_s).to(tl.uint32) < tl.cast(width, tl.uint32)


@jit
def not_all_near(start_t, start_s, offset, width, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr):
    """Whether `near` is false somewhere in a tile."""
    some = start_s + BLOCK_S - 1 > start_t + offset
    if width is not None:
        some = some | (start_t + BLOCK_T - 1 + offset - start_s >= width)
    return some


@jit
def sees(o_t, o_s, n_keys, offset, width):
    """`near`, of the keys that there are; without a window one comparison tells both."""
    if width is None:
        return o_s <= tl.minimum(o_t + offset, n_keys - 1)
    else:
        return (o_s < n_keys) & near(o_t, o_s, offset, width)


@jit
def distance(o_t, o_s, n_queries, n_keys):
    """fp32, how far a key stands from its query; cast before they meet in a tile of numbers."""
    return tl.abs((o_t + n_keys - n_queries).to(tl.float32) - o_s.to(tl.float32))
