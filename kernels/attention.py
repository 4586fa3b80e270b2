"""Exact fused attention, forward and backward, that never holds the matrix of scores.

    out_i = sum_j softmax_j(scale · q_i · k_j) v_j,   j over the keys that query i may see

The forward keeps a running maximum and sum over blocks of keys (online softmax) and saves the
log-sum-exp of each row; the backward computes the scores again from it, in two passes without
atomics (queries, then keys), so that gradients repeat bit for bit, or in one where they need not.

Milakov and Gimelshein 2018, "Online normalizer calculation for softmax"; Dao 2023,
"FlashAttention-2", algorithms 1 and 2.
Shapes: B batch, Hq query heads, Hkv key/value heads, T queries, S keys, D head dimension.
"""

import functools
import inspect
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _attention_cpu
from ._attention_hopper import (
    attention_backward_kv_specialized_kernel,
    attention_backward_q_specialized_kernel,
    attention_forward_specialized_kernel,
)
from ._attention_kernels import (
    attention_backward_kv_kernel,
    attention_backward_q_kernel,
    attention_forward_kernel,
)
from ._attention_masks import (
    ROW,
    Segments,
    diagonal,
    distances,
    packed_segments,
    packed_spans,
    spans,
    visible,
)
from ._attention_one_pass import attention_backward_kernel, attention_delta_kernel
from ._attention_tiles import SPECIALIZED_TILES, Tiles, block_d, choose
from ._runtime import (
    TRITON_TYPE,
    Specialization,
    autocast,
    capability,
    cdiv,
    check_device,
    check_dtype,
    empty_like,
    interpreting,
    launch,
    operation,
    use_triton,
)

MAX_HEAD_DIM = 256
KEPT = 1024  # layouts for which what follows from them is kept
CONTIGUOUS = torch.contiguous_format
LOG2_E, LN_2 = math.log2(math.e), math.log(2)


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool = True,
    scale: float | None = None,
    *,
    window: int | None = None,
    segment_ids: Segments | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The definition, computed in fp32 (fp64 stays fp64); out is returned in q's dtype."""
    wide = torch.promote_types(q.dtype, torch.float32)
    group, n_queries, n_keys = q.shape[1] // k.shape[1], q.shape[2], k.shape[2]
    keys, values = (x.to(wide).repeat_interleave(group, 1) for x in (k, v))
    scores = q.to(wide) @ keys.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if alibi_slopes is not None:
        distance = distances(n_queries, n_keys, q.device).abs()
        scores = scores - alibi_slopes.to(wide)[:, None, None] * distance
    hidden = ~visible(n_queries, n_keys, causal, window, segment_ids, q.device)
    scores = scores.masked_fill(hidden, -math.inf)
    if sinks is not None:
        sink = sinks.to(wide)[:, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sink], -1)
    weights = scores.softmax(-1)[..., :n_keys].masked_fill(hidden, 0.0)
    out = (weights @ values).to(q.dtype)
    return (out, scores.logsumexp(-1)) if return_lse else out


KERNELS = {
    "forward": attention_forward_kernel,
    "backward_q": attention_backward_q_kernel,
    "backward_kv": attention_backward_kv_kernel,
}


SPECIALIZED = {
    "forward": attention_forward_specialized_kernel,
    "backward_q": attention_backward_q_specialized_kernel,
    "backward_kv": attention_backward_kv_specialized_kernel,
    "backward": attention_backward_kernel,
    "delta": attention_delta_kernel,
}


def _kernel(name: str, tiles: Tiles) -> Any:
    return (SPECIALIZED if tiles.specialized else KERNELS)[name]


def _masks(head_dim: int, dtype: str) -> bool:
    return head_dim != block_d(head_dim) or dtype == "fp32"  # fp32: slow enough for one variant


