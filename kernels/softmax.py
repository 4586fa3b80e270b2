"""Softmax along one dimension, in fp32 whatever the input's dtype.

    y[i] = exp(x[i] − max(x)) / Σ_j exp(x[j] − max(x))

A row that fits a block is read once. A longer one is read twice: the maximum and the sum are found
together, the sum rescaled whenever the maximum rises (Milakov and Gimelshein 2018, "Online
normalizer calculation for softmax", algorithm 3), then the quotients are written.

Shapes: N rows (all dimensions but the one that is normalized, flattened), C columns.
"""

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ._activations import exp
from ._runtime import (
    TRITON_TYPE,
    Specialization,
    check_dtype,
    jit,
    launch,
    next_power_of_2,
    operation,
    tl,
    use_triton,
)

MAX_WHOLE = 8192  # columns of the longest row that a program holds in registers


def softmax_reference(x: Tensor, dim: int = -1) -> Tensor:
    """The definition, computed in fp32 (fp64 stays fp64) and returned in x's dtype."""
    wide = x if x.dtype == torch.float64 else x.float()
    e = torch.exp(wide - wide.amax(dim, keepdim=True))
    return (e / e.sum(dim, keepdim=True)).to(x.dtype)


@jit
def with_block(maximum, b_sum, b_x):
    """(max x, Σ exp(x − max x)) with one block more, the sum still apart for each column of blocks.

    The maximum starts at the least fp32, not at -inf: exp(-inf − -inf) is no number.
    """
    risen = tl.maximum(maximum, tl.max(b_x, 0))
    return risen, b_sum * exp(maximum - risen) + exp(b_x - risen)


@jit
def _softmax_forward_kernel(
    x_ptr, y_ptr, stride_row, n_cols, WHOLE: tl.constexpr, BLOCK_C: tl.constexpr
):
    i_row = tl.program_id(0).to(tl.int64)
    x_row_ptr = x_ptr + i_row * stride_row
    y_row_ptr = y_ptr + i_row * n_cols
    dtype = y_ptr.dtype.element_ty
    if WHOLE:
        o_col = tl.arange(0, BLOCK_C)
        m_col = o_col < n_cols
        b_x = tl.load(x_row_ptr + o_col, mask=m_col, other=float("-inf")).to(tl.float32)
        b_exp = exp(b_x - tl.max(b_x, 0))
        tl.store(y_row_ptr + o_col, (b_exp * (1.0 / tl.sum(b_exp, 0))).to(dtype), mask=m_col)
    else:
        maximum = tl.full((), -3.4028234663852886e38, tl.float32)
        b_sum = tl.zeros((BLOCK_C,), tl.float32)
        for start in range(0, n_cols, BLOCK_C):
            o_col = start + tl.arange(0, BLOCK_C)
            b_x = tl.load(x_row_ptr + o_col, mask=o_col < n_cols, other=float("-inf"))
            maximum, b_sum = with_block(maximum, b_sum, b_x.to(tl.float32))
        inverse = 1.0 / tl.sum(b_sum, 0)
        for start in range(0, n_cols, BLOCK_C):
            o_col = start + tl.arange(0, BLOCK_C)
            m_col = o_col < n_cols
            b_x = tl.load(x_row_ptr + o_col, mask=m_col, other=float("-inf")).to(tl.float32)
            tl.store(y_row_ptr + o_col, (exp(b_x - maximum) * inverse).to(dtype), mask=m_col)


@jit
def _softmax_backward_kernel(
    y_ptr, dy_ptr, dx_ptr, n_cols, WHOLE: tl.constexpr, BLOCK_C: tl.constexpr
):
    """dx = y · (dy − Σ dy · y) of contiguous rows."""
    o_row = tl.program_id(0).to(tl.int64) * n_cols
    dtype = dx_ptr.dtype.element_ty
    if WHOLE:
        o_col = tl.arange(0, BLOCK_C)
        m_col = o_col < n_cols
        b_y = tl.load(y_ptr + o_row + o_col, mask=m_col, other=0.0).to(tl.float32)
        b_dy = tl.load(dy_ptr + o_row + o_col, mask=m_col, other=0.0).to(tl.float32)
        b_dx = b_y * (b_dy - tl.sum(b_dy * b_y, 0))
        tl.store(dx_ptr + o_row + o_col, b_dx.to(dtype), mask=m_col)
    else:
        b_sum = tl.zeros((BLOCK_C,), tl.float32)
        for start in range(0, n_cols, BLOCK_C):
            o_col = start + tl.arange(0, BLOCK_C)
            m_col = o_col < n_cols
            b_y = tl.load(y_ptr + o_row + o_col, mask=m_col, other=0.0).to(tl.float32)
            b_sum += b_y * tl.load(dy_ptr + o_row + o_col, mask=m_col, other=0.0).to(tl.float32)
        total = tl.sum(b_sum, 0)
        for start in range(0, n_cols, BLOCK_C):
            o_col = start + tl.arange(0, BLOCK_C)
            m_col = o_col < n_cols
            b_y = tl.load(y_ptr + o_row + o_col, mask=m_col, other=0.0).to(tl.float32)
            b_dy = tl.load(dy_ptr + o_row + o_col, mask=m_col, other=0.0).to(tl.float32)
            tl.store(dx_ptr + o_row + o_col, (b_y * (b_dy - total)).to(dtype), mask=m_col)


