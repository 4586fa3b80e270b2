"""Activation functions: in PyTorch (the definitions), and in Triton with their derivatives."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from . import _cpu
from ._runtime import jit, only_once, tl


def _relu2(x: Tensor) -> Tensor:
    return F.relu(x).square()


def _identity(x: Tensor) -> Tensor:
    return x


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu2": _relu2,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "identity": _identity,
}


class _HiddenInC(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, activation):  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.activation = activation
        y = _cpu.hidden(gate, up, activation)
        # What follows keeps y, so that keeping it costs nothing.
        ctx.save_for_backward(y if up is None and activation in _cpu.FROM_OUTPUT else gate, up)
        return y

    @staticmethod
    @only_once
    def backward(ctx, dy):  # pyright: ignore[reportIncompatibleMethodOverride]
        gate, up = ctx.saved_tensors
        return *_cpu.hidden_backward(dy.contiguous(), gate, up, ctx.activation), None


def activated(activation: str, gate: Tensor, up: Tensor | None = None) -> Tensor:
    """act(gate), or act(gate) * up: an MLP's hidden activations, by PyTorch or, on a CPU, C."""
    alike = up is None or up.dtype == gate.dtype and up.shape == gate.shape
    if activation in _cpu.ACTIVATIONS and alike and _cpu.takes(gate, up):
        gate, up = gate.contiguous(), None if up is None else up.contiguous()
        return _HiddenInC.apply(gate, up, activation)  # pyright: ignore[reportReturnType]
    y = ACTIVATIONS[activation](gate)
    return y if up is None else y * up


# Their derivative follows from their output: a backward needs no pre-activation.
FROM_OUTPUT = frozenset({"relu", "relu2", "sigmoid", "tanh", "identity"})


@jit
def exp(x):
    """By exp2, which flushes what is no normal number: three instructions fewer than tl.exp."""
    return tl.exp2(1.4426950408889634 * x)


@jit
def sigmoid(x):
    """1 / (1 + exp(-x)), of which a division would take eight instructions. For what cancels, as
    tanh does, tl.sigmoid is the more exact."""
    root = tl.rsqrt(1.0 + exp(-x))
    return root * root


@jit
def positive(x):
    """max(x, 0); NaN where x is, of which a GPU's plain maximum makes 0."""
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@jit
def activate(x, ACTIVATION: tl.constexpr):
    """y = act(x), fp32."""
    return activate_with_slope(x, ACTIVATION)[0]


@jit
def activate_with_slope(x, ACTIVATION: tl.constexpr):
    """(act(x), act'(x)), fp32. What the caller does not use, the compiler drops."""
    if ACTIVATION == "relu":
        y = positive(x)
        slope = tl.where(x > 0.0, 1.0, 0.0)
    elif ACTIVATION == "relu2":
        above = positive(x)
        y = above * above
        slope = 2.0 * above
    elif ACTIVATION == "gelu":  # x Φ(x), Φ the normal distribution
        phi = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
        y = x * phi
        slope = phi + x * 0.3989422804014327 * exp(-0.5 * x * x)
    elif ACTIVATION == "gelu_tanh":  # 0.5 (1 + tanh u) = sigmoid(2u)
        square = x * x
        s = sigmoid(x * (1.5957691216057308 + 0.0713548162726009 * square))
        y = x * s
        slope = s + y * (1.0 - s) * (1.5957691216057308 + 0.2140644488178027 * square)
    elif ACTIVATION == "silu":
        s = sigmoid(x)
        y = x * s
        slope = s + y * (1.0 - s)
    elif ACTIVATION == "sigmoid":
        y = sigmoid(x)
        slope = y * (1.0 - y)
    elif ACTIVATION == "tanh":
        # Near 0 the exponentials cancel: there the series, to its x⁹ term.
        square = x * x
        series = -0.05396825396825397 + square * 0.021869488536155203
        series = 1.0 + square * (-1.0 / 3.0 + square * (2.0 / 15.0 + square * series))
        y = tl.where(square < 0.0625, x * series, 2.0 * tl.sigmoid(2.0 * x) - 1.0)
        slope = 1.0 - y * y
    else:
        tl.static_assert(ACTIVATION == "identity")
        y = x
        slope = tl.full(x.shape, 1.0, tl.float32)
    return y, slope


@jit
def slope_from_output(y, ACTIVATION: tl.constexpr):
    """act'(x) where y = act(x) is known instead of x."""
    if ACTIVATION == "relu":
        slope = tl.where(y > 0.0, 1.0, 0.0)
    elif ACTIVATION == "relu2":
        slope = 2.0 * tl.sqrt(y)
    elif ACTIVATION == "sigmoid":
        slope = y * (1.0 - y)
    elif ACTIVATION == "tanh":
        slope = 1.0 - y * y
    else:
        tl.static_assert(ACTIVATION == "identity")
        slope = tl.full(y.shape, 1.0, tl.float32)
    return slope