def _constants(
    name: str, head_dim: int, head_dim_v: int, dtype: str, tiles: Tiles
) -> dict[str, Any]:
    # The interpreter has no reduction by TMA.
    own = dict(TMA=not interpreting()) if name == "backward" else {}
    if name in ("forward", "backward_kv") and not tiles.specialized:
        own = dict(LATE=tiles.late)
    return dict(
        **own,
        MASK_D=_masks(head_dim, dtype),
        MASK_DV=_masks(head_dim_v, dtype),
        BLOCK_T=tiles.block_t,
        BLOCK_S=tiles.block_s,
        BLOCK_D=block_d(head_dim),
        BLOCK_DV=block_d(head_dim_v),
    )


# The arguments of each feature; they are None where it is not used.
OPTIONS = dict(
    sinks=["sinks_ptr"],
    lse=["dlse_ptr"],
    alibi=["slopes_ptr"],
    segments=["q_spans_ptr", "kv_spans_ptr"],
    window=["width"],
    softcap=["cap_scale"],
)


FP32 = ("lse_ptr", "delta_ptr", "dlse_ptr", "sinks_ptr", "slopes_ptr", "dq_sum_ptr")


def _specialization(
    name: str,
    head_dim: int,
    dtype: str,
    capability: int,
    options: Collection[str] = (),
    head_dim_v: int | None = None,
    tiles: Tiles | None = None,
) -> Specialization:
    tiles = tiles or choose(name, max(head_dim, head_dim_v or 0), dtype, capability, tuple(options))
    assert tiles, f"no tiles for {name}"
    kernel = _kernel(name, tiles)
    unused = {x for option, xs in OPTIONS.items() if option not in options for x in xs}
    if head_dim_v is None:
        unused.add("head_dim_v")
    signature = {}
    constants = _constants(name, head_dim, head_dim_v or head_dim, dtype, tiles)
    for argument in inspect.signature(kernel.fn).parameters:
        if argument in unused:
            constants[argument] = None
        elif argument in FP32:
            signature[argument] = "*fp32:16"
        elif argument.endswith("spans_ptr"):
            signature[argument] = "*i32:16"
        elif argument.endswith("_ptr"):
            signature[argument] = f"*{dtype}:16"
        elif argument.startswith(("stride", "head_dim")):
            signature[argument] = "i32:16"
        elif argument.endswith("scale"):
            signature[argument] = "fp32"
        elif not argument.isupper():
            signature[argument] = "i32"
    return Specialization(
        kernel,
        signature,
        constants,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        matrix=dtype != "fp32" and name != "delta",  # IEEE products of fp32 take no matrix unit
    )


def specializations(capability: int) -> Iterator[Specialization]:
    """Every way in which the launchers below can compile the kernels without options, and a cover
    of those with: all at once (the most registers) at every head dimension, each alone at one
    (what it leaves out), and values wider and narrower than keys.

    fp16 takes bf16's tiles and the same instructions but for the type, so it is here once.
    """
    for name in KERNELS:
        for block in (32, 64, 128, 256):
            for dtype, head_dim in (("bf16", block), ("bf16", block - 16), ("fp32", block)):
                yield _specialization(name, head_dim, dtype, capability)
            for dtype in ("bf16", "fp32"):
                yield _specialization(name, block, dtype, capability, OPTIONS)
        yield _specialization(name, 64, "fp16", capability)
        arguments = inspect.signature(KERNELS[name].fn).parameters
        for option, (needed, *_) in OPTIONS.items():
            if needed in arguments and capability == 90:  # all at once tell of the other chips
                yield _specialization(name, 128, "bf16", capability, [option])
        yield _specialization(name, 64, "bf16", capability, head_dim_v=256)
        yield _specialization(name, 192, "bf16", capability, OPTIONS, head_dim_v=128)
    if capability == 90:
        for (name, block), tiles in SPECIALIZED_TILES.items():
            for head_dim in (block, block - 16):
                options = ["lse"] if name == "delta" and head_dim < block else []
                yield _specialization(name, head_dim, "bf16", capability, options, tiles=tiles)


