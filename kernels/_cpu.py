"""Norms, rotation, activations and losses on CPU tensors, each in one pass over memory: the C of
`cpu.c`.

PyTorch has them on a CPU but as several operations. Where there is no C compiler, or something
looks at the calls (`traced`), the caller takes PyTorch's.
"""

import ctypes
from collections.abc import Sequence
from ctypes import c_float, c_int64, c_void_p
from pathlib import Path

import torch
from torch import Tensor

from . import _attention_cpu, _decode_attention_cpu, _runtime
from ._native import in_words, known, threaded_library
from ._runtime import traced, use_triton

SOURCE = Path(__file__).with_name("cpu.c")
NAMES = "rms_norm", "layer_norm", "rotary", "cross_entropy"
FUNCTIONS: dict[str, Path] = dict.fromkeys(NAMES, SOURCE)
FUNCTIONS["attention"] = _attention_cpu.SOURCE
FUNCTIONS["decode_attention"] = _decode_attention_cpu.SOURCE
# Of which a part is here, beside products.
PARTLY = dict(gated_mlp="activations", mlp="activations", linear_cross_entropy="losses")
ACTIVATIONS = {"relu": 0, "relu2": 1, "gelu_tanh": 3, "silu": 4}  # as vectors.h counts them
FROM_OUTPUT = {"relu": 0, "relu2": 8}  # whose slope follows from what they gave
SHARE = 2**14  # numbers that are worth a thread
PARTS = 32  # sums of the weight's gradient; a fixed number, so that their order never changes


class _Norm(ctypes.Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("x", "residual", "weight", "bias", "y", "h")),
        *((name, c_void_p) for name in ("mean", "rstd")),
        *((name, c_int64) for name in ("rows", "n", "threads")),
        ("eps", c_float),
    ]


class _NormBackward(ctypes.Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("dy", "dh", "h", "weight", "mean", "rstd")),
        *((name, c_void_p) for name in ("dx", "dx_half", "dweight", "dbias")),
        *((name, c_int64) for name in ("rows", "n", "parts", "threads")),
    ]


class _Hidden(ctypes.Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("gate", "up", "dy", "y", "dgate", "dup")),
        *((name, c_int64) for name in ("count", "threads")),
    ]


class _Heads(ctypes.Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("x", "dy", "y", "weight", "dweight")),
        *((name, c_int64) for name in ("heads", "x_batch", "x_head", "x_token")),
        *((name, c_int64) for name in ("dy_batch", "dy_head", "dy_token")),
        *((name, c_int64) for name in ("y_batch", "y_head", "y_token")),
    ]


class _Rotation(ctypes.Structure):
    _fields_ = [
        ("of", _Heads * 2),
        *((name, c_void_p) for name in ("cos", "sin")),
        *((name, c_int64) for name in ("batch", "tokens", "n", "cos_batch", "parts", "threads")),
        *((name, c_float) for name in ("direction", "eps")),
    ]


class _Losses(ctypes.Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("logits", "targets", "upstream")),
        *((name, c_void_p) for name in ("dlogits", "losses", "statistics")),
        *((name, c_int64) for name in ("rows", "n", "logits_row", "dlogits_row")),
        *((name, c_int64) for name in ("ignore_index", "threads")),
        *((name, c_float) for name in ("label_smoothing", "z_loss", "softcap")),
    ]


def path(name: str) -> str:
    """What calls of a function of `kernels` take on this machine, and why, in words."""
    source = SOURCE if name in PARTLY else FUNCTIONS.get(name)
    on_a_cpu = not torch.cuda.is_available() and not use_triton(torch.empty(0, device="cpu"))
    if source is None or not on_a_cpu or not threaded_library(source):
        return _runtime.path()
    return f"PyTorch's products, {PARTLY[name]} {in_words()}" if name in PARTLY else in_words()


