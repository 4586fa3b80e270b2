"""Attention of the few newest tokens of each row against its KV cache. Inference only.

    out_t = sum_j softmax_j(scale · q_t · k_j) v_j,   j <= length − T + t

The cache is read in splits of a fixed number of positions, each by a program of its own that leaves
its partial result and log-sum-exp; a second kernel combines them ("flash-decoding"). The query
heads of one KV head and the T tokens are the rows of one tile, so K and V are read once a group.
A prefix that several rows share is read the same way, its splits once for all of these rows: their
queries are the rows of the tiles, and the same kernel combines what each row saw in both caches
("cascade", "bifurcated" or "hydragen" attention).

A row's result is a function of its own queries, cache, length and prefix, bit for bit: splits start
at multiples of SPLIT whatever the other rows hold and however many positions the cache has.

Dao et al. 2023, "Flash-Decoding for long-context inference"; Ainslie et al. 2023, "GQA"; Juravsky
et al. 2024, "Hydragen"; Kwon et al. 2023, "PagedAttention"; Xiao et al. 2023, "Attention sinks".
Shapes: B rows, Hq query heads, Hkv key/value heads, T new tokens, S cache positions, D head
dimension; G groups of rows, P positions of their prefixes.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import _decode_attention_cpu
from ._flash_decoding import combine_kernel, flash_decoding_kernel
from ._runtime import (
    TRITON_TYPE,
    Specialization,
    autocast,
    capability,
    cdiv,
    check_device,
    check_dtype,
    launch,
    next_power_of_2,
    operation,
    unit_stride,
    use_triton,
)

MAX_HEAD_DIM = 256
SPLIT = 256  # cache positions a program reads; a constant, so that sums never change their order
COMBINED = 8  # splits that are read side by side where they are combined
PREFIX_SPLIT = 512  # more, for every split leaves a partial result of all the rows of a group
# What keeps S out of the roundings on CPU: MKL cuts a contraction of more than 192 terms at places
# that depend on its length; and torch.bmm takes another path below 400 products. (Seen with MKL
# 2024.2, with AVX2 and AVX-512; the tests compare bits.)
CPU_SPLIT = 192
CPU_LEAST = 400
LOG2_E = math.log2(math.e)


def decode_attention_reference(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    scale: float | None = None,
    *,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    prefix: tuple[Tensor, Tensor] | None = None,
    prefix_lengths: Tensor | None = None,
    block_table: Tensor | None = None,
) -> Tensor:
    """The definition, computed in fp32 (fp64 stays fp64) and returned in q's dtype; a CPU's path
    where C is none.

    Batched products beat scaled_dot_product_attention here (2 cores, B = 256, Hq = 4, Hkv = 2,
    D = 32, T = 1: 0.8 ms against 1.1 at S = 64, 1.4 against 2.1 at S = 128), are finite whatever
    lies beyond a length, and can be summed in an order that S does not change.
    """
    if block_table is not None:
        k_cache, v_cache = (_in_order(x, block_table) for x in (k_cache, v_cache))
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
    last = lengths[:, None] + torch.arange(-n_new, 0, device=q.device)
    last = last.clamp_min(0)[..., None]  # (B, T, 1)

    def mask(scores: Tensor, end: Tensor, newest: Tensor) -> None:
        """Hide the positions from `end` on and those out of the window of `newest`."""
        if softcap is not None:
            scores.div_(softcap).tanh_().mul_(softcap)
        positions = torch.arange(scores.shape[-1], device=q.device)
        hidden = positions >= end
        if window is not None:
            hidden = hidden | (positions <= newest - window)
        grouped = scores.view(n_row, n_head, n_new, len(positions))
        grouped.masked_fill_(hidden[:, None], -math.inf)

    scores = torch.bmm(queries, keys.mT)
    mask(scores, last + 1, last)
    if prefix is not None:
        k_prefix, v_prefix = (x.flatten(0, 1).to(wide) for x in prefix)
        n_prefix = k_prefix.shape[1]
        prefix_scores = _per_group(queries, k_prefix.mT, n_kv_head)
        end = torch.full_like(lengths, n_prefix)
        if prefix_lengths is not None:
            samples = n_row // max(1, len(prefix_lengths))
            end = prefix_lengths.clamp(0, n_prefix).repeat_interleave(samples)
        end = end[:, None, None]
        mask(prefix_scores, end, end + last)
        scores = torch.cat([scores, prefix_scores], -1)
    if sinks is not None:
        sink = sinks.to(wide)[:, None].expand(n_row, n_head, n_new)
        scores = torch.cat([scores, sink.reshape(*scores.shape[:-1], 1)], -1)
    weights = scores.softmax(-1)
    own = weights[..., :capacity]
    out = torch.bmm(own[..., :CPU_SPLIT], values[:, :CPU_SPLIT])
    for start in range(CPU_SPLIT, capacity, CPU_SPLIT):
        split = slice(start, start + CPU_SPLIT)
        out.baddbmm_(own[..., split], values[:, split])
    if prefix is not None:
        out += _per_group(weights[..., capacity : capacity + n_prefix], v_prefix, n_kv_head)
    return out.view(q.shape).to(q.dtype)


def _per_group(x: Tensor, y: Tensor, n_kv_head: int) -> Tensor:
    """x y, of x (B Hkv, n, i) and y (G Hkv, i, o): the rows of a group are those of one product."""
    n_group, samples = len(y) // n_kv_head, len(x) // max(1, len(y))
    n, i, o = *x.shape[1:], y.shape[2]
    x = x.reshape(n_group, samples, n_kv_head, n, i).transpose(1, 2)
    out = torch.bmm(x.reshape(len(y), samples * n, i), y)
    out = out.view(n_group, n_kv_head, samples, n, o).transpose(1, 2)
    return out.reshape(n_group * samples * n_kv_head, n, o)


def _in_order(pages: Tensor, block_table: Tensor) -> Tensor:
    """(B, Hkv, S, D) of pages (n_pages, Hkv, page_size, D); any page where the table has none."""
    index = block_table.long().clamp(0, max(0, pages.shape[0] - 1))
    return pages[index].transpose(1, 2).flatten(2, 3)


@dataclass(frozen=True)
class Tile:
    """Rows (query heads × tokens; tl.dot takes no fewer than 16) against BLOCK_N cache positions.

    BLOCK_N keeps 16 KiB of K, and of V, a block (8 KiB in fp32 and with many rows, where more
    would spill registers).
    """

    block_n: int
    block_d: int
    block_m: int = 16
    num_warps: int = 4
    num_stages: int = 2

    def constexprs(self) -> dict[str, Any]:
        return dict(BLOCK_M=self.block_m, BLOCK_N=self.block_n, BLOCK_D=self.block_d)


def _tile(head_dim: int, element_size: int, prefix: bool = False, chip: int = 0) -> Tile:
    """A prefix has many rows: 64, wgmma's least; whatever their number, for it might show in bits.
    In fp32, which has no wgmma, they would only take registers, and on sm_120 they spill them."""
    block_d = max(32, next_power_of_2(head_dim))
    if prefix and element_size == 2:
        block_n = min(64, 4096 // block_d)
        block_m = 32 if chip >= 120 else 64
        return Tile(block_n, block_d, block_m, num_warps=4 if block_d < 128 else 8)
    elements = 8192 if element_size == 2 else 2048
    # With two stages a copy would begin behind both products; 99 KB of shared memory hold no third
    # for several programs.
    num_stages = 3 if element_size == 2 and chip in (80, 90, 100, 103) else 2
    return Tile(min(64, max(16, elements // block_d)), block_d, num_stages=num_stages)


def specializations(capability: int) -> Iterator[Specialization]:
    """How the launchers below can compile the kernels.

    Every head dimension in bf16 and fp32, with no option and with every option at once, on the
    row's own cache and on a prefix; each option alone where registers are fewest, in bf16 with the
    widest heads. Pages of any size are one case. fp16 takes bf16's tiles and the same instructions
    but for the type, so it is here once.
    """
    every = dict(WINDOW=True, SINKS=True)
    for dtype in (torch.bfloat16, torch.float32):
        for head_dim in (32, 64, 128, 256):
            yield _combine(dtype, head_dim)
            yield _attend(capability, dtype, head_dim)
            yield _attend(capability, dtype, head_dim, PREFIX=True)
            yield _combine(dtype, head_dim, PREFIX=True, **every)
            yield _attend(capability, dtype, head_dim, PAGED=True, SOFTCAP=True, **every)
            yield _attend(capability, dtype, head_dim, PREFIX=True, SOFTCAP=True, WINDOW=True)
    yield _combine(torch.float16, 128)
    for prefix in (False, True):
        yield _attend(capability, torch.float16, 128, PREFIX=prefix)
    for option in ("WINDOW", "SOFTCAP", "SINKS", "PAGED"):
        yield _attend(capability, torch.bfloat16, MAX_HEAD_DIM, **{option: True})
        if option in ("WINDOW", "SOFTCAP"):
            yield _attend(capability, torch.bfloat16, MAX_HEAD_DIM, PREFIX=True, **{option: True})


def _pointers(dtype: torch.dtype) -> dict[str, str]:
    element = f"*{TRITON_TYPE[dtype]}:16"
    return dict.fromkeys(("length_ptr", "prefix_length_ptr"), "*i64:16") | dict(
        sink_ptr=element, out_ptr=element, partial_ptr="*fp32:16", lse_ptr="*fp32:16"
    )


def _combine(dtype: torch.dtype, head_dim: int, **options: bool) -> Specialization:
    numbers = ("rows_per_length", "n_new", "n_split", "n_own_split", "samples", "window")
    return Specialization(
        combine_kernel,
        _pointers(dtype)
        | dict.fromkeys(numbers, "i32")
        | dict.fromkeys(("capacity", "prefix_capacity", "head_dim"), "i32:16"),
        dict(SPLIT=SPLIT, PREFIX_SPLIT=PREFIX_SPLIT, BLOCK=COMBINED, BLOCK_D=head_dim)
        | dict.fromkeys(("PREFIX", "WINDOW", "SINKS"), False)
        | options,
        num_warps=1,
    )


def _attend(chip: int, dtype: torch.dtype, head_dim: int, **options: bool) -> Specialization:
    prefix = options.get("PREFIX", False)
    tile = _tile(head_dim, dtype.itemsize, prefix, chip)
    element = f"*{TRITON_TYPE[dtype]}:16"
    strides = [f"stride_{x}_{d}" for x in "qkv" for d in ("row", "head", "token")]
    numbers = "n_kv_head group n_new n_split samples window page_size n_blocks".split()
    return Specialization(
        flash_decoding_kernel,
        dict.fromkeys(("q_ptr", "k_ptr", "v_ptr"), element)
        | _pointers(dtype)
        | dict(block_table_ptr="*i32:16", lse_ptr="*fp32" if prefix else "*fp32:16")
        | dict.fromkeys((*strides, "capacity", "head_dim"), "i32:16")
        | dict.fromkeys(numbers, "i32")
        | dict.fromkeys(("scale_log2", "softcap_log2"), "fp32"),
        dict(SPLIT=PREFIX_SPLIT if prefix else SPLIT)
        | dict.fromkeys(("PREFIX", "WINDOW", "SOFTCAP", "SINKS", "PAGED"), False)
        | options
        | tile.constexprs(),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        matrix=tile.block_m == 64,  # with 16 rows it waits for memory, and wgmma starts at 64
    )


@operation("ponder::decode_attention")
def _decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    k_prefix: Tensor | None = None,
    v_prefix: Tensor | None = None,
    prefix_lengths: Tensor | None = None,
    block_table: Tensor | None = None,
) -> Tensor:
    """The kernels on tensors whose last dimension has unit stride; lengths int64, all of them or
    none of the prefix's."""
    n_row, n_head, n_new, head_dim = q.shape
    n_kv_head, page_size = k_cache.shape[1:3]
    capacity = page_size if block_table is None else page_size * block_table.shape[1]
    prefix_capacity = 0 if k_prefix is None else k_prefix.shape[2]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if not out.numel():
        return out
    n_own_split = cdiv(capacity, SPLIT)
    n_split = n_own_split + cdiv(prefix_capacity, PREFIX_SPLIT)
    partial = lse = out
    if n_split > 1:
        partial = q.new_empty((n_row * n_head * n_new, n_split, head_dim), dtype=torch.float32)
        lse = q.new_empty((n_row * n_head * n_new, n_split), dtype=torch.float32)
    samples = 1 if k_prefix is None else n_row // k_prefix.shape[0]

    def attend(k: Tensor, v: Tensor, partial: Tensor, lse: Tensor, prefix: bool) -> None:
        split = PREFIX_SPLIT if prefix else SPLIT
        positions = prefix_capacity if prefix else capacity
        tile = _tile(head_dim, q.element_size(), prefix, capability(q.device))
        n_caches, rows = n_row, n_head // n_kv_head * n_new
        if prefix:
            n_caches, rows = n_row // samples, rows * samples
        launch(
            flash_decoding_kernel,
            (n_caches * n_kv_head, cdiv(positions, split), cdiv(rows, tile.block_m)),
            (
                q,
                k,
                v,
                lengths,
                lengths if prefix_lengths is None else prefix_lengths,
                q if sinks is None else sinks,
                lengths if block_table is None else block_table,
                out,
                partial,
                lse,
            ),
            (
                *q.stride()[:3],
                *k.stride()[:3],
                *v.stride()[:3],
                n_kv_head,
                n_head // n_kv_head,
                n_new,
                positions,
                head_dim,
                n_split,
                samples,
                window or 0,
                page_size,
                0 if block_table is None else block_table.stride(0),
                scale * LOG2_E if softcap is None else scale / softcap,
                0.0 if softcap is None else softcap * LOG2_E,
            ),
            SPLIT=split,
            PREFIX=prefix,
            WINDOW=window is not None,
            SOFTCAP=softcap is not None,
            SINKS=sinks is not None and not prefix,
            PAGED=block_table is not None and not prefix,
            **tile.constexprs(),
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )

    attend(k_cache, v_cache, partial, lse, prefix=False)
    if k_prefix is not None and v_prefix is not None and prefix_capacity:
        attend(k_prefix, v_prefix, partial[:, n_own_split:], lse[:, n_own_split:], prefix=True)
    if n_split > 1:
        launch(
            combine_kernel,
            n_row * n_head * n_new,
            (
                partial,
                lse,
                lengths,
                lengths if prefix_lengths is None else prefix_lengths,
                q if sinks is None else sinks,
                out,
            ),
            (
                n_head * n_new,
                n_new,
                capacity,
                prefix_capacity,
                head_dim,
                n_split,
                n_own_split,
                samples,
                window or 0,
            ),
            SPLIT=SPLIT,
            PREFIX_SPLIT=PREFIX_SPLIT,
            PREFIX=prefix_capacity > 0,
            WINDOW=window is not None,
            SINKS=sinks is not None,
            BLOCK=COMBINED,
            BLOCK_D=max(32, next_power_of_2(head_dim)),
            num_warps=1,
        )
    return out