def _strides(shape: torch.Size, stride: tuple[int, ...]) -> list[int]:
    """Of all dimensions but the last; 0 where there is one entry, whose stride means nothing."""
    *strides, _ = [s if n > 1 else 0 for n, s in zip(shape, stride, strict=True)]
    return strides


@functools.lru_cache(maxsize=KEPT)
def _even(shape: torch.Size, stride: tuple[int, ...]) -> bool:
    """Whether rows start at multiples of 16 elements from the first and have no gaps."""
    return stride[-1] == 1 and all(s % 16 == 0 for s in _strides(shape, stride))


def _aligned(x: Tensor) -> Tensor:
    """x, or a copy of it, such that rows start at multiples of 16 elements and have no gaps."""
    aligned = x.data_ptr() % 16 == 0 and _even(x.shape, x.stride())
    return x if aligned else x.clone(memory_format=CONTIGUOUS)


def _per_query(q: Tensor, past: float | None = None) -> Tensor:
    """A number for each query of each head: (B, Hq, T up to a multiple of ROW) in fp32; `past` is
    what the kernels shall find past the last query."""
    batch, n_heads, n_queries, _ = q.shape
    length = cdiv(n_queries, ROW) * ROW
    numbers = q.new_empty((batch, n_heads, length), dtype=torch.float32)
    if past is not None and n_queries < length:
        numbers.fill_(past)
    return numbers


def _expanded(x: Tensor) -> bool:
    return any(size > 1 and not stride for size, stride in zip(x.shape, x.stride(), strict=True))


class Scores(NamedTuple):
    """How a query and a key make a score, and which keys a query sees."""

    slopes: Tensor | None  # (Hq,)
    q_spans: Tensor | None  # of _attention_masks.spans
    kv_spans: Tensor | None
    causal: bool
    window: int | None
    softcap: float | None
    scale: float
    sinks: Tensor | None = None

    @property
    def options(self) -> tuple[str, ...]:
        values = self.slopes, self.q_spans, self.window, self.softcap, self.sinks
        names = "alibi", "segments", "window", "softcap", "sinks"
        return tuple(n for n, v in zip(names, values, strict=True) if v is not None)


Shapes = tuple[Tensor, Tensor, Tensor]  # q, k and v, whose sizes are meant


def _tiles(name: str, like: Shapes, scores: Scores) -> Tiles | None:
    q, _, v = like
    asked = scores.options
    if q.shape[3] != v.shape[3]:
        asked += ("unequal",)
    widest = max(q.shape[3], v.shape[3])
    return choose(name, widest, TRITON_TYPE[q.dtype], capability(q.device), asked)


@functools.lru_cache(maxsize=KEPT)
def _arguments(
    name: str,
    shapes: tuple[torch.Size, ...],
    dtype: str,
    layouts: tuple[tuple[torch.Size, tuple[int, ...]], ...],
    tiles: Tiles,
    causal: bool,
    window: int | None,
    softcap: float | None,
    scale: float,
) -> tuple[int, tuple[float | None, ...], Mapping[str, Any]]:
    """(programs, numbers, constants) of a launch, from the shapes of q, k and v, and the (shape,
    stride) of each tensor that the kernel takes.

    There is a program for each block of queries, or in "backward_kv" and "backward" of keys, of
    each head.
    """
    (batch, n_heads, n_queries, head_dim), (_, n_kv_heads, n_keys, _), (*_, head_dim_v) = shapes
    if name in ("backward_kv", "backward"):
        n_programs = cdiv(n_keys, tiles.block_s) * batch * n_kv_heads
    else:
        n_programs = cdiv(n_queries, tiles.block_t) * batch * n_heads
    offset, width = diagonal(n_queries, n_keys, causal, window)
    numbers = (
        *[stride for layout in layouts for stride in _strides(*layout)],
        n_heads,
        n_heads // n_kv_heads,
        n_queries,
        n_keys,
        offset,
        head_dim,
        None if head_dim_v == head_dim else head_dim_v,
        *([] if name == "forward" else [scale]),
        _unit(softcap, scale) * LOG2_E,
        None if softcap is None else scale / softcap,
        width,
    )
    constants = _constants(name, head_dim, head_dim_v, dtype, tiles)
    return (
        n_programs,
        numbers,
        dict(constants, num_warps=tiles.num_warps, num_stages=tiles.num_stages),
    )


