"""Attention on a CPU: the C of `attention.c`, which is faster than PyTorch's and leaves out what no
query sees. Where there is no C compiler, the caller takes PyTorch's.

Shapes: B batch, Hq query heads, Hkv key/value heads, T queries, S keys, D and Dv head dimensions.
"""

import ctypes
from ctypes import c_float, c_int64, c_void_p
from pathlib import Path

import torch
from torch import Tensor

from ._attention_masks import Segments, diagonal
from ._native import View, known, threaded_library
from ._runtime import empty_like, operation, traced, unit_stride

SOURCE = Path(__file__).with_name("attention.c")
SHARE = 2**18  # products of two numbers that are worth a thread


class _Attention(ctypes.Structure):
    _fields_ = [
        *((name, View) for name in ("q", "k", "v", "out", "dout", "dq", "dk", "dv")),
        *((name, c_void_p) for name in ("query_ids", "key_ids", "lse", "room")),
        *((name, c_int64) for name in ("batch", "heads", "kv_heads", "queries", "keys")),
        *((name, c_int64) for name in ("dim", "v_dim", "offset", "width", "threads")),
        ("scale", c_float),
    ]


def _in_c() -> bool:
    return threaded_library(SOURCE) is not None


# As torch.compiler.assume_constant_result does, which imports the compiler.
_in_c._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


def takes(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether `attention_in_c` takes these tensors."""
    return (
        known(q, k, v)
        and q.shape[2] > 1
        and q.shape[3] % 2 == v.shape[3] % 2 == 0
        and (torch.compiler.is_compiling() or not traced())
        and _in_c()
    )


def attention_in_c(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    window: int | None,
    segments: Segments | None,
    scale: float,
) -> Tensor:
    """`attention` of what `takes` took: (B, Hq, T, Dv)."""
    ids = (None, None) if segments is None else (x.long().contiguous() for x in segments)
    return _attention_cpu(q, k, v, *ids, causal, window, scale)[0]


def _run(
    name: str,
    tensors: dict[str, Tensor],
    lse: Tensor,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    causal: bool,
    window: int | None,
    scale: float,
) -> None:
    """Call a function of the C, which writes some of these tensors."""
    (batch, heads, queries, dim), (kv_heads, keys) = tensors["q"].shape, tensors["k"].shape[1:3]
    offset, width = diagonal(queries, keys, causal, window)
    backward = name == "attention_backward"
    units = batch * (kv_heads if backward else heads)
    worth = units * queries * keys * dim // SHARE
    work = _Attention(
        **{name: View(x) for name, x in tensors.items()},
        query_ids=None if query_ids is None else query_ids.data_ptr(),
        key_ids=None if key_ids is None else key_ids.data_ptr(),
        lse=lse.data_ptr(),
        batch=batch,
        heads=heads,
        kv_heads=kv_heads,
        queries=queries,
        keys=keys,
        dim=dim,
        v_dim=tensors["v"].shape[3],
        offset=offset,
        width=queries + offset + 1 if width is None else width,
        threads=max(1, min(torch.get_num_threads(), units, worth)),
        scale=scale,
    )
    c = threaded_library(SOURCE)
    assert c is not None, "`takes` was not asked"
    c.room.restype = c_int64
    room = lse.new_empty(work.threads * c.room(ctypes.byref(work), backward))
    work.room = room.data_ptr()
    getattr(c, name)(ctypes.byref(work), tensors["q"].dtype == torch.bfloat16)


@operation("ponder::attention_cpu")
def _attention_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    causal: bool,
    window: int | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """(out, the natural logarithm of each query's sum)."""
    out, lse = empty_like(q, v.shape[3]), q.new_empty(q.shape[:3], dtype=torch.float32)
    given = {"q": unit_stride(q), "k": unit_stride(k), "v": unit_stride(v)}
    _run("attention", {**given, "out": out}, lse, query_ids, key_ids, causal, window, scale)
    return out, lse


@_attention_cpu.register_fake
def _(q, k, v, query_ids, key_ids, causal, window, scale):
    return empty_like(q, v.shape[3]), q.new_empty(q.shape[:3], dtype=torch.float32)


@operation("ponder::attention_cpu_backward")
def _attention_cpu_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    causal: bool,
    window: int | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv)."""
    dq, dk, dv = empty_like(q), empty_like(k), empty_like(v)
    given = {"q": q, "k": k, "v": v, "dout": dout}
    tensors = {name: unit_stride(x) for name, x in given.items()}
    tensors |= {"out": out, "dq": dq, "dk": dk, "dv": dv}
    _run("attention_backward", tensors, lse, query_ids, key_ids, causal, window, scale)
    return dq, dk, dv


@_attention_cpu_backward.register_fake
def _(dout, q, k, v, *_):
    return tuple(empty_like(x) for x in (q, k, v))


def _setup_context(ctx, inputs, output):
    q, k, v, *ids = inputs[:5]
    ctx.rules = inputs[5:]
    ctx.save_for_backward(q, k, v, *output, *ids)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, dout, _):
    return *_attention_cpu_backward(dout, *ctx.saved_tensors, *ctx.rules), *[None] * 5


_attention_cpu.register_autograd(_backward, setup_context=_setup_context)