@_decode_attention.register_fake
def _(q, k_cache, v_cache, lengths, scale, *options):
    return q.new_empty(q.shape)


def _check(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, block_table: Tensor | None
) -> None:
    if q.dim() != 4:
        raise ValueError(f"decode_attention: q is {tuple(q.shape)}; it must be (B, Hq, T, D)")
    n_row, n_head, n_new, head_dim = q.shape
    shape = k_cache.shape
    fits = len(shape) == 4 and shape[3] == head_dim
    if not fits or (block_table is None and shape[0] != n_row):
        needed = f"{n_row}, Hkv, S" if block_table is None else "n_pages, Hkv, page_size"
        raise ValueError(
            f"decode_attention: k_cache is {tuple(shape)}; beside q of {tuple(q.shape)} it must "
            f"be ({needed}, {head_dim})"
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
    capacity = shape[2]
    if block_table is not None:
        good = block_table.dim() == 2 and block_table.shape[0] == n_row
        if not good or block_table.dtype != torch.int32:
            raise ValueError(
                f"decode_attention: block_table is {tuple(block_table.shape)} {block_table.dtype}; "
                f"it must be ({n_row}, blocks of a row) int32"
            )
        capacity *= block_table.shape[1]
    if n_new > capacity:
        raise ValueError(
            f"decode_attention: q holds {n_new} new tokens; the cache has only {capacity} positions"
        )
    _check_lengths("lengths", lengths, n_row)
    for name, x in (("k_cache", k_cache), ("v_cache", v_cache)):
        if x.dtype != q.dtype:
            raise ValueError(f"decode_attention: {name} is {x.dtype}; it must be as q, {q.dtype}")


def _check_lengths(name: str, lengths: Tensor, count: int) -> None:
    if lengths.shape != (count,) or lengths.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"decode_attention: {name} is {tuple(lengths.shape)} {lengths.dtype}; it must be "
            f"({count},) int32 or int64"
        )