def _unit(softcap: float | None, scale: float) -> float:
    """Of scores: unit · (tanh(cap_scale · q · k) or q · k - slope · distance), slopes in it too."""
    return scale if softcap is None else softcap


def _launch(
    name: str,
    tensors: list[Tensor],
    rows: Sequence[Tensor | None],
    like: Shapes,
    scores: Scores,
) -> None:
    """Run one kernel on `tensors` (B, H, length, D) and `rows` (B, Hq, T), sized as q, k and v."""
    tiles = _tiles(name, like, scores)
    assert tiles, f"no tiles for {name}"
    if tiles.specialized:
        tensors = [x.clone(memory_format=CONTIGUOUS) if _expanded(x) else x for x in tensors]
    slopes, q_spans, kv_spans, causal, window, softcap, scale, _ = scores
    n_programs, numbers, constants = _arguments(
        name,
        tuple([x.shape for x in like]),
        TRITON_TYPE[like[0].dtype],
        tuple([(x.shape, x.stride()) for x in tensors]),
        tiles,
        causal,
        window,
        softcap,
        scale,
    )
    if slopes is not None:
        slopes = slopes / _unit(softcap, scale)
    if n_programs:
        launch(
            _kernel(name, tiles),
            n_programs,
            (*tensors, *rows, slopes, q_spans, kv_spans),
            numbers,
            descriptors=tiles.specialized,
            **constants,
        )


@operation("ponder::attention")
def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    slopes: Tensor | None,
    q_spans: Tensor | None,
    kv_spans: Tensor | None,
    causal: bool,
    window: int | None,
    softcap: float | None,
    scale: float,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    """(out in q's layout, log-sum-exp to base 2 of `_per_query`); all D are multiples of 16.

    deterministic is for the backward."""
    out = empty_like(q, v.shape[-1])
    lse = _per_query(q, math.inf)
    q, k, v = _aligned(q), _aligned(k), _aligned(v)
    rows = [lse, None if sinks is None else sinks * LOG2_E]
    scores = Scores(slopes, q_spans, kv_spans, causal, window, softcap, scale, sinks)
    _launch("forward", [q, k, v, out], rows, (q, k, v), scores)
    return out, lse


@_attention.register_fake
def _(q, k, v, *_):
    return empty_like(q, v.shape[-1]), _per_query(q)