def takes(*tensors: Tensor | None) -> bool:
    """Whether the functions here take these tensors."""
    return known(*tensors) and not traced() and threaded_library(SOURCE) is not None


def _c() -> ctypes.CDLL:
    found = threaded_library(SOURCE)
    assert found is not None, "`takes` was not asked"
    return found


def _threads(x: Tensor) -> int:
    return max(1, min(torch.get_num_threads(), x.numel() // SHARE))


def _half(x: Tensor) -> int:
    return x.dtype == torch.bfloat16


def _pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    centered: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """(y, h, mean, rstd) of the norm of contiguous x (..., C), about its mean where centered, else
    mean is None; h is x where there is no residual."""
    y = torch.empty_like(x)
    h = x if residual is None else torch.empty_like(residual)
    rstd = x.new_empty(x.shape[:-1], dtype=torch.float32)
    mean = torch.empty_like(rstd) if centered else None
    wide = weight.float().contiguous()
    bias = None if bias is None else bias.float().contiguous()
    work = _Norm(
        x=x.data_ptr(),
        residual=_pointer(residual),
        weight=wide.data_ptr(),
        bias=_pointer(bias),
        y=y.data_ptr(),
        h=h.data_ptr(),
        mean=_pointer(mean),
        rstd=rstd.data_ptr(),
        rows=rstd.numel(),
        n=x.shape[-1],
        threads=_threads(x),
        eps=eps,
    )
    _c().norm(ctypes.byref(work), _half(x), _half(h))
    return y, h, mean, rstd


def norm_backward(
    dy: Tensor,
    dh: Tensor | None,
    h: Tensor,
    weight: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    has_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dh, dparameters) of contiguous tensors: dx is dh in dy's dtype; dparameters (1 or 2, C),
    of the weight and of the bias if there is one, is fp32."""
    n = h.shape[-1]
    dx = torch.empty_like(h)
    narrow = dx if h.dtype == dy.dtype else torch.empty_like(dy)
    partial = rstd.new_zeros(1 + has_bias, PARTS, n)
    wide = weight.float().contiguous()
    work = _NormBackward(
        dy=dy.data_ptr(),
        dh=_pointer(dh),
        h=h.data_ptr(),
        weight=wide.data_ptr(),
        mean=_pointer(mean),
        rstd=rstd.data_ptr(),
        dx=dx.data_ptr(),
        dx_half=None if narrow is dx else narrow.data_ptr(),
        dweight=partial[0].data_ptr(),
        dbias=partial[1].data_ptr() if has_bias else None,
        rows=rstd.numel(),
        n=n,
        parts=PARTS,
        threads=_threads(h),
    )
    _c().norm_backward(ctypes.byref(work), _half(dy), _half(h))
    return narrow, dx, partial.sum(1)


Pair = Sequence[Tensor]  # of q's and of k's


def _rotation(of: list[_Heads], x: Pair, cos: Tensor, sin: Tensor, **more) -> _Rotation:
    batch, _, tokens, dim = x[0].shape
    return _Rotation(
        of=tuple(of),
        cos=cos.data_ptr(),
        sin=sin.data_ptr(),
        batch=batch,
        tokens=tokens,
        n=dim // 2,
        cos_batch=cos.stride(0) if cos.dim() == 3 else 0,
        threads=_threads(x[0]),
        **more,
    )


def rotate(
    x: Pair,
    y: Pair,
    cos: Tensor,
    sin: Tensor,
    direction: float,
    norms: Pair | None = None,
    eps: float = 0.0,
) -> None:
    """Fill y. Each x, y (B, H, T, D) has unit stride within a head; cos and sin are contiguous;
    norms: weights (D,) of RMS norms that x passes first."""
    wide = [None, None] if norms is None else [w.float().contiguous() for w in norms]
    of = [
        _Heads(a.data_ptr(), None, b.data_ptr(), _pointer(w), None, a.shape[1],
               *a.stride()[:3], 0, 0, 0, *b.stride()[:3])
        for a, b, w in zip(x, y, wide, strict=True)
    ]  # fmt: skip
    work = _rotation(of, x, cos, sin, direction=direction, eps=eps)
    _c().rotate(ctypes.byref(work), _half(x[0]))


def rotate_backward(
    dy: Pair, x: Pair, dx: Pair, cos: Tensor, sin: Tensor, norms: Pair, eps: float
) -> Tensor:
    """Fill dx, of `rotate` with norms; returns their gradients, (2, D) in fp32."""
    wide = [w.float().contiguous() for w in norms]
    dweight = cos.new_zeros(2, PARTS, x[0].shape[-1])
    of = [
        _Heads(a.data_ptr(), d.data_ptr(), b.data_ptr(), w.data_ptr(), dw.data_ptr(), a.shape[1],
               *a.stride()[:3], *d.stride()[:3], *b.stride()[:3])
        for a, d, b, w, dw in zip(x, dy, dx, wide, dweight, strict=True)
    ]  # fmt: skip
    work = _rotation(of, x, cos, sin, parts=PARTS, eps=eps)
    _c().rotate_backward(ctypes.byref(work), _half(x[0]))
    return dweight.sum(1)


def hidden(gate: Tensor, up: Tensor | None, activation: str) -> Tensor:
    """act(gate) * up of contiguous tensors, or act(gate); activation: one of `ACTIVATIONS`."""
    y = torch.empty_like(gate)
    work = _Hidden(
        gate=gate.data_ptr(),
        up=_pointer(up),
        y=y.data_ptr(),
        count=gate.numel(),
        threads=_threads(gate),
    )
    _c().hidden(ctypes.byref(work), c_int64(ACTIVATIONS[activation]), _half(gate))
    return y


def hidden_backward(
    dy: Tensor, gate: Tensor, up: Tensor | None, activation: str
) -> tuple[Tensor, Tensor | None]:
    """(dgate, dup) of contiguous tensors; of FROM_OUTPUT, without `up`, gate is act(gate)."""
    codes = FROM_OUTPUT if up is None and activation in FROM_OUTPUT else ACTIVATIONS
    dgate, dup = torch.empty_like(gate), None if up is None else torch.empty_like(up)
    work = _Hidden(
        gate=gate.data_ptr(),
        up=_pointer(up),
        dy=dy.data_ptr(),
        dgate=dgate.data_ptr(),
        dup=_pointer(dup),
        count=gate.numel(),
        threads=_threads(gate),
    )
    _c().hidden_backward(ctypes.byref(work), c_int64(codes[activation]), _half(gate))
    return dgate, dup


def losses(
    logits: Tensor,
    targets: Tensor,
    ignore_index: int,
    options: Sequence[float],
    *,
    upstream: Tensor | None = None,
    dlogits: Tensor | None = None,
    losses: Tensor | None = None,
    statistics: Tensor | None = None,
) -> None:
    """Fill losses (N,) and statistics (N, 2) of logits (N, V), each if it is there, and dlogits,
    the gradient of Σ losses · upstream, which may be the logits; without losses by the statistics
    that are there. Rows have unit stride; all but the logits and theirs is contiguous and fp32."""
    work = _Losses(
        logits=logits.data_ptr(),
        targets=targets.data_ptr(),
        upstream=_pointer(upstream),
        dlogits=_pointer(dlogits),
        losses=_pointer(losses),
        statistics=_pointer(statistics),
        rows=len(logits),
        n=logits.shape[1],
        logits_row=logits.stride(0),
        dlogits_row=0 if dlogits is None else dlogits.stride(0),
        ignore_index=ignore_index,
        threads=_threads(logits),
        **dict(zip(("label_smoothing", "z_loss", "softcap"), options, strict=True)),
    )
    _c().losses(ctypes.byref(work), _half(logits))
