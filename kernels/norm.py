"""RMS and layer normalization with an optional fused residual add.

    h = x + residual
    rms_norm:    y = h / sqrt(mean(h²) + eps) * weight + bias
    layer_norm:  y = (h − mean(h)) / sqrt(mean((h − mean(h))²) + eps) * weight + bias

Zhang and Sennrich 2019, "Root Mean Square Layer Normalization", equation 4; Ba, Kiros and Hinton
2016, "Layer Normalization", equations 3 and 4. They share their kernels: a layer norm is CENTERED.
Shapes: N rows (all dimensions but the last, flattened), C columns.
"""

import itertools
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _cpu
from ._runtime import (
    Specialization,
    cdiv,
    check_device,
    check_dtype,
    jit,
    launch,
    next_power_of_2,
    only_once,
    operation,
    tl,
    traced,
    use_triton,
)

MAX_COLUMNS = 8192  # past this the backward spills registers
# Partial gradients of the weight; a fixed number, so that the sum's order never changes.
PROGRAMS = 512


def rms_norm_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-6
) -> Tensor:
    """The definition, computed in fp32 (fp64 stays fp64) and returned in x's dtype."""
    h = x if x.dtype == torch.float64 else x.float()
    y = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps) * weight
    return (y if bias is None else y + bias).to(x.dtype)


def layer_norm_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """The definition, computed in fp32 (fp64 stays fp64) and returned in x's dtype."""
    h = x if x.dtype == torch.float64 else x.float()
    return rms_norm_reference(h - h.mean(-1, keepdim=True), weight, bias, eps).to(x.dtype)


@jit
def _norm_forward_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    h_ptr,
    mean_ptr,
    rstd_ptr,
    n_cols,
    eps,
    CENTERED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    o_col = tl.arange(0, BLOCK_C)
    m_col = o_col < n_cols
    offset = i_row * n_cols + o_col
    h = tl.load(x_ptr + offset, mask=m_col, other=0.0)
    if HAS_RESIDUAL:
        # Rounded to the stream's dtype first: y is the norm of what the caller gets back.
        residual = tl.load(residual_ptr + offset, mask=m_col, other=0.0).to(tl.float32)
        h = (h.to(tl.float32) + residual).to(h_ptr.dtype.element_ty)
        tl.store(h_ptr + offset, h, mask=m_col)
    h = h.to(tl.float32)
    if CENTERED:
        mean = tl.sum(h) / n_cols
        h = tl.where(m_col, h - mean, 0.0)
        # What the mean lost to rounding: much, beside the deviations of a row far from zero.
        lost = tl.sum(h) / n_cols
        h = tl.where(m_col, h - lost, 0.0)
        tl.store(mean_ptr + i_row, mean + lost)
    rstd = tl.rsqrt(tl.sum(h * h) / n_cols + eps)
    weight = tl.load(weight_ptr + o_col, mask=m_col, other=0.0).to(tl.float32)
    y = h * rstd * weight
    if HAS_BIAS:
        y += tl.load(bias_ptr + o_col, mask=m_col, other=0.0).to(tl.float32)
    tl.store(y_ptr + offset, y.to(y_ptr.dtype.element_ty), mask=m_col)
    tl.store(rstd_ptr + i_row, rstd)