@functools.cache
def _options(n_cols: int) -> Mapping[str, Any]:
    block_c = min(MAX_WHOLE, max(256, next_power_of_2(n_cols)))
    return dict(WHOLE=n_cols <= MAX_WHOLE, BLOCK_C=block_c, num_warps=max(1, block_c // 1024))


def specializations(capability: int) -> Iterator[Specialization]:
    """The ways in which the launchers below can compile the kernels.

    Every width in fp32, whose blocks take the most registers; the narrowest and the widest, and the
    loop over blocks, in the 16-bit types too.
    """
    for dtype in TRITON_TYPE.values():
        widths = (
            range(8, MAX_WHOLE.bit_length()) if dtype == "fp32" else (8, MAX_WHOLE.bit_length() - 1)
        )
        for n_cols in [1 << i for i in widths] + [MAX_WHOLE + 1]:
            constexprs = dict(_options(n_cols))
            num_warps = constexprs.pop("num_warps")
            x = f"*{dtype}:16"
            yield Specialization(
                _softmax_forward_kernel,
                dict(x_ptr=x, y_ptr=x, stride_row="i32:16", n_cols="i32:16"),
                constexprs,
                num_warps=num_warps,
            )
            yield Specialization(
                _softmax_backward_kernel,
                dict(y_ptr=x, dy_ptr=x, dx_ptr=x, n_cols="i32:16"),
                constexprs,
                num_warps=num_warps,
            )


@operation("ponder::softmax")
def _softmax(x: Tensor) -> Tensor:
    """Of the rows of x (N, C) with unit stride in a row; contiguous."""
    n_rows, n_cols = x.shape
    y = x.new_empty(x.shape)
    if n_rows:
        launch(_softmax_forward_kernel, n_rows, (x, y), (x.stride(0), n_cols), **_options(n_cols))
    return y


@_softmax.register_fake
def _(x):
    return x.new_empty(x.shape)


@operation("ponder::softmax_backward")
def _softmax_backward(dy: Tensor, y: Tensor) -> Tensor:
    n_rows, n_cols = y.shape
    dx = torch.empty_like(y)
    if n_rows:
        launch(_softmax_backward_kernel, n_rows, (y, dy, dx), (n_cols,), **_options(n_cols))
    return dx


@_softmax_backward.register_fake
def _(dy, y):
    return torch.empty_like(y)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(output)


def _backward(ctx, dy):
    (y,) = ctx.saved_tensors
    return _softmax_backward(dy.contiguous(), y)


_softmax.register_autograd(_backward, setup_context=_setup_context)


def softmax(x: Tensor, dim: int = -1) -> Tensor:
    """Softmax: y[i] = exp(x[i]) / Σ_j exp(x[j]) along `dim`.

    x in fp32, fp16 or bf16, of any shape and with any number of elements along dim; y in x's shape
    and dtype, computed in fp32. An element of -inf gives 0; where all along dim are -inf (or one
    is +inf or NaN) all give NaN, as in torch.softmax. A dim other than the last costs a copy of x.

    Raises ValueError for a dtype or dim that does not fit. Source: Bridle 1990, "Probabilistic
    interpretation of feedforward classification network outputs"; the online sum: Milakov and
    Gimelshein 2018, algorithm 3.
    """
    n_dims = max(1, x.dim())  # a single number is a row of one
    if not -n_dims <= dim < n_dims:
        raise ValueError(
            f"softmax: dim is {dim}; x of shape {tuple(x.shape)} needs at least {-n_dims} and "
            f"less than {n_dims}"
        )
    if not x.is_floating_point():
        raise ValueError(f"softmax: x is {x.dtype}; it must be a floating dtype")
    if not use_triton(x):
        return torch.softmax(x, dim)
    check_dtype("softmax", "x", x.dtype)
    if x.numel() == 0 or x.dim() == 0:
        return torch.softmax(x, dim)
    if dim % x.dim() != x.dim() - 1:
        return softmax(x.movedim(dim, -1)).movedim(-1, dim)
    rows = x.reshape(-1, x.shape[-1])
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    return _softmax(rows).view(x.shape)
