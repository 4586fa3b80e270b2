"""Rotary position embedding of queries and keys, in the half-split convention of Llama and Qwen.

With the first and second half of a head's dimensions, x = (a, b), and angles θ of shape (T, D/2):

    y = (a cos θ − b sin θ,  b cos θ + a sin θ)

Su et al. 2021, "RoFormer", section 3.4.2, with pairs (i, i + D/2) where the paper has (2i, 2i + 1).
A rotation's gradient is the rotation by −θ, so one kernel serves both directions.
Shapes: B rows, H heads (of q or k), T tokens, D dimensions of a head.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from . import _cpu
from ._runtime import (
    Specialization,
    cdiv,
    check_device,
    check_dtype,
    jit,
    next_power_of_2,
    operation,
    tl,
    traced,
    unit_stride,
    use_triton,
)

MAX_HEAD_DIM = 512
MIN_BLOCK_D = 32


def rotary_reference(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """The definition, computed in fp32 (fp64 stays fp64) and returned in q's and k's dtype."""
    if cos.dim() == 3:
        cos, sin = cos[:, None], sin[:, None]  # one for all heads

    def rotate(x):
        a, b = x.chunk(2, -1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)

    return rotate(q), rotate(k)


@jit
def _rotate_tile(
    x_ptr,
    stride_x_row,
    stride_x_head,
    stride_x_token,
    y_ptr,
    stride_y_row,
    stride_y_head,
    stride_y_token,
    i_row,
    i_head,
    o_token,
    o_col,
    mask,
    b_cos,
    b_sin,
    half_dim,
):
    x_ptr += i_row * stride_x_row + i_head * stride_x_head
    y_ptr += i_row * stride_y_row + i_head * stride_y_head
    o_x = o_token[:, None] * stride_x_token + o_col[None, :]
    o_y = o_token[:, None] * stride_y_token + o_col[None, :]
    a = tl.load(x_ptr + o_x, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(x_ptr + o_x + half_dim, mask=mask, other=0.0).to(tl.float32)
    dtype = y_ptr.dtype.element_ty
    tl.store(y_ptr + o_y, (a * b_cos - b * b_sin).to(dtype), mask=mask)
    tl.store(y_ptr + o_y + half_dim, (b * b_cos + a * b_sin).to(dtype), mask=mask)


@jit
def _rotary_kernel(
    q_ptr,
    k_ptr,
    cos_ptr,
    sin_ptr,
    yq_ptr,
    yk_ptr,
    stride_q_row,
    stride_q_head,
    stride_q_token,
    stride_k_row,
    stride_k_head,
    stride_k_token,
    stride_yq_row,
    stride_yq_head,
    stride_yq_token,
    stride_yk_row,
    stride_yk_head,
    stride_yk_token,
    stride_cos_row,
    n_q_head,
    n_k_head,
    n_token,
    half_dim,
    direction,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # Heads run fastest: the programs that share a tile of angles run side by side.
    n_head = n_q_head + n_k_head
    i_head = (tl.program_id(0) % n_head).to(tl.int64)
    i_block = tl.program_id(0) // n_head
    n_block = tl.cdiv(n_token, BLOCK_T)
    i_row = (i_block // n_block).to(tl.int64)
    o_token = ((i_block % n_block) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    o_col = tl.arange(0, BLOCK_D)
    mask = (o_token < n_token)[:, None] & (o_col < half_dim)[None, :]
    o_angle = i_row * stride_cos_row + o_token[:, None] * half_dim + o_col[None, :]
    b_cos = tl.load(cos_ptr + o_angle, mask=mask, other=0.0)
    b_sin = tl.load(sin_ptr + o_angle, mask=mask, other=0.0) * direction
    if i_head < n_q_head:
        _rotate_tile(
            q_ptr,
            stride_q_row,
            stride_q_head,
            stride_q_token,
            yq_ptr,
            stride_yq_row,
            stride_yq_head,
            stride_yq_token,
            i_row,
            i_head,
            o_token,
            o_col,
            mask,
            b_cos,
            b_sin,
            half_dim,
        )
    else:
        _rotate_tile(
            k_ptr,
            stride_k_row,
            stride_k_head,
            stride_k_token,
            yk_ptr,
            stride_yk_row,
            stride_yk_head,
            stride_yk_token,
            i_row,
            i_head - n_q_head,
            o_token,
            o_col,
            mask,
            b_cos,
            b_sin,
            half_dim,
        )


def _blocks(half_dim: int) -> tuple[int, int]:
    """(tokens, columns) of a tile: 1024 pairs, eight for each of 128 threads."""
    block_d = max(MIN_BLOCK_D, next_power_of_2(half_dim))
    return max(1, 1024 // block_d), block_d


def specializations(capability: int) -> Iterator[Specialization]:
    """Every way in which the launcher below can compile the kernel."""
    tensors = ("q", "k", "yq", "yk")
    strides = [f"stride_{x}_{axis}" for x in tensors for axis in ("row", "head", "token")]
    for dtype in ("fp32", "fp16", "bf16"):
        for log_d in range(MIN_BLOCK_D.bit_length() - 1, MAX_HEAD_DIM.bit_length() - 1):
            block_t, block_d = _blocks(1 << log_d)
            yield Specialization(
                _rotary_kernel,
                {f"{x}_ptr": f"*{dtype}:16" for x in tensors}
                | dict(cos_ptr="*fp32:16", sin_ptr="*fp32:16", direction="fp32")
                | dict.fromkeys([*strides, "stride_cos_row", "half_dim"], "i32:16")
                | dict.fromkeys(["n_q_head", "n_k_head", "n_token"], "i32"),
                dict(BLOCK_T=block_t, BLOCK_D=block_d),
            )


def _empty(x: Tensor) -> Tensor:
    """As large as x (B, H, T, D), in the memory order (B, T, H, D)."""
    n_row, n_head, n_token, head_dim = x.shape
    return x.new_empty(n_row, n_token, n_head, head_dim).transpose(1, 2)


def _empty_heads(x: Tensor) -> Tensor:
    """As large as x, in the memory order (B, H, T, D)."""
    return x.new_empty(x.shape)


@operation("ponder::rotary")
def _rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    """q and k rotated by θ (by −θ where inverse); q and k have unit stride within a head."""
    yq, yk = _empty(q), _empty(k)
    n_row, n_q_head, n_token, head_dim = q.shape
    n_k_head = k.shape[1]
    block_t, block_d = _blocks(head_dim // 2)
    n_programs = n_row * cdiv(n_token, block_t) * (n_q_head + n_k_head)
    if n_programs and head_dim:
        _rotary_kernel[(n_programs,)](
            q,
            k,
            cos,
            sin,
            yq,
            yk,
            *q.stride()[:3],
            *k.stride()[:3],
            *yq.stride()[:3],
            *yk.stride()[:3],
            cos.stride(0) if cos.dim() == 3 else 0,
            n_q_head,
            n_k_head,
            n_token,
            head_dim // 2,
            -1.0 if inverse else 1.0,
            BLOCK_T=block_t,
            BLOCK_D=block_d,
            num_warps=4,
        )
    return yq, yk


@_rotary.register_fake
def _(q, k, cos, sin, inverse):
    return _empty(q), _empty(k)


def _setup_context(ctx, inputs, output):
    _, _, cos, sin, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin)


def _backward(ctx, dq, dk):
    cos, sin = ctx.saved_tensors
    dq, dk = _rotary(unit_stride(dq), unit_stride(dk), cos, sin, not ctx.inverse)
    return dq, dk, None, None, None


_rotary.register_autograd(_backward, setup_context=_setup_context, twice=True)


def _rotate_on_cpu(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """cos and sin repeated over both halves, the first half of sin negated."""
    wide = x.to(cos.dtype)  # PyTorch's products of two dtypes are slow
    y = torch.addcmul(wide * cos, wide.roll(x.shape[-1] // 2, -1), sin)
    # torch 2.11 compiles a Function that ends in a cast of nothing without its gradient.
    return y if y.dtype == x.dtype else y.to(x.dtype)


class _RotaryInC(torch.autograd.Function):
    """Laid out as attention takes it, and on the way back as the projection of q and k does."""

    @staticmethod
    def forward(ctx, q, k, cos, sin, inverse):
        ctx.save_for_backward(cos, sin)
        ctx.inverse = inverse
        empty, direction = (_empty, -1.0) if inverse else (_empty_heads, 1.0)
        return tuple(_cpu.rotate(unit_stride(x), empty(x), cos, sin, direction) for x in (q, k))

    @staticmethod
    def backward(ctx, dq, dk):  # pyright: ignore[reportIncompatibleMethodOverride]
        dq, dk = _RotaryInC.apply(dq, dk, *ctx.saved_tensors, not ctx.inverse)
        return dq, dk, None, None, None


class _RotaryOnCpu(torch.autograd.Function):
    """Backward by the same few passes: 0.65 to 0.77 of the time of the reference with autograd."""

    @staticmethod
    def forward(ctx, q, k, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _rotate_on_cpu(q, cos, sin), _rotate_on_cpu(k, cos, sin)

    @staticmethod
    def backward(ctx, dq, dk):  # pyright: ignore[reportIncompatibleMethodOverride]
        cos, sin = ctx.saved_tensors
        return _rotate_on_cpu(dq, cos, -sin), _rotate_on_cpu(dk, cos, -sin), None, None


def _check(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    if q.dim() != 4 or q.shape[-1] % 2:
        raise ValueError(f"rotary: q is {tuple(q.shape)}; it must be (B, H, T, D) with an even D")
    n_row, _, n_token, head_dim = q.shape
    if k.dim() != 4 or (k.shape[0], *k.shape[2:]) != (n_row, n_token, head_dim):
        raise ValueError(
            f"rotary: k is {tuple(k.shape)}; beside q of {tuple(q.shape)} it must be "
            f"({n_row}, H, {n_token}, {head_dim})"
        )
    check_device("rotary", q, k=k, cos=cos, sin=sin)
    if k.dtype != q.dtype:
        raise ValueError(f"rotary: k is {k.dtype}; it must be as q, {q.dtype}")
    angles = (n_token, head_dim // 2)
    for name, x in (("cos", cos), ("sin", sin)):
        # (Of sizes that torch.compile knows as symbols `not in` is not computed.)
        fits = x.shape == angles or x.shape == (n_row, *angles)
        if not fits or x.shape != cos.shape:
            raise ValueError(
                f"rotary: {name} is {tuple(x.shape)}; cos and sin must both be {angles} or "
                f"{(n_row, *angles)}"
            )


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary position embedding: each pair (x[i], x[i + D/2]) of q and k turned by its angle.

        y = (a cos θ − b sin θ,  b cos θ + a sin θ),  x = (a, b) the halves of a head

    q (B, Hq, T, D) and k (B, Hk, T, D) of one dtype (fp32, fp16 or bf16), any strides (a
    transposed (B, T, H, D) is not copied). cos and sin (T, D/2), or
    (B, T, D/2) where rows stand at positions of their own; fp32 (other dtypes are converted).
    Returns q and k in their dtype; the arithmetic is fp32. Differentiable in q and k; cos and sin
    are taken as constants and get no gradient.

    Raises ValueError for shapes or dtypes that do not fit. Source: Su et al. 2021, section 3.4.2.
    """
    _check(q, k, cos, sin)
    if not use_triton(q):
        if _cpu.takes(q, k):
            cos, sin = cos.detach().float().contiguous(), sin.detach().float().contiguous()
            return _RotaryInC.apply(q, k, cos, sin, False)  # pyright: ignore[reportReturnType]
        wide = torch.promote_types(q.dtype, torch.float32)
        cos, sin = cos.detach().to(wide), sin.detach().to(wide)
        if cos.dim() == 3:
            cos, sin = cos[:, None], sin[:, None]
        cos, sin = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)
        learns = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)
        if learns and not traced():
            return _RotaryOnCpu.apply(q, k, cos, sin)  # pyright: ignore[reportReturnType]
        return _rotate_on_cpu(q, cos, sin), _rotate_on_cpu(k, cos, sin)
    check_dtype("rotary", "q", q.dtype)
    if q.shape[-1] > MAX_HEAD_DIM:
        raise ValueError(f"rotary: heads of {q.shape[-1]} dimensions; at most {MAX_HEAD_DIM} fit")
    cos, sin = cos.detach().float().contiguous(), sin.detach().float().contiguous()
    return _rotary(unit_stride(q), unit_stride(k), cos, sin, False)