@jit
def _norm_backward_kernel(
    dy_ptr,
    dh_ptr,
    h_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    dx_ptr,
    dweight_ptr,
    dbias_ptr,
    n_rows,
    n_cols,
    rows_per_program,
    CENTERED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_DH: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # dx_ptr has h's dtype: x's gradient is its rounding to x's dtype.
    i_program = tl.program_id(0).to(tl.int64)
    o_col = tl.arange(0, BLOCK_C)
    m_col = o_col < n_cols
    weight = tl.load(weight_ptr + o_col, mask=m_col, other=0.0).to(tl.float32)
    b_dweight = tl.zeros((BLOCK_C,), dtype=tl.float32)
    if HAS_BIAS:
        b_dbias = tl.zeros((BLOCK_C,), dtype=tl.float32)
    first = i_program * rows_per_program
    last = tl.minimum(first + rows_per_program, n_rows)
    # Narrow rows are too few bytes in flight unless the next ones are fetched ahead.
    STAGES: tl.constexpr = 3 if BLOCK_C <= 2048 else 1
    for i_row in tl.range(first, last, num_stages=STAGES):
        offset = i_row * n_cols + o_col
        h = tl.load(h_ptr + offset, mask=m_col, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + offset, mask=m_col, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + i_row)
        if CENTERED:
            h -= tl.load(mean_ptr + i_row)
        normed = h * rstd
        b_dweight += dy * normed
        if HAS_BIAS:
            b_dbias += dy
        g = dy * weight
        dx = g - normed * (tl.sum(g * normed) / n_cols)
        if CENTERED:
            dx -= tl.sum(g) / n_cols
        dx *= rstd
        if HAS_DH:
            dx += tl.load(dh_ptr + offset, mask=m_col, other=0.0).to(tl.float32)
        tl.store(dx_ptr + offset, dx.to(dx_ptr.dtype.element_ty), mask=m_col)
    tl.store(dweight_ptr + i_program * n_cols + o_col, b_dweight, mask=m_col)
    if HAS_BIAS:
        tl.store(dbias_ptr + i_program * n_cols + o_col, b_dbias, mask=m_col)


def _block(n_cols: int) -> int:
    return max(128, next_power_of_2(n_cols))


def _num_warps(block_c: int) -> int:
    return min(32, max(1, block_c // 512))


def _flags(dtype: str, stream: str, block_c: int) -> Iterator[tuple[bool, ...]]:
    """(CENTERED, HAS_BIAS, HAS_RESIDUAL) to compile ahead.

    Each flag only adds code and registers, and none depends on another, nor on the dtype: so none
    of them everywhere, all of them at every width of fp32 and at the ends of the others, and each
    of the eight where registers are scarcest.
    """
    if dtype == "fp32" and block_c == MAX_COLUMNS:
        yield from itertools.product((False, True), repeat=3)
        return
    yield False, False, dtype != stream  # a stream of its own comes with a residual
    if dtype == "fp32" or block_c in (_block(1), MAX_COLUMNS):
        yield True, True, True


def specializations(capability: int) -> Iterator[Specialization]:
    """Ways in which the launchers below can compile the kernels, see `_flags`."""
    # (x's dtype, the residual stream's): equal, or a 16-bit branch added to an fp32 stream.
    pairs = [(d, d) for d in ("fp32", "fp16", "bf16")] + [("fp16", "fp32"), ("bf16", "fp32")]
    for dtype, stream in pairs:
        for log_c in range(7, MAX_COLUMNS.bit_length()):
            block_c = 1 << log_c
            x, h, fp32 = f"*{dtype}:16", f"*{stream}:16", "*fp32:16"
            weight = x if dtype == stream else fp32
            for centered, has_bias, has_residual in _flags(dtype, stream, block_c):
                flags = dict(CENTERED=centered, HAS_BIAS=has_bias)
                yield Specialization(
                    _norm_forward_kernel,
                    dict(
                        x_ptr=x,
                        residual_ptr=h,
                        weight_ptr=weight,
                        bias_ptr=weight,
                        y_ptr=x,
                        h_ptr=h,
                        mean_ptr=fp32,
                        rstd_ptr=fp32,
                        n_cols="i32:16",
                        eps="fp32",
                    ),
                    dict(**flags, HAS_RESIDUAL=has_residual, BLOCK_C=block_c),
                    num_warps=_num_warps(block_c),
                )
                yield Specialization(
                    _norm_backward_kernel,
                    dict(
                        dy_ptr=x,
                        dh_ptr=h,
                        h_ptr=h,
                        weight_ptr=weight,
                        mean_ptr=fp32,
                        rstd_ptr=fp32,
                        dx_ptr=h,
                        dweight_ptr=fp32,
                        dbias_ptr=fp32,
                        n_rows="i32",
                        n_cols="i32:16",
                        rows_per_program="i32",
                    ),
                    dict(**flags, HAS_DH=has_residual, BLOCK_C=block_c),
                    num_warps=_num_warps(block_c),
                )


@operation("ponder::norm")
def _norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    centered: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y, h, mean, rstd) of contiguous x (..., C); h or mean is empty where there is none."""
    n_rows, n_cols = math.prod(x.shape[:-1]), x.shape[-1]
    y, h, mean, rstd = _outputs(x, residual, centered)
    block_c = _block(n_cols)
    if n_rows:
        launch(
            _norm_forward_kernel,
            n_rows,
            (
                x,
                x if residual is None else residual,
                weight,
                weight if bias is None else bias,
                y,
                h,
                mean if centered else rstd,
                rstd,
            ),
            (n_cols, eps),
            CENTERED=centered,
            HAS_BIAS=bias is not None,
            HAS_RESIDUAL=residual is not None,
            BLOCK_C=block_c,
            num_warps=_num_warps(block_c),
        )
    return y, h, mean, rstd


def _outputs(x, residual, centered):
    h = x.new_empty(0) if residual is None else torch.empty_like(residual)
    rstd = x.new_empty(x.shape[:-1], dtype=torch.float32)
    return torch.empty_like(x), h, torch.empty_like(rstd) if centered else rstd.new_empty(0), rstd


@_norm.register_fake
def _(x, weight, bias, residual, eps, centered):
    return _outputs(x, residual, centered)


@operation("ponder::norm_backward")
def _norm_backward(
    dy: Tensor,
    dh: Tensor | None,
    h: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    centered: bool,
    has_bias: bool,
) -> tuple[Tensor, Tensor]:
    """(dh, dparameters): dh of both x and the residual; (1, C) of weight or (2, C) of bias too."""
    n_rows, n_cols = math.prod(h.shape[:-1]), h.shape[-1]
    dx = torch.empty_like(h)
    n_programs = min(n_rows, PROGRAMS)
    partial = h.new_empty((1 + has_bias, n_programs, n_cols), dtype=torch.float32)
    block_c = _block(n_cols)
    if n_rows:
        launch(
            _norm_backward_kernel,
            n_programs,
            (
                dy,
                dy if dh is None else dh,
                h,
                weight,
                mean if centered else rstd,
                rstd,
                dx,
                partial[0],
                partial[-1],
            ),
            (n_rows, n_cols, cdiv(n_rows, n_programs)),
            CENTERED=centered,
            HAS_BIAS=has_bias,
            HAS_DH=dh is not None,
            BLOCK_C=block_c,
            num_warps=_num_warps(block_c),
        )
    return dx, partial.sum(1)


@_norm_backward.register_fake
def _(dy, dh, h, weight, mean, rstd, centered, has_bias):
    return torch.empty_like(h), h.new_empty((1 + has_bias, h.shape[-1]), dtype=torch.float32)


def _setup_context(ctx, inputs, output):
    ctx.set_materialize_grads(False)  # mean and rstd have no gradients: no zeros in their place
    x, weight, bias, residual, _, ctx.centered = inputs
    _, h, mean, rstd = output
    ctx.has_residual, ctx.dtype = residual is not None, x.dtype
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(h if ctx.has_residual else x, weight, mean, rstd)


def _backward(ctx, dy, dh, *_):
    h, weight, mean, rstd = ctx.saved_tensors
    dy = torch.zeros_like(h) if dy is None else dy  # where the sum alone is used
    dh = dh.contiguous() if ctx.has_residual and dh is not None else None
    has_bias = ctx.bias_dtype is not None
    dx, dparameters = _norm_backward(
        dy.contiguous(), dh, h, weight, mean, rstd, ctx.centered, has_bias
    )
    return (
        dx.to(ctx.dtype),
        dparameters[0].to(weight.dtype),
        dparameters[1].to(ctx.bias_dtype) if has_bias else None,
        dx if ctx.has_residual else None,
        None,
        None,
    )


_norm.register_autograd(_backward, setup_context=_setup_context)


class _NormInC(torch.autograd.Function):
    """y, or (y, h) where there is a residual, of what `_cpu` takes."""

    @staticmethod
    def forward(ctx, x, weight, bias, residual, eps, centered):
        y, h, mean, rstd = _cpu.norm(x, weight, bias, residual, eps, centered)
        ctx.set_materialize_grads(False)
        ctx.dtype, ctx.has_residual = x.dtype, residual is not None
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(h, weight, mean, rstd)
        return (y, h) if ctx.has_residual else y

    @staticmethod
    @only_once
    def backward(ctx, dy, dh=None):  # pyright: ignore[reportIncompatibleMethodOverride]
        h, weight, mean, rstd = ctx.saved_tensors
        has_bias = ctx.bias_dtype is not None
        dy = torch.zeros_like(h, dtype=ctx.dtype) if dy is None else dy.contiguous()
        dh = None if dh is None else dh.contiguous()
        dx, dh, dparameters = _cpu.norm_backward(dy, dh, h, weight, mean, rstd, has_bias)
        return (
            dx,
            dparameters[0].to(weight.dtype),
            dparameters[1].to(ctx.bias_dtype) if has_bias else None,
            dh if ctx.has_residual else None,
            None,
            None,
        )


class _RMSNormOnCpu(torch.autograd.Function):
    """x / sqrt(mean(x²) + eps) * weight in fp32, with 7 passes over memory in the backward.

    PyTorch's own is made of differentiable pieces on a CPU: 2 to 4 times the time of this one.
    """

    @staticmethod
    def forward(ctx, x, weight, eps):
        h = x.to(torch.promote_types(x.dtype, torch.float32))
        rstd = torch.linalg.vector_norm(h, dim=-1, keepdim=True)
        rstd = rstd.square_().div_(h.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, rstd)
        return (h * rstd).mul_(weight).to(x.dtype)

    @staticmethod
    @only_once
    def backward(ctx, dy):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, rstd = ctx.saved_tensors
        h, dy = x.to(rstd.dtype), dy.to(rstd.dtype)
        products = (dy * h).reshape(-1, h.shape[-1])
        wide = weight.to(rstd.dtype)
        dweight = torch.mv(products.t(), rstd.reshape(-1)).to(weight.dtype)
        along = torch.mv(products, wide).view(rstd.shape) * rstd.pow(3) / -h.shape[-1]
        return (dy * wide).mul_(rstd).addcmul_(h, along).to(x.dtype), dweight, None


def _normalize(
    name: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    centered: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    if not x.dim():
        raise ValueError(f"{name}: x is a single number; it must have 1 dimension or more")
    for label, t in (("weight", weight), ("bias", bias)):
        if t is not None and t.shape != x.shape[-1:]:
            raise ValueError(
                f"{name}: {label} has shape {tuple(t.shape)}; x of shape {tuple(x.shape)} "
                f"needs {tuple(x.shape[-1:])}"
            )
    wide = torch.promote_types(x.dtype, torch.float32)
    if residual is not None and (
        residual.shape != x.shape or residual.dtype not in (x.dtype, wide)
    ):
        raise ValueError(
            f"{name}: residual is {tuple(residual.shape)} {residual.dtype}; it must have x's "
            f"shape {tuple(x.shape)} and dtype {x.dtype}{', or fp32' if wide != x.dtype else ''}"
        )
    check_device(name, x, weight=weight, bias=bias, residual=residual)
    if not use_triton(x):
        if _cpu.takes(x, weight, bias, residual):
            residual = None if residual is None else residual.contiguous()
            return _NormInC.apply(  # pyright: ignore[reportReturnType]
                x.contiguous(), weight, bias, residual, eps, centered
            )
        h = x if residual is None else x + residual
        learns = torch.is_grad_enabled() and (h.requires_grad or weight.requires_grad)
        if centered:  # in fp32: in bf16 PyTorch sums the gradients of weight and bias in bf16, too
            wide_bias = None if bias is None else bias.to(wide)
            y = F.layer_norm(h.to(wide), weight.shape, weight.to(wide), wide_bias, eps)
        else:
            bias = None if bias is None else bias.to(h.dtype)
            if learns and not traced():
                y: Tensor = _RMSNormOnCpu.apply(h, weight, eps)  # pyright: ignore
            else:
                y = F.rms_norm(h, weight.shape, weight.to(h.dtype), eps)
            y = y if bias is None else y + bias
        return y.to(x.dtype) if residual is None else (y.to(x.dtype), h)
    check_dtype(name, "x", x.dtype)
    if x.shape[-1] > MAX_COLUMNS:
        raise ValueError(f"{name}: x has {x.shape[-1]} columns; at most {MAX_COLUMNS} fit a row")
    # Not as rows: x and residual share a gradient, and autograd, which copies one that two leaves
    # would otherwise hold, does not see through views.
    bias, residual = (None if t is None else t.contiguous() for t in (bias, residual))
    y, h, _, _ = _norm(x.contiguous(), weight.contiguous(), bias, residual, eps, centered)
    return y if residual is None else (y, h)


def rms_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-6,
    residual: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Root mean square normalization: y = h / sqrt(mean(h²) + eps) * weight + bias.

    h = x + residual. x (..., C) in fp32, fp16 or bf16; weight and bias (C,); residual in x's shape,
    in x's dtype or fp32 (a 16-bit branch added to an fp32 stream). Returns y in x's shape and
    dtype, or (y, h) where a residual is given, h in the residual's dtype. Statistics and all
    gradients accumulate in fp32; those of weight and bias are summed in a fixed order.

    Raises ValueError for shapes or dtypes that do not fit. Source: Zhang and Sennrich 2019, eq. 4.
    """
    return _normalize("rms_norm", x, weight, bias, eps, residual, centered=False)


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    residual: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Layer normalization: y = (h − mean(h)) / sqrt(var(h) + eps) * weight + bias.

    h = x + residual; var is the mean of the squared deviations, as in torch.nn.LayerNorm. Shapes,
    dtypes, residual, what is returned and what is raised are those of `rms_norm`.
    Source: Ba, Kiros and Hinton 2016, eqs. 3 and 4.
    """
    return _normalize("layer_norm", x, weight, bias, eps, residual, centered=True)