def _check_options(
    q: Tensor,
    n_kv_head: int,
    window: int | None,
    softcap: float | None,
    scale: float | None,
    sinks: Tensor | None,
    prefix: tuple[Tensor, Tensor] | None,
    prefix_lengths: Tensor | None,
) -> None:
    n_row, n_head, _, head_dim = q.shape
    if window is not None and window < 1:
        raise ValueError(f"decode_attention: window is {window}; it must be 1 position or more")
    for name, x in (("softcap", softcap), ("scale", scale)):
        if x is not None and not 0 < x < math.inf:
            raise ValueError(f"decode_attention: {name} is {x}; it must be a positive number")
    if sinks is not None and (sinks.shape != (n_head,) or not sinks.is_floating_point()):
        raise ValueError(
            f"decode_attention: sinks is {tuple(sinks.shape)} {sinks.dtype}; it must be "
            f"({n_head},), floating-point"
        )
    if prefix is None:
        if prefix_lengths is not None:
            raise ValueError("decode_attention: prefix_lengths is given; it needs a prefix")
        return
    for name, x in zip(("k_prefix", "v_prefix"), prefix, strict=True):
        shape = tuple(x.shape)
        if x.dim() != 4 or (shape[1], shape[3]) != (n_kv_head, head_dim):
            raise ValueError(
                f"decode_attention: {name} is {shape}; beside q of {tuple(q.shape)} it must be "
                f"(groups, {n_kv_head}, P, {head_dim})"
            )
        if shape != tuple(prefix[0].shape):
            raise ValueError(
                f"decode_attention: v_prefix is {shape}; it must be as k_prefix, "
                f"{tuple(prefix[0].shape)}"
            )
        if x.dtype != q.dtype:
            raise ValueError(f"decode_attention: {name} is {x.dtype}; it must be as q, {q.dtype}")
        if n_row % shape[0] if shape[0] else n_row:
            raise ValueError(
                f"decode_attention: the prefix has {shape[0]} groups, which do not divide {n_row} "
                "rows"
            )
    if prefix_lengths is not None:
        _check_lengths("prefix_lengths", prefix_lengths, prefix[0].shape[0])


