"""Exact fused attention, forward and backward, that never holds the matrix of scores.

    out_i = sum_j softmax_j(scale · q_i · k_j) v_j,   j over the keys that query i may see

The forward keeps a running maximum and sum over blocks of keys (online softmax) and saves the
log-sum-exp of each row; the backward computes the scores again from it, in two passes without
atomics (queries, then keys), so that gradients repeat bit for bit.

Milakov and Gimelshein 2018, "Online normalizer calculation for softmax"; Dao 2023,
"FlashAttention-2", algorithms 1 and 2.
Shapes: B batch, Hq query heads, Hkv key/value heads, T queries, S keys, D head dimension.
"""

import inspect
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ._runtime import (
    TRITON_TYPE,
    Specialization,
    autocast,
    capability,
    cdiv,
    jit,
    next_power_of_2,
    tl,
    use_triton,
)

MAX_HEAD_DIM = 256
CPU_SCORES = 512 * 512  # on a CPU, queries × keys up to which bf16 scores are kept in memory
LOG2_E = math.log2(math.e)


def attention_reference(
    q: Tensor, k: Tensor, v: Tensor, causal: bool = True, scale: float | None = None
) -> Tensor:
    """The definition, computed in fp32 (fp64 stays fp64) and returned in q's dtype."""
    wide = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[1] // k.shape[1]
    keys, values = (x.to(wide).repeat_interleave(group, 1) for x in (k, v))
    scores = q.to(wide) @ keys.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    n_queries, n_keys = scores.shape[-2:]
    hidden = torch.zeros(n_queries, n_keys, dtype=torch.bool, device=q.device)
    if causal:
        hidden = ~hidden.logical_not().tril(n_keys - n_queries)
    weights = scores.masked_fill(hidden, -math.inf).softmax(-1).masked_fill(hidden, 0.0)
    return (weights @ values).to(q.dtype)


# In the kernels a query block and a key block meet in a tile (BLOCK_T, BLOCK_S). Query i sees the
# keys j <= i + offset: offset is S - T where attention is causal (the last query sees the last key)
# and S where every key is seen. Tiles that are seen whole take the pass without a mask.
# Log-sum-exps are to base 2, of scores times log2(e).