@operation("ponder::attention_backward")
def _attention_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    slopes: Tensor | None,
    q_spans: Tensor | None,
    kv_spans: Tensor | None,
    causal: bool,
    window: int | None,
    softcap: float | None,
    scale: float,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, delta); out, log-sum-exp and the rest are as the forward had them.

    dlse is the gradient of the log-sum-exp to base 2. delta, of `_per_query`, is what every key's
    dp falls by in dscore = p (dp - delta): dout · out - dlse · log2(e).
    """
    dq, dk, dv = empty_like(q), empty_like(k), empty_like(v)
    delta = _per_query(q, 0.0)  # the first kernel writes it
    dlse = None if dlse is None else (dlse * LOG2_E).contiguous()
    dout, q, k, v, out = (_aligned(x) for x in (dout, q, k, v, out))
    scores = Scores(slopes, q_spans, kv_spans, causal, window, softcap, scale)
    like, rows = (q, k, v), [lse, delta]
    to_queries = _tiles("backward_q", like, scores)
    deterministic = deterministic or (
        torch.are_deterministic_algorithms_enabled()
        and not torch.is_deterministic_algorithms_warn_only_enabled()
    )
    one_pass = not deterministic and _tiles("backward", like, scores) is not None
    if one_pass or (to_queries and to_queries.specialized):
        _launch("delta", [out, dout], [delta, dlse], like, scores)
    if one_pass:
        dq_sum = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
        _launch("backward", [q, k, v, dout, dq_sum, dk, dv], rows, like, scores)
        torch.mul(dq_sum, scale, out=dq)
        return dq, dk, dv, delta
    if to_queries and to_queries.specialized:
        _launch("backward_q", [q, k, v, dout, dq], rows, like, scores)
    else:
        _launch("backward_q", [q, k, v, out, dout, dq], [*rows, dlse], like, scores)
    _launch("backward_kv", [q, k, v, dout, dk, dv], rows, like, scores)
    return dq, dk, dv, delta


@_attention_backward.register_fake
def _(dout, dlse, q, k, v, out, lse, *_):
    return empty_like(q), empty_like(k), empty_like(v), torch.empty_like(lse)


def _setup_context(ctx, inputs, output):
    q, k, v, sinks, *ctx.rules = inputs
    ctx.save_for_backward(q, k, v, *output, sinks, *ctx.rules[:3])
    ctx.rules = ctx.rules[3:]
    ctx.set_materialize_grads(False)  # the log-sum-exp is rarely differentiated


def _backward(ctx, dout, dlse):
    q, k, v, out, lse, sinks, *tables = ctx.saved_tensors
    dout = torch.zeros_like(out) if dout is None else dout
    *grads, delta = _attention_backward(dout, dlse, q, k, v, out, lse, *tables, *ctx.rules)
    dsinks = None
    if sinks is not None:  # a sink is a key of value 0, seen by all rows of its head
        weight = torch.exp2(sinks[:, None] * LOG2_E - lse)
        dsinks = -(weight.masked_fill(lse == -math.inf, 0.0) * delta).sum((0, 2))
    return *grads, dsinks, *[None] * (len(tables) + len(ctx.rules))


_attention.register_autograd(_backward, setup_context=_setup_context)


def _attention_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    window: int | None,
    segments: Segments | None,
    scale: float,
) -> Tensor:
    n_queries, n_keys = q.shape[2], k.shape[2]
    mask = None
    if window is not None or segments is not None:
        mask = visible(n_queries, n_keys, causal, window, segments, q.device)
        causal = False
    elif n_queries == 1:  # the last query, which sees every key
        causal = False
    elif causal and n_queries != n_keys:  # PyTorch's is_causal aligns the first query and key
        shape = (n_queries, n_keys)
        mask = torch.ones(shape, dtype=torch.bool, device=q.device).tril(n_keys - n_queries)
        causal = False
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=True
    )


def _segments(
    q: Tensor,
    k: Tensor,
    segment_ids: Tensor | Segments | None,
    cu_seqlens: Tensor | None,
) -> Segments | None:
    """The queries' and the keys' segment ids, checked, from either way to give them."""
    batch, n_queries, n_keys = q.shape[0], q.shape[2], k.shape[2]
    if cu_seqlens is not None:
        if segment_ids is not None:
            raise ValueError("attention: cu_seqlens and segment_ids are given; only one may be")
        if batch != 1 or n_queries != n_keys:
            raise ValueError(
                f"attention: cu_seqlens needs one row with as many queries as keys; q is "
                f"{tuple(q.shape)}, k {tuple(k.shape)}"
            )
        if cu_seqlens.ndim != 1 or len(cu_seqlens) < 2:
            raise ValueError(
                f"attention: cu_seqlens is {tuple(cu_seqlens.shape)}; it must be (sequences + 1,)"
            )
        _check_integers("cu_seqlens", cu_seqlens, q)
        return packed_segments(cu_seqlens, n_queries)
    if segment_ids is None:
        return None
    ids = (segment_ids, segment_ids) if isinstance(segment_ids, Tensor) else segment_ids
    if len(ids) != 2:
        raise ValueError(f"attention: segment_ids holds {len(ids)} tensors; a pair has two")
    for x, n, side in zip(ids, (n_queries, n_keys), ("queries", "keys"), strict=True):
        if x.shape != (batch, n):
            raise ValueError(
                f"attention: segment_ids of the {side} are {tuple(x.shape)}; they must be "
                f"{(batch, n)}, and a pair where there are other keys than queries"
            )
        _check_integers("segment_ids", x, q)
    return ids


def _check_integers(name: str, x: Tensor, q: Tensor) -> None:
    if x.dtype not in (torch.int32, torch.int64) or x.device != q.device:
        raise ValueError(
            f"attention: {name} is {x.dtype} on {x.device}; it must be int32 or int64 on {q.device}"
        )


def _shapes(q: Tensor, k: Tensor, v: Tensor) -> str:
    return f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"


def _check_per_head(name: str, x: Tensor | None, q: Tensor) -> None:
    if x is None:
        return
    if x.shape != q.shape[1:2] or not x.is_floating_point() or x.device != q.device:
        raise ValueError(
            f"attention: {name} is {tuple(x.shape)} {x.dtype} on {x.device}; it must hold a float "
            f"for each of q's {q.shape[1]} heads, on {q.device}"
        )


def _check_options(
    q: Tensor,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    scale: float,
) -> None:
    if not 0.0 < scale < math.inf:
        raise ValueError(f"attention: scale is {scale}; it must be a positive number")
    if window is not None and window < 1:
        raise ValueError(f"attention: window is {window}; it must be a positive number of keys")
    if softcap is not None and not 0.0 < softcap < math.inf:
        raise ValueError(f"attention: softcap is {softcap}; it must be a positive number")
    _check_per_head("sinks", sinks, q)
    _check_per_head("alibi_slopes", alibi_slopes, q)
    if alibi_slopes is not None and alibi_slopes.requires_grad:
        raise ValueError("attention: alibi_slopes requires grad; slopes have none, detach them")


@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: Literal[False] = False, **options: Any
) -> Tensor: ...


@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: Literal[True], **options: Any
) -> tuple[Tensor, Tensor]: ...


def attention(  # pyright: ignore[reportInconsistentOverload]  (options are spelled out here)
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    window: int | None = None,
    segment_ids: Tensor | tuple[Tensor, Tensor] | None = None,
    cu_seqlens: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    deterministic: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact softmax attention: out_i = sum_j softmax_j(score_ij) v_j, score = scale · q_i · k_j.

    q (B, Hq, T, D); k (B, Hkv, S, D); v (B, Hkv, S, Dv); Hq a multiple of Hkv: query head h reads
    key head h // (Hq / Hkv). fp32 (IEEE products), fp16 or bf16, D and Dv up to 256, any strides,
    any T and S. Returns (B, Hq, T, Dv) in q's dtype and layout. Scores, softmax and sums are fp32;
    memory grows with T + S, not T × S.

    Query i stands beside key p = i + S - T: the last query is aligned with the last key. It sees
      causal       the keys j <= p;
      window       those with |p - j| < window: where causal, the last `window` up to p;
      segment_ids  those of its own segment: int32 or int64 (B, T), or a pair of the queries'
                   (B, T) and the keys' (B, S); any ids in any order, fastest where a segment has
                   no gap;
      cu_seqlens   those of its own sequence, where one row (B = 1, T = S) holds many end to end:
                   sequence n is [cu_seqlens[n], cu_seqlens[n + 1]), int32 or int64, rising from 0
                   (the values stay on the device, unchecked; positions past the last are one
                   more sequence). New lengths need no new compilation.
    Blocks of keys that no query of a block can see are not visited. A query that sees no key
    gives 0.

    A score is, in this order,
      scale         times q_i · k_j, by default 1 / sqrt(D);
      softcap       softcap · tanh(score / softcap);
      alibi_slopes  minus slope · |p - j|, (Hq,), without gradient.
    sinks (Hq,) are learned logits that join the softmax's denominator, as a key of value 0 that
    every query of the head sees.

    return_lse gives (out, lse): lse (B, Hq, T) in fp32 is the natural logarithm of the softmax's
    denominator, sinks included (-inf where that is 0), and may be differentiated too.
    Gradients repeat bit for bit on a GPU. With deterministic=False they need not: where the tiles
    in use have a one-pass backward (sm_90, 16 bits, no option but causal; none is chosen by
    default, as none has been timed), dq is summed in an order that varies.

    Raises ValueError for shapes, dtypes or options that do not fit. Sources: Dao 2023,
    "FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning", algorithms
    1 and 2; Beltagy et al. 2020, "Longformer" (window); Gemma Team 2024, "Gemma 2" (softcap);
    Xiao et al. 2023, "Efficient Streaming Language Models with Attention Sinks", as learned logits
    in OpenAI 2025, "gpt-oss"; Press et al. 2021, "ALiBi".
    """
    if not q.ndim == k.ndim == v.ndim == 4:
        raise ValueError(
            f"attention: {_shapes(q, k, v)}; each must have 4 dimensions, (B, H, T, D)"
        )
    batch, n_heads, n_queries, head_dim = q.shape
    if k.shape[:3] != v.shape[:3] or k.shape[0] != batch or k.shape[3] != head_dim:
        raise ValueError(
            f"attention: {_shapes(q, k, v)}; k and v must be alike but for v's head dimension, "
            f"with q's batch {batch}, and k with q's head dimension {head_dim}"
        )
    if k.shape[1] == 0 or n_heads == 0 or n_heads % k.shape[1]:
        raise ValueError(
            f"attention: q has {n_heads} heads; they must be a multiple of k's {k.shape[1]}"
        )
    if not head_dim:
        raise ValueError(
            f"attention: {_shapes(q, k, v)}; q and k must have a head dimension of 1 or more"
        )
    check_device("attention", q, k=k, v=v)
    q, k, v = autocast(q, k, v)  # pyright: ignore[reportAssignmentType]
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"attention: q is {q.dtype}, k {k.dtype}, v {v.dtype}; they must be alike")
    scale = float(head_dim**-0.5 if scale is None else scale)
    _check_options(q, window, softcap, sinks, alibi_slopes, scale)
    segments = _segments(q, k, segment_ids, cu_seqlens)
    if not use_triton(q):
        if not return_lse and softcap is None and sinks is None and alibi_slopes is None:
            in_c = _attention_cpu.takes(q, k, v)
            run = _attention_cpu.attention_in_c if in_c else _attention_torch
            return run(q, k, v, causal, window, segments, scale)
        return attention_reference(
            q,
            k,
            v,
            causal,
            scale,
            window=window,
            segment_ids=segments,
            softcap=softcap,
            sinks=sinks,
            alibi_slopes=alibi_slopes,
            return_lse=return_lse,
        )
    check_dtype("attention", "q", q.dtype)
    head_dim_v = v.shape[3]
    if max(head_dim, head_dim_v) > MAX_HEAD_DIM:
        raise ValueError(
            f"attention: the head dimension is {max(head_dim, head_dim_v)}; at most {MAX_HEAD_DIM}"
        )
    # So that every row is aligned; other head dimensions are padded in the kernel.
    if head_dim % 16 or head_dim_v % 16:
        q, k, v = (F.pad(x, (0, -x.shape[3] % 16)) for x in (q, k, v))
    sinks, slopes = (x if x is None else x.float() for x in (sinks, alibi_slopes))
    tables = None, None
    if segments is not None:
        tables = spans(segments) if cu_seqlens is None else packed_spans(cu_seqlens, segments)
    rules = causal, window, softcap, scale, deterministic
    out, lse = _attention(q, k, v, sinks, slopes, *tables, *rules)
    out = out[..., :head_dim_v] if head_dim_v % 16 else out
    return (out, lse[..., :n_queries] * LN_2) if return_lse else out
