"""`decode_attention` on a CPU: the C of `decode_attention.c`, which is a decoder's own. Where there
is no C compiler, and for what it does not know, the caller takes PyTorch's.

Shapes: B rows, Hq query heads, Hkv key/value heads, T new tokens, S and P positions, D head
dimension.
"""

import ctypes
from ctypes import c_float, c_int64, c_void_p
from pathlib import Path

import torch
from torch import Tensor

from ._native import View, known, threaded_library
from ._runtime import traced

SOURCE = Path(__file__).with_name("decode_attention.c")
MAX_HEAD_DIM = 256
MAX_TOKENS = 8  # of a row; more are faster as a product
SHARE = 2**18  # products of two numbers that are worth a thread


class _Decode(ctypes.Structure):
    _fields_ = [
        *((name, View) for name in ("q", "out", "k", "v", "k_prefix", "v_prefix")),
        *((name, c_void_p) for name in ("lengths", "prefix_lengths", "pages")),
        *((name, c_int64) for name in ("rows", "heads", "kv_heads", "tokens", "capacity")),
        *((name, c_int64) for name in ("prefix_capacity", "dim", "samples", "threads")),
        ("scale", c_float),
    ]


def takes(q: Tensor, *caches: Tensor) -> bool:
    """Whether `decode_attention_in_c` takes q (B, Hq, T, D) and caches (…, Hkv, S or P, D)."""
    n_row, _, n_new, dim = q.shape
    return (
        known(q, *caches)
        and n_row > 0
        and 0 < n_new <= MAX_TOKENS
        and 0 < dim <= MAX_HEAD_DIM
        and (q.dtype == torch.float32 or dim % 2 == 0)
        and q.stride(3) == 1
        and all(x.stride(3) == 1 and x.stride(2) == dim and len(x) for x in caches)
        and not traced()
        and threaded_library(SOURCE) is not None
    )


def decode_attention_in_c(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    scale: float,
    prefix: tuple[Tensor, Tensor] | None,
    prefix_lengths: Tensor | None,
    pages: Tensor | None,
) -> Tensor:
    """`decode_attention` of what `takes` took; pages (B,): where each row's keys and values are."""
    n_row, n_head, n_new, dim = q.shape
    n_kv_head, capacity = k_cache.shape[1:3]
    held = [lengths.long().contiguous()]
    out = q.new_empty(q.shape)
    work = _Decode(q=View(q), out=View(out), k=View(k_cache), v=View(v_cache), samples=n_row)
    if prefix is not None:
        work.k_prefix, work.v_prefix = (View(x) for x in prefix)
        groups, work.prefix_capacity = prefix[0].shape[0], prefix[0].shape[2]
        if prefix_lengths is None:
            prefix_lengths = lengths.new_full((groups,), work.prefix_capacity)
        held.append(prefix_lengths.long().contiguous())
        work.prefix_lengths = held[-1].data_ptr()
        work.samples = n_row // groups
    if pages is not None:
        held.append(pages.long().clamp(0, len(k_cache) - 1).contiguous())
        work.pages = held[-1].data_ptr()
    units = n_row * n_kv_head
    worth = n_row * n_head * n_new * (capacity + work.prefix_capacity) * dim // SHARE
    work.lengths = held[0].data_ptr()
    work.rows, work.heads, work.kv_heads, work.tokens = n_row, n_head, n_kv_head, n_new
    work.capacity, work.dim, work.scale = capacity, dim, scale
    work.threads = max(1, min(torch.get_num_threads(), units, worth))
    c = threaded_library(SOURCE)
    assert c is not None, "`takes` was not asked"
    if c.decode_attention(ctypes.byref(work), q.dtype == torch.bfloat16):
        raise torch.OutOfMemoryError("no memory for the scores of decode_attention")
    return out