@torch.no_grad()
def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    prefix: tuple[Tensor, Tensor] | None = None,
    prefix_lengths: Tensor | None = None,
    block_table: Tensor | None = None,
) -> Tensor:
    """Attention of each row's T newest tokens against its KV cache; no gradient (inference only).

        out_t = sum_j softmax_j(scale · q_t · k_j) v_j,   j <= lengths − T + t

    q (B, Hq, T, D), T small; k_cache and v_cache (B, Hkv, S, D), Hq a multiple of Hkv, any strides
    (a slice of a longer cache is not copied); fp32, fp16 or bf16, all the same; D up to 256.
    lengths (B,) int32 or int64: the valid cache positions of each row, its T new tokens included,
    T <= length <= S. They are read on the device: no wait, nothing compiled anew. (So they are not
    checked; a query that would see nothing sees position 0.) scale defaults to 1/sqrt(D). Returns
    (B, Hq, T, D) in q's dtype; sums are fp32.

    window: a query sees so many positions, its own the last of them. softcap: a score s becomes
    softcap · tanh(s / softcap). sinks (Hq,), floating-point: a further score of each head, which
    takes its share of the softmax and adds nothing to the output.

    prefix = (k_prefix, v_prefix), each (G, Hkv, P, D): positions in front of the cache that B/G
    adjacent rows share (the samples of a prompt). They are read once a group, not once a row.
    prefix_lengths (G,) int32 or int64, at most P: the valid ones, all if not given. lengths count
    the row's own cache alone; a window runs on from one into the other.

    block_table (B, blocks of a row) int32: the caches are pages, (n_pages, Hkv, page_size, D), and
    position j of row b is in page block_table[b, j // page_size], at j % page_size. Entries beyond
    a row's length may be anything; entries within it are read on the device and not checked.

    Beyond a row's length the cache may hold anything finite. There, and in the other rows, nothing
    changes a bit of the row's result; nor does S. On CPU, what PyTorch's operations do (a window, a
    soft-cap, sinks, pages, more than 8 tokens) promises that in fp32 alone, for S a multiple of 16,
    and not with a prefix: there the number of rows in a group may show.

    Raises ValueError for shapes or dtypes that do not fit. Source: Dao et al. 2023; the prefix,
    Juravsky et al. 2024; pages, Kwon et al. 2023.
    """
    k_prefix, v_prefix = prefix or (None, None)
    q, k_cache, v_cache, k_prefix, v_prefix = autocast(  # pyright: ignore[reportAssignmentType]
        q, k_cache, v_cache, k_prefix, v_prefix
    )
    prefix = None if k_prefix is None or v_prefix is None else (k_prefix, v_prefix)
    _check(q, k_cache, v_cache, lengths, block_table)
    _check_options(q, k_cache.shape[1], window, softcap, scale, sinks, prefix, prefix_lengths)
    check_device(
        "decode_attention",
        q,
        k_cache=k_cache,
        v_cache=v_cache,
        lengths=lengths,
        sinks=sinks,
        k_prefix=k_prefix,
        v_prefix=v_prefix,
        prefix_lengths=prefix_lengths,
        block_table=block_table,
    )
    if not use_triton(q):
        plain = window is None and softcap is None and sinks is None
        whole_rows = block_table is None or block_table.shape[1] == 1
        if plain and whole_rows and _decode_attention_cpu.takes(q, k_cache, v_cache, *prefix or ()):
            return _decode_attention_cpu.decode_attention_in_c(
                q,
                k_cache,
                v_cache,
                lengths,
                q.shape[-1] ** -0.5 if scale is None else scale,
                prefix,
                prefix_lengths,
                None if block_table is None else block_table[:, 0],
            )
        return decode_attention_reference(
            q,
            k_cache,
            v_cache,
            lengths,
            scale,
            window=window,
            softcap=softcap,
            sinks=sinks,
            prefix=prefix,
            prefix_lengths=prefix_lengths,
            block_table=block_table,
        )
    check_dtype("decode_attention", "q", q.dtype)
    if q.shape[-1] > MAX_HEAD_DIM:
        raise ValueError(f"decode_attention: heads of {q.shape[-1]} dimensions; at most 256 fit")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    lengths = lengths.long().contiguous()
    if prefix is not None:
        if prefix_lengths is None:
            prefix_lengths = lengths.new_full((prefix[0].shape[0],), prefix[0].shape[2])
        prefix = unit_stride(prefix[0]), unit_stride(prefix[1])
        prefix_lengths = prefix_lengths.long().contiguous()
    return _decode_attention(
        unit_stride(q),
        unit_stride(k_cache),
        unit_stride(v_cache),
        lengths,
        scale,
        window,
        softcap,
        sinks if sinks is None else sinks.contiguous(),
        *(prefix or (None, None)),
        prefix_lengths,
        block_table if block_table is None else unit_stride(block_table),
    )