@jit
def _load_rows(
    ptr,
    o_row,
    stride,
    n_rows,
    head_dim,
    MASK_ROWS: tl.constexpr,
    MASK_D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    o_d = tl.arange(0, BLOCK_D)
    pointers = ptr + o_row.to(tl.int64)[:, None] * stride + o_d[None, :]
    if MASK_ROWS and MASK_D:
        mask = (o_row < n_rows)[:, None] & (o_d < head_dim)[None, :]
        return tl.load(pointers, mask=mask, other=0.0)
    elif MASK_ROWS:
        return tl.load(pointers, mask=(o_row < n_rows)[:, None], other=0.0)
    elif MASK_D:
        return tl.load(pointers, mask=(o_d < head_dim)[None, :], other=0.0)
    else:
        return tl.load(pointers)


@jit
def _store_rows(ptr, block, o_row, stride, n_rows, head_dim, BLOCK_D: tl.constexpr):
    o_d = tl.arange(0, BLOCK_D)
    pointers = ptr + o_row.to(tl.int64)[:, None] * stride + o_d[None, :]
    mask = (o_row < n_rows)[:, None] & (o_d < head_dim)[None, :]
    tl.store(pointers, block.to(ptr.dtype.element_ty), mask=mask)


@jit(do_not_specialize=["n_heads", "group", "n_queries", "n_keys", "offset"])
def _attention_forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    stride_q_b,
    stride_q_h,
    stride_q_t,
    stride_k_b,
    stride_k_h,
    stride_k_s,
    stride_v_b,
    stride_v_h,
    stride_v_s,
    stride_out_b,
    stride_out_h,
    stride_out_t,
    n_heads,
    group,
    n_queries,
    n_keys,
    offset,
    head_dim,
    score_scale,
    MASK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    n_blocks = tl.cdiv(n_queries, BLOCK_T)
    i_head = tl.program_id(0) // n_blocks
    # The last queries see the most keys: they start first, so that no long one ends alone.
    start_t = (n_blocks - 1 - tl.program_id(0) % n_blocks) * BLOCK_T
    i_b = (i_head // n_heads).to(tl.int64)
    i_h = (i_head % n_heads).to(tl.int64)
    q_ptr += i_b * stride_q_b + i_h * stride_q_h
    k_ptr += i_b * stride_k_b + i_h // group * stride_k_h
    v_ptr += i_b * stride_v_b + i_h // group * stride_v_h
    out_ptr += i_b * stride_out_b + i_h * stride_out_h
    lse_ptr += i_head.to(tl.int64) * n_queries

    o_t = start_t + tl.arange(0, BLOCK_T)
    b_q = _load_rows(q_ptr, o_t, stride_q_t, n_queries, head_dim, True, MASK_D, BLOCK_D)
    b_out = tl.zeros((BLOCK_T, BLOCK_D), dtype=tl.float32)
    b_sum = tl.zeros((BLOCK_T,), dtype=tl.float32)
    # Finite, so that a row that sees no key has exp2(-inf - b_max) = 0 and never inf - inf.
    b_max = tl.zeros((BLOCK_T,), dtype=tl.float32) - 1e30
    whole = tl.maximum(tl.minimum(n_keys, start_t + offset + 1), 0) // BLOCK_S * BLOCK_S
    seen_end = tl.minimum(n_keys, start_t + BLOCK_T + offset)
    for MASK in tl.static_range(2):
        if MASK:
            first, last = whole, seen_end
        else:
            first, last = 0, whole
        for start_s in range(first, last, BLOCK_S):
            o_s = start_s + tl.arange(0, BLOCK_S)
            b_k = _load_rows(k_ptr, o_s, stride_k_s, n_keys, head_dim, MASK, MASK_D, BLOCK_D)
            b_score = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
            if MASK:
                seen = (o_s < n_keys)[None, :] & (o_s[None, :] <= o_t[:, None] + offset)
                b_score = tl.where(seen, b_score, float("-inf"))
            new_max = tl.maximum(b_max, tl.max(b_score, 1) * score_scale)
            b_p = tl.exp2(b_score * score_scale - new_max[:, None])
            shrink = tl.exp2(b_max - new_max)
            b_sum = b_sum * shrink + tl.sum(b_p, 1)
            b_out = b_out * shrink[:, None]
            b_v = _load_rows(v_ptr, o_s, stride_v_s, n_keys, head_dim, MASK, MASK_D, BLOCK_D)
            b_out = tl.dot(b_p.to(b_v.dtype), b_v, b_out, input_precision="ieee")
            b_max = new_max
    divisor = tl.where(b_sum == 0.0, 1.0, b_sum)
    b_out = b_out / divisor[:, None]
    _store_rows(out_ptr, b_out, o_t, stride_out_t, n_queries, head_dim, BLOCK_D)
    b_lse = tl.where(b_sum == 0.0, float("-inf"), b_max + tl.log2(divisor))
    tl.store(lse_ptr + o_t, b_lse, mask=o_t < n_queries)


@jit(do_not_specialize=["n_heads", "group", "n_queries", "n_keys", "offset"])
def _attention_backward_q_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    dout_ptr,
    dq_ptr,
    lse_ptr,
    delta_ptr,
    stride_q_b,
    stride_q_h,
    stride_q_t,
    stride_k_b,
    stride_k_h,
    stride_k_s,
    stride_v_b,
    stride_v_h,
    stride_v_s,
    stride_out_b,
    stride_out_h,
    stride_out_t,
    stride_dout_b,
    stride_dout_h,
    stride_dout_t,
    stride_dq_b,
    stride_dq_h,
    stride_dq_t,
    n_heads,
    group,
    n_queries,
    n_keys,
    offset,
    head_dim,
    scale,
    score_scale,
    MASK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    n_blocks = tl.cdiv(n_queries, BLOCK_T)
    i_head = tl.program_id(0) // n_blocks
    start_t = (n_blocks - 1 - tl.program_id(0) % n_blocks) * BLOCK_T
    i_b = (i_head // n_heads).to(tl.int64)
    i_h = (i_head % n_heads).to(tl.int64)
    q_ptr += i_b * stride_q_b + i_h * stride_q_h
    k_ptr += i_b * stride_k_b + i_h // group * stride_k_h
    v_ptr += i_b * stride_v_b + i_h // group * stride_v_h
    out_ptr += i_b * stride_out_b + i_h * stride_out_h
    dout_ptr += i_b * stride_dout_b + i_h * stride_dout_h
    dq_ptr += i_b * stride_dq_b + i_h * stride_dq_h
    lse_ptr += i_head.to(tl.int64) * n_queries
    delta_ptr += i_head.to(tl.int64) * n_queries

    o_t = start_t + tl.arange(0, BLOCK_T)
    b_q = _load_rows(q_ptr, o_t, stride_q_t, n_queries, head_dim, True, MASK_D, BLOCK_D)
    b_dout = _load_rows(dout_ptr, o_t, stride_dout_t, n_queries, head_dim, True, MASK_D, BLOCK_D)
    b_out = _load_rows(out_ptr, o_t, stride_out_t, n_queries, head_dim, True, MASK_D, BLOCK_D)
    # The softmax's inner product sum_j p_ij dp_ij, which equals dout_i · out_i.
    b_delta = tl.sum(b_out.to(tl.float32) * b_dout.to(tl.float32), 1)
    tl.store(delta_ptr + o_t, b_delta, mask=o_t < n_queries)
    b_lse = tl.load(lse_ptr + o_t, mask=o_t < n_queries, other=0.0)
    b_dq = tl.zeros((BLOCK_T, BLOCK_D), dtype=tl.float32)
    whole = tl.maximum(tl.minimum(n_keys, start_t + offset + 1), 0) // BLOCK_S * BLOCK_S
    seen_end = tl.minimum(n_keys, start_t + BLOCK_T + offset)
    for MASK in tl.static_range(2):
        if MASK:
            first, last = whole, seen_end
        else:
            first, last = 0, whole
        for start_s in range(first, last, BLOCK_S):
            o_s = start_s + tl.arange(0, BLOCK_S)
            b_k = _load_rows(k_ptr, o_s, stride_k_s, n_keys, head_dim, MASK, MASK_D, BLOCK_D)
            b_v = _load_rows(v_ptr, o_s, stride_v_s, n_keys, head_dim, MASK, MASK_D, BLOCK_D)
            b_score = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
            b_dp = tl.dot(b_dout, tl.trans(b_v), input_precision="ieee")
            b_p = tl.exp2(b_score * score_scale - b_lse[:, None])
            if MASK:
                seen = (o_s < n_keys)[None, :] & (o_s[None, :] <= o_t[:, None] + offset)
                b_p = tl.where(seen, b_p, 0.0)
            b_dscore = b_p * (b_dp - b_delta[:, None])
            b_dq = tl.dot(b_dscore.to(b_k.dtype), b_k, b_dq, input_precision="ieee")
    _store_rows(dq_ptr, b_dq * scale, o_t, stride_dq_t, n_queries, head_dim, BLOCK_D)


@jit(do_not_specialize=["n_heads", "group", "n_queries", "n_keys", "offset"])
def _attention_backward_kv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    dk_ptr,
    dv_ptr,
    lse_ptr,
    delta_ptr,
    stride_q_b,
    stride_q_h,
    stride_q_t,
    stride_k_b,
    stride_k_h,
    stride_k_s,
    stride_v_b,
    stride_v_h,
    stride_v_s,
    stride_dout_b,
    stride_dout_h,
    stride_dout_t,
    stride_dk_b,
    stride_dk_h,
    stride_dk_s,
    stride_dv_b,
    stride_dv_h,
    stride_dv_s,
    n_heads,
    group,
    n_queries,
    n_keys,
    offset,
    head_dim,
    scale,
    score_scale,
    MASK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    n_blocks = tl.cdiv(n_keys, BLOCK_S)
    n_kv_heads = n_heads // group
    i_head = tl.program_id(0) // n_blocks
    start_s = tl.program_id(0) % n_blocks * BLOCK_S  # the first keys are seen most: longest first
    i_b = (i_head // n_kv_heads).to(tl.int64)
    i_h = (i_head % n_kv_heads).to(tl.int64)
    k_ptr += i_b * stride_k_b + i_h * stride_k_h
    v_ptr += i_b * stride_v_b + i_h * stride_v_h
    dk_ptr += i_b * stride_dk_b + i_h * stride_dk_h
    dv_ptr += i_b * stride_dv_b + i_h * stride_dv_h
    q_ptr += i_b * stride_q_b + i_h * group * stride_q_h
    dout_ptr += i_b * stride_dout_b + i_h * group * stride_dout_h
    lse_ptr += (i_b * n_heads + i_h * group) * n_queries
    delta_ptr += (i_b * n_heads + i_h * group) * n_queries

    o_s = start_s + tl.arange(0, BLOCK_S)
    b_k = _load_rows(k_ptr, o_s, stride_k_s, n_keys, head_dim, True, MASK_D, BLOCK_D)
    b_v = _load_rows(v_ptr, o_s, stride_v_s, n_keys, head_dim, True, MASK_D, BLOCK_D)
    b_dk = tl.zeros((BLOCK_S, BLOCK_D), dtype=tl.float32)
    b_dv = tl.zeros((BLOCK_S, BLOCK_D), dtype=tl.float32)
    # One loop over the group's heads and their queries, every tile masked: two passes, or a loop
    # in a loop, hold more live registers than there are (D = 128: 296 bytes of stack).
    first = tl.maximum(start_s - offset, 0) // BLOCK_T * BLOCK_T
    n_steps = tl.cdiv(tl.maximum(n_queries - first, 0), BLOCK_T)
    for step in range(0, group * n_steps):
        member = (step // n_steps).to(tl.int64)
        o_t = first + step % n_steps * BLOCK_T + tl.arange(0, BLOCK_T)
        m_t = o_t < n_queries
        b_q = _load_rows(
            q_ptr + member * stride_q_h,
            o_t,
            stride_q_t,
            n_queries,
            head_dim,
            True,
            MASK_D,
            BLOCK_D,
        )
        # Past the last query lse = inf makes every weight 0.
        b_lse = tl.load(lse_ptr + member * n_queries + o_t, mask=m_t, other=float("inf"))
        b_score = tl.dot(b_k, tl.trans(b_q), input_precision="ieee")
        b_p = tl.exp2(b_score * score_scale - b_lse[None, :])
        b_p = tl.where(o_s[:, None] <= o_t[None, :] + offset, b_p, 0.0)
        b_dout = _load_rows(
            dout_ptr + member * stride_dout_h,
            o_t,
            stride_dout_t,
            n_queries,
            head_dim,
            True,
            MASK_D,
            BLOCK_D,
        )
        b_dv = tl.dot(b_p.to(b_dout.dtype), b_dout, b_dv, input_precision="ieee")
        b_dp = tl.dot(b_v, tl.trans(b_dout), input_precision="ieee")
        b_delta = tl.load(delta_ptr + member * n_queries + o_t, mask=m_t, other=0.0)
        b_dscore = b_p * (b_dp - b_delta[None, :])
        b_dk = tl.dot(b_dscore.to(b_q.dtype), b_q, b_dk, input_precision="ieee")
    _store_rows(dk_ptr, b_dk * scale, o_s, stride_dk_s, n_keys, head_dim, BLOCK_D)
    _store_rows(dv_ptr, b_dv, o_s, stride_dv_s, n_keys, head_dim, BLOCK_D)


@dataclass(frozen=True)
class Tiles:
    """How a kernel cuts its work: queries and keys in a tile, warps, and stages of the pipeline."""

    block_t: int
    block_s: int
    num_warps: int
    num_stages: int


KERNELS = {
    "forward": _attention_forward_kernel,
    "backward_q": _attention_backward_q_kernel,
    "backward_kv": _attention_backward_kv_kernel,
}

# By kernel and chip, then by padded head dimension. "large" is for 227 KB of shared memory (sm_90,
# sm_100), "small" for 99 KB, which all others and the interpreter have; "fp32" is for IEEE
# products, which no matrix unit makes. None spills more than 56 bytes a thread.
TILES = {
    ("forward", "large"): {
        32: Tiles(128, 128, 8, 3),
        64: Tiles(128, 128, 8, 3),
        128: Tiles(128, 128, 8, 2),
        256: Tiles(128, 64, 8, 2),
    },
    ("forward", "small"): {
        32: Tiles(128, 64, 4, 3),
        64: Tiles(128, 64, 4, 3),
        128: Tiles(128, 64, 8, 2),
        256: Tiles(64, 32, 8, 2),
    },
    ("forward", "fp32"): {
        32: Tiles(64, 64, 8, 2),
        64: Tiles(64, 32, 8, 2),
        128: Tiles(32, 16, 8, 1),
        256: Tiles(16, 16, 8, 2),
    },
    ("backward_q", "large"): {
        32: Tiles(128, 128, 8, 2),
        64: Tiles(128, 128, 8, 2),
        128: Tiles(128, 64, 8, 3),
        256: Tiles(64, 32, 8, 2),
    },
    ("backward_q", "small"): {
        32: Tiles(128, 64, 8, 2),
        64: Tiles(128, 64, 8, 2),
        128: Tiles(64, 64, 8, 2),
        256: Tiles(32, 32, 8, 2),
    },
    ("backward_q", "fp32"): {
        32: Tiles(64, 32, 8, 2),
        64: Tiles(64, 32, 8, 2),
        128: Tiles(32, 16, 4, 2),
        256: Tiles(16, 16, 8, 2),
    },
    ("backward_kv", "large"): {
        32: Tiles(64, 128, 8, 3),
        64: Tiles(64, 128, 8, 3),
        128: Tiles(64, 128, 8, 2),
        256: Tiles(32, 64, 8, 2),
    },
    ("backward_kv", "small"): {
        32: Tiles(64, 128, 8, 2),
        64: Tiles(64, 128, 8, 2),
        128: Tiles(64, 64, 8, 2),
        256: Tiles(32, 32, 8, 1),
    },
    ("backward_kv", "fp32"): {
        32: Tiles(32, 32, 4, 1),
        64: Tiles(32, 64, 8, 1),
        128: Tiles(32, 32, 8, 2),
        256: Tiles(16, 16, 8, 1),
    },
}


def _block_d(head_dim: int) -> int:
    return max(32, next_power_of_2(head_dim))


def _tiles(kernel: str, head_dim: int, dtype: str, capability: int) -> Tiles:
    if dtype == "fp32" and capability:
        chip = "fp32"
    else:
        chip = "large" if capability in (90, 100, 103) else "small"
    return TILES[kernel, chip][_block_d(head_dim)]


def _masks_head_dim(head_dim: int, dtype: str) -> bool:
    return head_dim != _block_d(head_dim) or dtype == "fp32"  # fp32: slow enough for one variant


def _specialization(name: str, head_dim: int, dtype: str, capability: int) -> Specialization:
    tiles = _tiles(name, head_dim, dtype, capability)
    signature = {}
    for argument in inspect.signature(KERNELS[name].fn).parameters:
        if argument in ("lse_ptr", "delta_ptr"):
            signature[argument] = "*fp32:16"
        elif argument.endswith("_ptr"):
            signature[argument] = f"*{dtype}:16"
        elif argument.startswith("stride") or argument == "head_dim":
            signature[argument] = "i32:16"
        elif argument.endswith("scale"):
            signature[argument] = "fp32"
        elif not argument.isupper():
            signature[argument] = "i32"
    return Specialization(
        KERNELS[name],
        signature,
        dict(
            MASK_D=_masks_head_dim(head_dim, dtype),
            BLOCK_T=tiles.block_t,
            BLOCK_S=tiles.block_s,
            BLOCK_D=_block_d(head_dim),
        ),
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        matrix=dtype != "fp32",  # IEEE products of fp32 take no matrix unit
    )


def specializations(capability: int) -> Iterator[Specialization]:
    """Every way in which the launchers below can compile the kernels.

    fp16 takes bf16's tiles and the same instructions but for the type, so it is here once.
    """
    for name in KERNELS:
        for block_d in (32, 64, 128, 256):
            for dtype, head_dim in (("bf16", block_d), ("bf16", block_d - 16), ("fp32", block_d)):
                yield _specialization(name, head_dim, dtype, capability)
        yield _specialization(name, 64, "fp16", capability)


def _aligned(x: Tensor) -> Tensor:
    """x, or a copy of it, such that rows start at multiples of 16 elements and have no gaps."""
    aligned = x.stride(-1) == 1 and x.data_ptr() % 16 == 0
    if aligned and all(stride % 16 == 0 for stride in _strides(x)):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _like(x: Tensor) -> Tensor:
    """Empty, in x's layout if that has the last dimension innermost, else contiguous."""
    y = torch.empty_like(x)
    contiguous = torch.contiguous_format
    return y if y.stride(-1) == 1 else torch.empty_like(x, memory_format=contiguous)


def _strides(x: Tensor) -> tuple[int, ...]:
    """Of all dimensions but the last; 0 where there is one entry, whose stride means nothing."""
    sizes_strides = zip(x.shape[:-1], x.stride()[:-1], strict=True)
    return tuple(stride if size > 1 else 0 for size, stride in sizes_strides)


def _launch(
    name: str,
    tensors: list[Tensor],
    rows: list[Tensor],
    q: Tensor,
    k: Tensor,
    causal: bool,
    scales: list[float],
) -> None:
    """Run one kernel on `tensors` (B, H, length, D) and `rows` (B, Hq, T).

    There is a program for each block of queries, or of keys in "backward_kv", of each head.
    """
    batch, n_heads, n_queries, head_dim = q.shape
    n_kv_heads, n_keys = k.shape[1:3]
    dtype = TRITON_TYPE[q.dtype]
    tiles = _tiles(name, head_dim, dtype, capability(q.device))
    if name == "backward_kv":
        n_programs = cdiv(n_keys, tiles.block_s) * batch * n_kv_heads
    else:
        n_programs = cdiv(n_queries, tiles.block_t) * batch * n_heads
    if n_programs:
        KERNELS[name][(n_programs,)](
            *tensors,
            *rows,
            *(stride for x in tensors for stride in _strides(x)),
            n_heads,
            n_heads // n_kv_heads,
            n_queries,
            n_keys,
            n_keys - n_queries if causal else n_keys,
            head_dim,
            *scales,
            MASK_D=_masks_head_dim(head_dim, dtype),
            BLOCK_T=tiles.block_t,
            BLOCK_S=tiles.block_s,
            BLOCK_D=_block_d(head_dim),
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
        )


@torch.library.custom_op("ponder::attention", mutates_args=())
def _attention(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """(out in q's layout, log-sum-exp to base 2 (B, Hq, T)); D is a multiple of 16."""
    out = _like(q)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    q, k, v = _aligned(q), _aligned(k), _aligned(v)
    _launch("forward", [q, k, v, out], [lse], q, k, causal, [scale * LOG2_E])
    return out, lse


@_attention.register_fake
def _(q, k, v, causal, scale):
    return _like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("ponder::attention_backward", mutates_args=())
def _attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv); out, log-sum-exp and the rest are as the forward had them."""
    dq, dk, dv = _like(q), _like(k), _like(v)
    delta = torch.empty_like(lse)  # dout · out of each row: the first kernel writes it
    dout, q, k, v, out = (_aligned(x) for x in (dout, q, k, v, out))
    scales = [scale, scale * LOG2_E]
    _launch("backward_q", [q, k, v, out, dout, dq], [lse, delta], q, k, causal, scales)
    _launch("backward_kv", [q, k, v, dout, dk, dv], [lse, delta], q, k, causal, scales)
    return dq, dk, dv


@_attention_backward.register_fake
def _(dout, q, k, v, out, lse, causal, scale):
    return _like(q), _like(k), _like(v)


def _setup_context(ctx, inputs, output):
    q, k, v, ctx.causal, ctx.scale = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, out, lse)


def _backward(ctx, dout, _):
    grads = _attention_backward(dout, *ctx.saved_tensors, ctx.causal, ctx.scale)
    return *grads, None, None


_attention.register_autograd(_backward, setup_context=_setup_context)


def _attention_cpu(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Tensor:
    n_queries, n_keys = q.shape[2], k.shape[2]
    mask = None
    if n_queries == 1:  # the last query, which sees every key
        causal = False
    elif causal and n_queries != n_keys:  # PyTorch's is_causal aligns the first query and key
        shape = (n_queries, n_keys)
        mask = torch.ones(shape, dtype=torch.bool, device=q.device).tril(n_keys - n_queries)
        causal = False
    short = 1 < n_queries <= n_keys and n_queries * n_keys <= CPU_SCORES
    if q.dtype == torch.bfloat16 and short:
        return _attention_cpu_short(q, k, v, causal, mask, scale)
    return torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=True
    )


def _attention_cpu_short(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None, scale: float
) -> Tensor:
    """bf16 products with the scores in memory: PyTorch's flash kernel does bf16 without the CPU's
    bf16 units (256 × 3 × 40 × 32, forward and backward: 150 ms a thread against 10)."""
    (B, Hq, T, D), (Hkv, S) = q.shape, k.shape[1:3]
    if causal:
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril()
    q = (q * scale).reshape(B * Hkv, Hq // Hkv * T, D)
    k, v = k.reshape(B * Hkv, S, D), v.reshape(B * Hkv, S, v.shape[-1])
    scores = torch.bmm(q, k.transpose(1, 2))
    if mask is not None:
        hidden = torch.zeros(T, S, dtype=q.dtype).masked_fill_(~mask, float("-inf"))
        scores = (scores.view(-1, T, S) + hidden).view(scores.shape)
    return torch.bmm(torch.softmax(scores, -1), v).view(B, Hq, T, v.shape[-1])


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True, scale: float | None = None
) -> Tensor:
    """Exact softmax attention: out_i = sum_j softmax_j(scale · q_i · k_j) v_j.

    q (B, Hq, T, D); k and v (B, Hkv, S, D); Hq a multiple of Hkv: query head h reads key head
    h // (Hq / Hkv). fp32 (IEEE products), fp16 or bf16, D up to 256, any strides, any T and S.
    Where causal, the last query is aligned with the last key: query i sees the keys
    j <= i + S - T, and a query that sees none gives 0. scale defaults to 1 / sqrt(D).
    Returns (B, Hq, T, D) in q's dtype and layout. Scores, softmax and sums are fp32; gradients
    are deterministic; memory grows with T + S, not T × S.

    Raises ValueError for shapes or dtypes that do not fit. Source: Dao 2023, "FlashAttention-2:
    Faster Attention with Better Parallelism and Work Partitioning", algorithms 1 and 2.
    """
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not q.ndim == k.ndim == v.ndim == 4:
        raise ValueError(f"attention: {shapes}; each must have 4 dimensions, (B, H, T, D)")
    batch, n_heads, _, head_dim = q.shape
    if k.shape != v.shape or k.shape[0] != batch or k.shape[3] != head_dim:
        raise ValueError(
            f"attention: {shapes}; k and v must be alike, with q's batch {batch} and head "
            f"dimension {head_dim}"
        )
    if k.shape[1] == 0 or n_heads % k.shape[1]:
        raise ValueError(
            f"attention: q has {n_heads} heads; they must be a multiple of k's {k.shape[1]}"
        )
    q, k, v = autocast(q, k, v)  # pyright: ignore[reportAssignmentType]
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"attention: q is {q.dtype}, k {k.dtype}, v {v.dtype}; they must be alike")
    scale = float(head_dim**-0.5 if scale is None else scale)
    if not 0.0 < scale < math.inf:
        raise ValueError(f"attention: scale is {scale}; it must be a positive number")
    if not use_triton(q):
        return _attention_cpu(q, k, v, causal, scale)
    if q.dtype not in TRITON_TYPE:
        raise ValueError(f"attention: q is {q.dtype}; supported are fp32, fp16 and bf16")
    if head_dim > MAX_HEAD_DIM:
        raise ValueError(f"attention: the head dimension is {head_dim}; at most {MAX_HEAD_DIM}")
    padding = -head_dim % 16
    if padding:  # so that every row is aligned; other head dimensions are padded in the kernel
        q, k, v = (torch.nn.functional.pad(x, (0, padding)) for x in (q, k, v))
    return _attention(q, k, v, causal, scale)[0][..., :head_dim]
