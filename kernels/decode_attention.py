"""Attention of the few newest tokens of each row against its KV cache. Inference only.

    out_t = sum_j softmax_j(scale · q_t · k_j) v_j,   j <= length − T + t

The cache is read in splits of a fixed number of positions, each by a program of its own that leaves
its partial result and log-sum-exp; a second kernel combines them ("flash-decoding"). The query
heads of one KV head and the T tokens are the rows of one tile, so K and V are read once a group.

A row's result is a function of its own queries, cache and length, bit for bit: splits start at
multiples of SPLIT whatever the other rows hold and however many positions the cache has.

Dao et al. 2023, "Flash-Decoding for long-context inference"; Ainslie et al. 2023, "GQA".
Shapes: B rows, Hq query heads, Hkv key/value heads, T new tokens, S cache positions, D head
dimension.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ._runtime import (
    TRITON_TYPE,
    Specialization,
    autocast,
    cdiv,
    jit,
    next_power_of_2,
    tl,
    use_triton,
)

MAX_HEAD_DIM = 256
SPLIT = 256  # cache positions a program reads; a constant, so that sums never change their order
# What keeps S out of the roundings on CPU: MKL cuts a contraction of more than 192 terms at places
# that depend on its length, unless it has fewer than 4 rows; and torch.bmm takes another path below
# 400 products. (Seen with MKL 2024.2, with AVX2 and AVX-512; the tests compare bits.)
CPU_SPLIT = 192
CPU_ROWS = 4
CPU_LEAST = 400
LOG2_E = math.log2(math.e)


def decode_attention_reference(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, scale: float | None = None
) -> Tensor:
    """The definition, computed in fp32 (fp64 stays fp64) and returned in q's dtype.

    Batched products beat scaled_dot_product_attention here (2 cores, B = 256, Hq = 4, Hkv = 2,
    D = 32, T = 1: 0.8 ms against 1.1 at S = 64, 1.4 against 2.1 at S = 128), are finite whatever
    lies beyond a length, and can be summed in an order that S does not change.
    """
    n_row, n_head, n_new, head_dim = q.shape
    n_kv_head, capacity = k_cache.shape[1:3]
    factor = head_dim**-0.5 if scale is None else scale
    n_query = n_head // n_kv_head * n_new
    wide = torch.promote_types(q.dtype, torch.float32)
    least = cdiv(CPU_LEAST, 16 * head_dim) * 16
    if capacity < least:
        padding = (0, 0, 0, least - capacity)
        k_cache, v_cache = (torch.nn.functional.pad(x, padding) for x in (k_cache, v_cache))
        capacity = least
    queries = (q.to(wide) * factor).reshape(n_row * n_kv_head, n_query, head_dim)
    keys, values = k_cache.flatten(0, 1).to(wide), v_cache.flatten(0, 1).to(wide)
    scores = torch.bmm(queries, keys.mT)
    last = lengths[:, None] + torch.arange(-n_new, 0, device=q.device)
    hidden = torch.arange(capacity, device=q.device) > last.clamp_min(0)[..., None]
    grouped = scores.view(n_row, n_head, n_new, capacity)
    grouped.masked_fill_(hidden[:, None], -math.inf)
    weights = scores.softmax(-1)
    step = CPU_SPLIT if n_query >= CPU_ROWS else capacity
    out = torch.bmm(weights[..., :step], values[:, :step])
    for start in range(step, capacity, step):
        split = slice(start, start + step)
        out.baddbmm_(weights[..., split], values[:, split])
    return out.view(q.shape).to(q.dtype)


@jit(do_not_specialize=["group", "n_new", "n_split"])
def _decode_attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    length_ptr,
    out_ptr,
    partial_ptr,
    lse_ptr,
    stride_q_row,
    stride_q_head,
    stride_q_token,
    stride_k_row,
    stride_k_head,
    stride_k_token,
    stride_v_row,
    stride_v_head,
    stride_v_token,
    n_kv_head,
    group,
    n_new,
    capacity,
    head_dim,
    n_split,
    scale_log2,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    i_row = (tl.program_id(0) // n_kv_head).to(tl.int64)
    i_kv_head = (tl.program_id(0) % n_kv_head).to(tl.int64)
    i_split = tl.program_id(1)
    length = tl.load(length_ptr + i_row).to(tl.int32)
    visible = tl.minimum(tl.maximum(length, 1), capacity)
    first = i_split * SPLIT
    if first >= visible:
        return
    o_m = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)  # query head within the group, token
    o_d = tl.arange(0, BLOCK_D)
    o_token = o_m % n_new
    o_head = i_kv_head * group + o_m // n_new
    m_m = o_m < group * n_new
    m_d = o_d < head_dim
    last = tl.maximum(length - n_new + o_token, 0)
    q_offset = i_row * stride_q_row + o_head * stride_q_head + o_token.to(tl.int64) * stride_q_token
    b_q = tl.load(q_ptr + q_offset[:, None] + o_d, mask=m_m[:, None] & m_d, other=0.0)
    k_ptr += i_row * stride_k_row + i_kv_head * stride_k_head
    v_ptr += i_row * stride_v_row + i_kv_head * stride_v_head

    b_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    b_sum = tl.zeros((BLOCK_M,), tl.float32)
    b_out = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start in range(first, tl.minimum(first + SPLIT, visible), BLOCK_N):
        o_n = start + tl.arange(0, BLOCK_N)
        m_load = (o_n < visible)[:, None] & m_d
        o_n_wide = o_n.to(tl.int64)[:, None]
        b_k = tl.load(k_ptr + o_n_wide * stride_k_token + o_d, mask=m_load, other=0.0)
        b_v = tl.load(v_ptr + o_n_wide * stride_v_token + o_d, mask=m_load, other=0.0)
        b_score = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale_log2
        b_score = tl.where(o_n[None, :] <= last[:, None], b_score, float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_score, 1))
        b_finite = tl.where(b_new == float("-inf"), 0.0, b_new)  # nothing seen yet: no inf − inf
        b_weight = tl.exp2(b_score - b_finite[:, None])
        b_decay = tl.exp2(b_max - b_finite)
        b_sum = b_sum * b_decay + tl.sum(b_weight, 1)
        b_out *= b_decay[:, None]
        b_out += tl.dot(b_weight.to(b_v.dtype), b_v, input_precision="ieee")
        b_max = b_new

    b_sum = tl.where(b_sum == 0.0, 1.0, b_sum)  # a query that sees nothing of this split
    b_out /= b_sum[:, None]
    o_out = (i_row * n_kv_head * group + o_head) * n_new + o_token
    m_out = m_m[:, None] & m_d
    if n_split == 1:
        out = b_out.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + o_out[:, None] * head_dim + o_d, out, mask=m_out)
    else:
        o_partial = o_out * n_split + i_split
        tl.store(partial_ptr + o_partial[:, None] * head_dim + o_d, b_out, mask=m_out)
        tl.store(lse_ptr + o_partial, b_max + tl.log2(b_sum), mask=m_m)


@jit(do_not_specialize=["rows_per_length", "n_split"])
def _combine_kernel(
    partial_ptr,
    lse_ptr,
    length_ptr,
    out_ptr,
    rows_per_length,
    capacity,
    head_dim,
    n_split,
    SPLIT: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    i_out = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < head_dim
    length = tl.load(length_ptr + i_out // rows_per_length).to(tl.int32)
    visible = tl.minimum(tl.maximum(length, 1), capacity)
    best = tl.load(lse_ptr + i_out * n_split)  # position 0 is always seen: finite
    total = best * 0.0 + 1.0
    b_out = tl.load(partial_ptr + i_out * n_split * head_dim + o_d, mask=m_d, other=0.0)
    for i_split in range(1, tl.cdiv(visible, SPLIT)):
        o_partial = i_out * n_split + i_split
        lse = tl.load(lse_ptr + o_partial)
        b_partial = tl.load(partial_ptr + o_partial * head_dim + o_d, mask=m_d, other=0.0)
        new = tl.maximum(best, lse)
        decay, weight = tl.exp2(best - new), tl.exp2(lse - new)
        b_out = b_out * decay + b_partial * weight
        total = total * decay + weight
        best = new
    b_out /= total
    tl.store(out_ptr + i_out * head_dim + o_d, b_out.to(out_ptr.dtype.element_ty), mask=m_d)


@dataclass(frozen=True)
class Tile:
    """16 rows (query heads × tokens; tl.dot takes no fewer) against BLOCK_N cache positions.

    BLOCK_N keeps 16 KiB of K, and of V, a block (8 KiB in fp32, which spills registers beyond).
    """

    block_n: int
    block_d: int
    block_m: int = 16
    num_warps: int = 4
    num_stages: int = 2


def _tile(head_dim: int, element_size: int) -> Tile:
    block_d = max(32, next_power_of_2(head_dim))
    elements = 8192 if element_size == 2 else 2048
    return Tile(min(64, max(16, elements // block_d)), block_d)


def specializations(capability: int) -> Iterator[Specialization]:
    """Every way in which the launcher below can compile the kernels."""
    strides = [f"stride_{x}_{d}" for x in "qkv" for d in ("row", "head", "token")]
    for dtype, name in TRITON_TYPE.items():
        pointer = f"*{name}:16"
        for head_dim in (32, 64, 128, 256):
            yield Specialization(
                _combine_kernel,
                dict(
                    partial_ptr="*fp32:16",
                    lse_ptr="*fp32:16",
                    length_ptr="*i64:16",
                    out_ptr=pointer,
                    rows_per_length="i32",
                    capacity="i32:16",
                    head_dim="i32:16",
                    n_split="i32",
                ),
                dict(SPLIT=SPLIT, BLOCK_D=head_dim),
                num_warps=1,
            )
            tile = _tile(head_dim, dtype.itemsize)
            # Not a `matrix` kernel: 16 rows wait for memory, and wgmma starts at 64.
            yield Specialization(
                _decode_attention_kernel,
                dict(
                    q_ptr=pointer,
                    k_ptr=pointer,
                    v_ptr=pointer,
                    length_ptr="*i64:16",
                    out_ptr=pointer,
                    partial_ptr="*fp32:16",
                    lse_ptr="*fp32:16",
                    **dict.fromkeys(strides, "i32:16"),
                    n_kv_head="i32",
                    group="i32",
                    n_new="i32",
                    capacity="i32:16",
                    head_dim="i32:16",
                    n_split="i32",
                    scale_log2="fp32",
                ),
                dict(
                    SPLIT=SPLIT,
                    BLOCK_M=tile.block_m,
                    BLOCK_N=tile.block_n,
                    BLOCK_D=tile.block_d,
                ),
                num_warps=tile.num_warps,
                num_stages=tile.num_stages,
            )


@torch.library.custom_op("ponder::decode_attention", mutates_args=())
def _decode_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, scale: float
) -> Tensor:
    """The kernels on tensors whose last dimension has unit stride; lengths int64."""
    n_row, n_head, n_new, head_dim = q.shape
    n_kv_head, capacity = k_cache.shape[1:3]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if not out.numel():
        return out
    rows = n_head // n_kv_head * n_new
    tile = _tile(head_dim, q.element_size())
    n_split = cdiv(capacity, SPLIT)
    partial = lse = out
    if n_split > 1:
        partial = q.new_empty((n_row * n_head * n_new, n_split, head_dim), dtype=torch.float32)
        lse = q.new_empty((n_row * n_head * n_new, n_split), dtype=torch.float32)
    _decode_attention_kernel[(n_row * n_kv_head, n_split, cdiv(rows, tile.block_m))](
        q,
        k_cache,
        v_cache,
        lengths,
        out,
        partial,
        lse,
        *q.stride()[:3],
        *k_cache.stride()[:3],
        *v_cache.stride()[:3],
        n_kv_head,
        n_head // n_kv_head,
        n_new,
        capacity,
        head_dim,
        n_split,
        scale * LOG2_E,
        SPLIT=SPLIT,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_D=tile.block_d,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    if n_split > 1:
        _combine_kernel[(n_row * n_head * n_new,)](
            partial,
            lse,
            lengths,
            out,
            n_head * n_new,
            capacity,
            head_dim,
            n_split,
            SPLIT=SPLIT,
            BLOCK_D=tile.block_d,
            num_warps=1,
        )
    return out


@_decode_attention.register_fake
def _(q, k_cache, v_cache, lengths, scale):
    return q.new_empty(q.shape)


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _check(q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor) -> None:
    if q.dim() != 4:
        raise ValueError(f"decode_attention: q is {tuple(q.shape)}; it must be (B, Hq, T, D)")
    n_row, n_head, n_new, head_dim = q.shape
    shape = k_cache.shape
    if len(shape) != 4 or (shape[0], shape[3]) != (n_row, head_dim):
        raise ValueError(
            f"decode_attention: k_cache is {tuple(shape)}; beside q of {tuple(q.shape)} it must "
            f"be ({n_row}, Hkv, S, {head_dim})"
        )
    if v_cache.shape != shape:
        raise ValueError(
            f"decode_attention: v_cache is {tuple(v_cache.shape)}; it must be as k_cache, "
            f"{tuple(shape)}"
        )
    if shape[1] == 0 or n_head % shape[1]:
        raise ValueError(
            f"decode_attention: {n_head} query heads do not divide among {shape[1]} KV heads"
        )
    if n_new > shape[2]:
        raise ValueError(
            f"decode_attention: q holds {n_new} new tokens; the cache has only {shape[2]} positions"
        )
    if lengths.shape != (n_row,) or lengths.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"decode_attention: lengths is {tuple(lengths.shape)} {lengths.dtype}; it must be "
            f"({n_row},) int32 or int64"
        )
    for name, x in (("k_cache", k_cache), ("v_cache", v_cache)):
        if x.dtype != q.dtype:
            raise ValueError(f"decode_attention: {name} is {x.dtype}; it must be as q, {q.dtype}")


@torch.no_grad()
def decode_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, *, scale: float | None = None
) -> Tensor:
    """Attention of each row's T newest tokens against its KV cache; no gradient (inference only).

        out_t = sum_j softmax_j(scale · q_t · k_j) v_j,   j <= lengths − T + t

    q (B, Hq, T, D), T small; k_cache and v_cache (B, Hkv, S, D), Hq a multiple of Hkv, any strides
    (a slice of a longer cache is not copied); fp32, fp16 or bf16, all the same; D up to 256.
    lengths (B,) int32 or int64: the valid cache positions of each row, its T new tokens included,
    T <= length <= S. They are read on the device: no wait, nothing compiled anew. (So they are not
    checked; a query that would see nothing sees position 0.) scale defaults to 1/sqrt(D). Returns
    (B, Hq, T, D) in q's dtype; sums are fp32.

    Beyond a row's length the cache may hold anything finite. There, and in the other rows, nothing
    changes a bit of the row's result; nor does S, which on CPU must be a multiple of 16 (and fp32).

    Raises ValueError for shapes or dtypes that do not fit. Source: Dao et al. 2023.
    """
    q, k_cache, v_cache = autocast(q, k_cache, v_cache)  # pyright: ignore[reportAssignmentType]
    _check(q, k_cache, v_cache, lengths)
    if not use_triton(q):
        return decode_attention_reference(q, k_cache, v_cache, lengths, scale)
    if q.dtype not in TRITON_TYPE:
        raise ValueError(f"decode_attention: q is {q.dtype}; supported are fp32, fp16 and bf16")
    if q.shape[-1] > MAX_HEAD_DIM:
        raise ValueError(f"decode_attention: heads of {q.shape[-1]} dimensions; at most 256 fit")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    caches = _unit_stride(k_cache), _unit_stride(v_cache)
    return _decode_attention(_unit_stride(q), *caches, lengths.long().contiguous(), scale)
