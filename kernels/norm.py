"""RMS normalization with an optional fused residual add.

    h = x + residual
    y = h / sqrt(mean(h²) + eps) * weight

Zhang and Sennrich 2019, "Root Mean Square Layer Normalization", equation 4.
Shapes: N rows (all dimensions but the last, flattened), C columns.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from ._runtime import (
    TRITON_TYPE,
    Specialization,
    cdiv,
    jit,
    next_power_of_2,
    tl,
    use_triton,
)

MAX_COLUMNS = 8192  # past this the backward spills registers


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """The definition, computed in fp32 (fp64 stays fp64) and returned in x's dtype."""
    h = x if x.dtype == torch.float64 else x.float()
    y = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
    return (y * weight).to(x.dtype)


@jit
def _rms_norm_forward_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    y_ptr,
    h_ptr,
    rstd_ptr,
    n_cols,
    eps,
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
    rstd = 1.0 / tl.sqrt(tl.sum(h * h) / n_cols + eps)
    weight = tl.load(weight_ptr + o_col, mask=m_col, other=0.0).to(tl.float32)
    tl.store(y_ptr + offset, (h * rstd * weight).to(y_ptr.dtype.element_ty), mask=m_col)
    tl.store(rstd_ptr + i_row, rstd)


@jit
def _rms_norm_backward_kernel(
    dy_ptr,
    dh_ptr,
    h_ptr,
    weight_ptr,
    rstd_ptr,
    dx_ptr,
    dweight_ptr,
    n_rows,
    n_cols,
    rows_per_program,
    HAS_DH: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # dx_ptr has h's dtype: x's gradient is its rounding to x's dtype.
    i_program = tl.program_id(0).to(tl.int64)
    o_col = tl.arange(0, BLOCK_C)
    m_col = o_col < n_cols
    weight = tl.load(weight_ptr + o_col, mask=m_col, other=0.0).to(tl.float32)
    b_dweight = tl.zeros((BLOCK_C,), dtype=tl.float32)
    first = i_program * rows_per_program
    last = tl.minimum(first + rows_per_program, n_rows)
    for i_row in range(first, last):
        offset = i_row * n_cols + o_col
        h = tl.load(h_ptr + offset, mask=m_col, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + offset, mask=m_col, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + i_row)
        normed = h * rstd
        b_dweight += dy * normed
        g = dy * weight
        dx = (g - normed * (tl.sum(g * normed) / n_cols)) * rstd
        if HAS_DH:
            dx += tl.load(dh_ptr + offset, mask=m_col, other=0.0).to(tl.float32)
        tl.store(dx_ptr + offset, dx.to(dx_ptr.dtype.element_ty), mask=m_col)
    tl.store(dweight_ptr + i_program * n_cols + o_col, b_dweight, mask=m_col)


def _block(n_cols: int) -> int:
    return max(128, next_power_of_2(n_cols))


def _num_warps(block_c: int) -> int:
    return min(32, max(1, block_c // 512))


def _programs(n_rows: int) -> int:
    """Partial weight gradients; a fixed number, so that the sum's order never changes."""
    return min(n_rows, 512)


def specializations(capability: int) -> Iterator[Specialization]:
    """Every way in which the launchers below can compile the kernels."""
    # (x's dtype, the residual stream's): equal, or a 16-bit branch added to an fp32 stream.
    pairs = [(d, d) for d in ("fp32", "fp16", "bf16")] + [("fp16", "fp32"), ("bf16", "fp32")]
    for dtype, stream in pairs:
        for log_c in range(7, MAX_COLUMNS.bit_length()):
            block_c = 1 << log_c
            x, h = f"*{dtype}:16", f"*{stream}:16"
            weight = x if dtype == stream else "*fp32:16"
            for flag in (False, True) if dtype == stream else (True,):
                yield Specialization(
                    _rms_norm_forward_kernel,
                    dict(
                        x_ptr=x,
                        residual_ptr=h,
                        weight_ptr=weight,
                        y_ptr=x,
                        h_ptr=h,
                        rstd_ptr="*fp32:16",
                        n_cols="i32:16",
                        eps="fp32",
                    ),
                    dict(HAS_RESIDUAL=flag, BLOCK_C=block_c),
                    num_warps=_num_warps(block_c),
                )
                yield Specialization(
                    _rms_norm_backward_kernel,
                    dict(
                        dy_ptr=x,
                        dh_ptr=h,
                        h_ptr=h,
                        weight_ptr=weight,
                        rstd_ptr="*fp32:16",
                        dx_ptr=h,
                        dweight_ptr=weight,
                        n_rows="i32",
                        n_cols="i32:16",
                        rows_per_program="i32",
                    ),
                    dict(HAS_DH=flag, BLOCK_C=block_c),
                    num_warps=_num_warps(block_c),
                )


@torch.library.custom_op("ponder::rms_norm", mutates_args=())
def _rms_norm(
    x: Tensor, weight: Tensor, residual: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, h, rstd) of contiguous x (N, C); h is empty where there is no residual."""
    n_rows, n_cols = x.shape
    y = torch.empty_like(x)
    h = x.new_empty(0) if residual is None else torch.empty_like(residual)
    rstd = x.new_empty(n_rows, dtype=torch.float32)
    block_c = _block(n_cols)
    if n_rows:
        _rms_norm_forward_kernel[(n_rows,)](
            x,
            x if residual is None else residual,
            weight,
            y,
            h,
            rstd,
            n_cols,
            eps,
            HAS_RESIDUAL=residual is not None,
            BLOCK_C=block_c,
            num_warps=_num_warps(block_c),
        )
    return y, h, rstd


@_rms_norm.register_fake
def _(x, weight, residual, eps):
    h = x.new_empty(0) if residual is None else torch.empty_like(residual)
    return torch.empty_like(x), h, x.new_empty(x.shape[0], dtype=torch.float32)


@torch.library.custom_op("ponder::rms_norm_backward", mutates_args=())
def _rms_norm_backward(
    dy: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    """(dh, dweight): dh is the gradient of both x and the residual."""
    n_rows, n_cols = h.shape
    dx = torch.empty_like(h)
    n_programs = _programs(n_rows)
    partial = h.new_empty((n_programs, n_cols), dtype=torch.float32)
    block_c = _block(n_cols)
    if n_rows:
        _rms_norm_backward_kernel[(n_programs,)](
            dy,
            dy if dh is None else dh,
            h,
            weight,
            rstd,
            dx,
            partial,
            n_rows,
            n_cols,
            cdiv(n_rows, n_programs),
            HAS_DH=dh is not None,
            BLOCK_C=block_c,
            num_warps=_num_warps(block_c),
        )
    return dx, partial.sum(0).to(weight.dtype)


@_rms_norm_backward.register_fake
def _(dy, dh, h, weight, rstd):
    return torch.empty_like(h), torch.empty_like(weight)


def _setup_context(ctx, inputs, output):
    x, weight, residual, _ = inputs
    _, h, rstd = output
    ctx.has_residual, ctx.dtype = residual is not None, x.dtype
    ctx.save_for_backward(h if ctx.has_residual else x, weight, rstd)


def _backward(ctx, dy, dh, _):
    h, weight, rstd = ctx.saved_tensors
    dh = dh.contiguous() if ctx.has_residual else None
    dx, dweight = _rms_norm_backward(dy.contiguous(), dh, h, weight, rstd)
    return dx.to(ctx.dtype), dweight, dx if ctx.has_residual else None, None


_rms_norm.register_autograd(_backward, setup_context=_setup_context)


def rms_norm(
    x: Tensor, weight: Tensor, *, eps: float = 1e-6, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """Root mean square normalization: y = h / sqrt(mean(h²) + eps) * weight, h = x + residual.

    x (..., C) in fp32, fp16 or bf16; weight (C,); residual in x's shape, in x's dtype or fp32 (a
    16-bit branch added to an fp32 stream). Returns y in x's shape and dtype, or (y, h) where a
    residual is given, h in the residual's dtype. Statistics and both gradients accumulate in fp32;
    the weight's gradient is summed in a fixed order.

    Raises ValueError for shapes or dtypes that do not fit. Source: Zhang and Sennrich 2019, eq. 4.
    """
    if weight.shape != x.shape[-1:]:
        raise ValueError(
            f"rms_norm: weight has shape {tuple(weight.shape)}; x of shape {tuple(x.shape)} "
            f"needs ({x.shape[-1]},)"
        )
    if residual is not None and (
        residual.shape != x.shape or residual.dtype not in (x.dtype, torch.float32)
    ):
        raise ValueError(
            f"rms_norm: residual is {tuple(residual.shape)} {residual.dtype}; it must have x's "
            f"shape {tuple(x.shape)} and dtype {x.dtype}, or fp32"
        )
    if not use_triton(x):
        h = x if residual is None else x + residual
        y = torch.nn.functional.rms_norm(h, weight.shape, weight.to(h.dtype), eps).to(x.dtype)
        return y if residual is None else (y, h)
    if x.dtype not in TRITON_TYPE:
        raise ValueError(f"rms_norm: x is {x.dtype}; supported are fp32, fp16 and bf16")
    if x.shape[-1] > MAX_COLUMNS:
        raise ValueError(f"rms_norm: x has {x.shape[-1]} columns; at most {MAX_COLUMNS} fit a row")
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    added = None if residual is None else residual.reshape(flat.shape).contiguous()
    y, h, _ = _rms_norm(flat, weight.contiguous(), added, eps)
    return y.view(x.shape) if residual is None else (y.view(x.shape), h.view(x.shape))
