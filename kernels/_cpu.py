"""Norms, rotation and activations on CPU tensors, each in one pass over memory: the C of `cpu.c`.

PyTorch has RMS norm and rotation on a CPU but as some ten operations. Where there is no C compiler,
or something looks at the calls (`traced`), the caller takes PyTorch's.
"""

import ctypes
from ctypes import c_float, c_int64, c_void_p
from pathlib import Path

import torch
from torch import Tensor

from . import _attention_cpu, _runtime
from ._native import in_words, known, threaded_library
from ._runtime import traced, use_triton

SOURCE = Path(__file__).with_name("cpu.c")
FUNCTIONS = {"rms_norm": SOURCE, "rotary": SOURCE, "attention": _attention_cpu.SOURCE}
MLPS = "gated_mlp", "mlp"  # of which the activations are here
ACTIVATIONS = {"relu": 0, "relu2": 1, "gelu_tanh": 3, "silu": 4}  # as vectors.h counts them
FROM_OUTPUT = {"relu": 0, "relu2": 8}  # whose slope follows from what they gave
SHARE = 2**14  # numbers that are worth a thread
PARTS = 32  # sums of the weight's gradient; a fixed number, so that their order never changes


class _Norm(ctypes.Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("x", "residual", "weight", "y", "h", "rstd")),
        *((name, c_int64) for name in ("rows", "n", "threads")),
        ("eps", c_float),
    ]


class _NormBackward(ctypes.Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("dy", "dh", "h", "weight", "rstd")),
        *((name, c_void_p) for name in ("dx", "dx_half", "dweight")),
        *((name, c_int64) for name in ("rows", "n", "parts", "threads")),
    ]


class _Hidden(ctypes.Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("gate", "up", "dy", "y", "dgate", "dup")),
        *((name, c_int64) for name in ("count", "threads")),
    ]


class _Rotation(ctypes.Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("x", "y", "cos", "sin")),
        *((name, c_int64) for name in ("batch", "heads", "tokens", "n")),
        *((name, c_int64) for name in ("x_batch", "x_head", "x_token")),
        *((name, c_int64) for name in ("y_batch", "y_head", "y_token", "cos_batch")),
        ("threads", c_int64),
        ("direction", c_float),
    ]


def path(name: str) -> str:
    """What calls of a function of `kernels` take on this machine, and why, in words."""
    source = SOURCE if name in MLPS else FUNCTIONS.get(name)
    on_a_cpu = not torch.cuda.is_available() and not use_triton(torch.empty(0, device="cpu"))
    if source is None or not on_a_cpu or not threaded_library(source):
        return _runtime.path()
    return f"PyTorch's products, activations {in_words()}" if name in MLPS else in_words()


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
    x: Tensor, weight: Tensor, residual: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, h, rstd) of the RMS norm of contiguous x (..., C); h is x where there is no residual."""
    y = torch.empty_like(x)
    h = x if residual is None else torch.empty_like(residual)
    rstd = x.new_empty(x.shape[:-1], dtype=torch.float32)
    wide = weight.float().contiguous()
    work = _Norm(
        x=x.data_ptr(),
        residual=_pointer(residual),
        weight=wide.data_ptr(),
        y=y.data_ptr(),
        h=h.data_ptr(),
        rstd=rstd.data_ptr(),
        rows=rstd.numel(),
        n=x.shape[-1],
        threads=_threads(x),
        eps=eps,
    )
    _c().norm(ctypes.byref(work), _half(x), _half(h))
    return y, h, rstd


def norm_backward(
    dy: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dh, dweight) of contiguous tensors: dx is dh in dy's dtype; dweight is fp32."""
    n = h.shape[-1]
    dx = torch.empty_like(h)
    narrow = dx if h.dtype == dy.dtype else torch.empty_like(dy)
    partial = rstd.new_zeros(PARTS, n)
    wide = weight.float().contiguous()
    work = _NormBackward(
        dy=dy.data_ptr(),
        dh=_pointer(dh),
        h=h.data_ptr(),
        weight=wide.data_ptr(),
        rstd=rstd.data_ptr(),
        dx=dx.data_ptr(),
        dx_half=None if narrow is dx else narrow.data_ptr(),
        dweight=partial.data_ptr(),
        rows=rstd.numel(),
        n=n,
        parts=PARTS,
        threads=_threads(h),
    )
    _c().norm_backward(ctypes.byref(work), _half(dy), _half(h))
    return narrow, dx, partial.sum(0)


def rotate(x: Tensor, y: Tensor, cos: Tensor, sin: Tensor, direction: float) -> Tensor:
    """y, filled. x, y (B, H, T, D) have unit stride within a head; cos and sin are contiguous."""
    batch, heads, tokens, dim = x.shape
    work = _Rotation(
        *(t.data_ptr() for t in (x, y, cos, sin)),
        *(batch, heads, tokens, dim // 2),
        *x.stride()[:3],
        *y.stride()[:3],
        cos.stride(0) if cos.dim() == 3 else 0,
        _threads(x),
        direction,
    )
    _c().rotate(ctypes.byref(work), _half(x))
    return y


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
