"""Rotary position embedding of queries and keys, in the half-split convention of Llama and Qwen.

With the first and second half of a head's dimensions, x = (a, b), and angles θ of shape (T, D/2):

    y = (a cos θ − b sin θ,  b cos θ + a sin θ)

Su et al. 2021, "RoFormer", section 3.4.2, with pairs (i, i + D/2) where the paper has (2i, 2i + 1).
A rotation's gradient is the rotation by −θ, so one kernel serves both directions. QK-norm, an RMS
norm of each head just before, can be part of it: then q and k are read once and written once.
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
    launch,
    next_power_of_2,
    only_once,
    operation,
    tl,
    traced,
    unit_stride,
    use_triton,
)
from .norm import PROGRAMS, rms_norm, rms_norm_reference

MAX_HEAD_DIM = 512
MIN_BLOCK_D = 32


def rotary_reference(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """The definition, computed in fp32 (fp64 stays fp64) and returned in q's and k's dtype."""
    if cos.dim() == 3:
        cos, sin = cos[:, None], sin[:, None]  # one for all heads

    def rotate(x, weight):
        y = x if x.dtype == torch.float64 else x.float()
        a, b = (y if weight is None else rms_norm_reference(y, weight, eps=eps)).chunk(2, -1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)

    return rotate(q, q_norm), rotate(k, k_norm)


@jit
def _halves(x_ptr, offset, half_dim, mask):
    a = tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(x_ptr + offset + half_dim, mask=mask, other=0.0).to(tl.float32)
    return a, b


@jit
def _store_halves(x_ptr, offset, half_dim, mask, a, b):
    dtype = x_ptr.dtype.element_ty
    tl.store(x_ptr + offset, a.to(dtype), mask=mask)
    tl.store(x_ptr + offset + half_dim, b.to(dtype), mask=mask)


@jit
def _heads(i_tile, n_head, n_token, BLOCK_H: tl.constexpr):
    """(row, tokens, heads, places in a row) of a tile: the heads of a token lie side by side."""
    n_tile = tl.cdiv(n_token * n_head, BLOCK_H)  # of a row
    i_row = (i_tile // n_tile).to(tl.int64)
    place = (i_tile % n_tile) * BLOCK_H + tl.arange(0, BLOCK_H)
    o_token, o_head = place // n_head, place % n_head
    return i_row, o_token.to(tl.int64), o_head.to(tl.int64), place.to(tl.int64)


@jit
def _normalize(a, b, half_dim, m_head, eps):
    """Halves of heads divided by the heads' root mean squares, and what they were multiplied by."""
    rstd = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / (2 * half_dim) + eps)
    rstd = tl.where(m_head, rstd, 0.0)[:, None]  # past the last head eps = 0 would give inf
    return a * rstd, b * rstd, rstd


@jit
def _rotary_kernel(
    q_ptr,
    k_ptr,
    cos_ptr,
    sin_ptr,
    yq_ptr,
    yk_ptr,
    q_norm_ptr,
    k_norm_ptr,
    stride_q_row,
    stride_q_head,
    stride_q_token,
    stride_k_row,
    stride_k_head,
    stride_k_token,
    stride_cos_row,
    n_row,
    n_q_head,
    n_k_head,
    n_token,
    half_dim,
    direction,
    eps,
    NORMED: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # The first programs take the tiles of q, the others those of k.
    i_tile = tl.program_id(0)
    n_q_tile = n_row * tl.cdiv(n_token * n_q_head, BLOCK_H)
    of_q = i_tile < n_q_tile
    i_tile = tl.where(of_q, i_tile, i_tile - n_q_tile)
    n_head = tl.where(of_q, n_q_head, n_k_head)
    x_ptr, y_ptr = tl.where(of_q, q_ptr, k_ptr), tl.where(of_q, yq_ptr, yk_ptr)
    stride_row = tl.where(of_q, stride_q_row, stride_k_row)
    stride_head = tl.where(of_q, stride_q_head, stride_k_head)
    stride_token = tl.where(of_q, stride_q_token, stride_k_token)

    i_row, o_token, o_head, place = _heads(i_tile, n_head, n_token, BLOCK_H)
    o_col = tl.arange(0, BLOCK_D)
    m_head, m_col = o_token < n_token, o_col < half_dim
    mask = m_head[:, None] & m_col[None, :]
    o_angle = (i_row * stride_cos_row + o_token * half_dim)[:, None] + o_col[None, :]
    b_cos = tl.load(cos_ptr + o_angle, mask=mask, other=0.0)
    b_sin = tl.load(sin_ptr + o_angle, mask=mask, other=0.0) * direction
    o_x = i_row * stride_row + o_token * stride_token + o_head * stride_head
    a, b = _halves(x_ptr, o_x[:, None] + o_col[None, :], half_dim, mask)
    if NORMED:
        a, b, _ = _normalize(a, b, half_dim, m_head, eps)
        weight_ptr = tl.where(of_q, q_norm_ptr, k_norm_ptr)
        weight_a, weight_b = _halves(weight_ptr, o_col, half_dim, m_col)
        a, b = a * weight_a[None, :], b * weight_b[None, :]
    o_y = (i_row * n_token * n_head + place) * half_dim * 2  # y lies as (B, T, H, D)
    y_a, y_b = a * b_cos - b * b_sin, b * b_cos + a * b_sin
    _store_halves(y_ptr, o_y[:, None] + o_col[None, :], half_dim, mask, y_a, y_b)


@jit
def _backward_kernel(
    dyq_ptr,
    dyk_ptr,
    q_ptr,
    k_ptr,
    cos_ptr,
    sin_ptr,
    q_norm_ptr,
    k_norm_ptr,
    dq_ptr,
    dk_ptr,
    dweight_ptr,
    stride_dyq_row,
    stride_dyq_head,
    stride_dyq_token,
    stride_dyk_row,
    stride_dyk_head,
    stride_dyk_token,
    stride_q_row,
    stride_q_head,
    stride_q_token,
    stride_k_row,
    stride_k_head,
    stride_k_token,
    stride_cos_row,
    n_row,
    n_q_head,
    n_k_head,
    n_token,
    half_dim,
    eps,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # Of the rotation with norms: the first half of the programs share out q, the others k.
    i_program = tl.program_id(0)
    n_program = tl.num_programs(0) // 2
    of_q = i_program < n_program
    n_head = tl.where(of_q, n_q_head, n_k_head)
    x_ptr, dy_ptr = tl.where(of_q, q_ptr, k_ptr), tl.where(of_q, dyq_ptr, dyk_ptr)
    stride_x_row = tl.where(of_q, stride_q_row, stride_k_row)
    stride_x_head = tl.where(of_q, stride_q_head, stride_k_head)
    stride_x_token = tl.where(of_q, stride_q_token, stride_k_token)
    stride_dy_row = tl.where(of_q, stride_dyq_row, stride_dyk_row)
    stride_dy_head = tl.where(of_q, stride_dyq_head, stride_dyk_head)
    stride_dy_token = tl.where(of_q, stride_dyq_token, stride_dyk_token)
    dx_ptr = tl.where(of_q, dq_ptr, dk_ptr)

    o_col = tl.arange(0, BLOCK_D)
    m_col = o_col < half_dim
    weight_ptr = tl.where(of_q, q_norm_ptr, k_norm_ptr)
    weight_a, weight_b = _halves(weight_ptr, o_col, half_dim, m_col)
    dweight_a = tl.zeros((BLOCK_H, BLOCK_D), dtype=tl.float32)
    dweight_b = tl.zeros((BLOCK_H, BLOCK_D), dtype=tl.float32)
    n_tile = n_row * tl.cdiv(n_token * n_head, BLOCK_H)
    for i_tile in tl.range(tl.where(of_q, i_program, i_program - n_program), n_tile, n_program):
        i_row, o_token, o_head, place = _heads(i_tile, n_head, n_token, BLOCK_H)
        m_head = o_token < n_token
        mask = m_head[:, None] & m_col[None, :]
        o_angle = (i_row * stride_cos_row + o_token * half_dim)[:, None] + o_col[None, :]
        b_cos = tl.load(cos_ptr + o_angle, mask=mask, other=0.0)
        b_sin = tl.load(sin_ptr + o_angle, mask=mask, other=0.0)
        o_x = i_row * stride_x_row + o_token * stride_x_token + o_head * stride_x_head
        o_dy = i_row * stride_dy_row + o_token * stride_dy_token + o_head * stride_dy_head
        a, b = _halves(x_ptr, o_x[:, None] + o_col[None, :], half_dim, mask)
        dy_a, dy_b = _halves(dy_ptr, o_dy[:, None] + o_col[None, :], half_dim, mask)
        a, b, rstd = _normalize(a, b, half_dim, m_head, eps)
        da = dy_a * b_cos + dy_b * b_sin
        db = dy_b * b_cos - dy_a * b_sin
        dweight_a += da * a
        dweight_b += db * b
        da *= weight_a[None, :]
        db *= weight_b[None, :]
        along = ((tl.sum(da * a, 1) + tl.sum(db * b, 1)) / (2 * half_dim))[:, None]
        da, db = (da - a * along) * rstd, (db - b * along) * rstd
        o_dx = (i_row * n_token * n_head + place) * half_dim * 2
        _store_halves(dx_ptr, o_dx[:, None] + o_col[None, :], half_dim, mask, da, db)
    dweight_ptr += i_program.to(tl.int64) * half_dim * 2 + o_col
    tl.store(dweight_ptr, tl.sum(dweight_a, 0), mask=m_col)
    tl.store(dweight_ptr + half_dim, tl.sum(dweight_b, 0), mask=m_col)


def _blocks(half_dim: int) -> tuple[int, int]:
    """(heads, columns) of a tile: 1024 pairs, eight for each of 128 threads."""
    block_d = max(MIN_BLOCK_D, next_power_of_2(half_dim))
    return max(1, 1024 // block_d), block_d


def specializations(capability: int) -> Iterator[Specialization]:
    """Every way in which the launchers below can compile the kernels."""

    def strides(*tensors: str) -> dict[str, str]:
        names = [f"stride_{x}_{axis}" for x in tensors for axis in ("row", "head", "token")]
        return dict.fromkeys([*names, "stride_cos_row", "half_dim"], "i32:16")

    angles = dict(cos_ptr="*fp32:16", sin_ptr="*fp32:16")
    for dtype in ("fp32", "fp16", "bf16"):
        weights = dict.fromkeys(["q_norm_ptr", "k_norm_ptr"], "*fp32:16")
        pointers = {f"{x}_ptr": f"*{dtype}:16" for x in ("q", "k", "yq", "yk")}
        back = {f"{x}_ptr": f"*{dtype}:16" for x in ("dyq", "dyk", "q", "k", "dq", "dk")}
        counts = dict.fromkeys(["n_row", "n_q_head", "n_k_head", "n_token"], "i32")
        for log_d in range(MIN_BLOCK_D.bit_length() - 1, MAX_HEAD_DIM.bit_length() - 1):
            block_h, block_d = _blocks(1 << log_d)
            blocks = dict(BLOCK_H=block_h, BLOCK_D=block_d)
            for normed in (False, True):
                yield Specialization(
                    _rotary_kernel,
                    pointers | angles | weights | strides("q", "k") | counts
                    | dict(direction="fp32", eps="fp32"),
                    dict(NORMED=normed, **blocks),
                )  # fmt: skip
            yield Specialization(
                _backward_kernel,
                back | angles | weights | strides("dyq", "dyk", "q", "k") | counts
                | dict(dweight_ptr="*fp32:16", eps="fp32"),
                blocks,
            )  # fmt: skip


def _empty(x: Tensor) -> Tensor:
    """As large as x (B, H, T, D), in the memory order (B, T, H, D)."""
    n_row, n_head, n_token, head_dim = x.shape
    return x.new_empty(n_row, n_token, n_head, head_dim).transpose(1, 2)


def _empty_heads(x: Tensor) -> Tensor:
    """As large as x, in the memory order (B, H, T, D)."""
    return x.new_empty(x.shape)


def _rotated(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    norms: tuple[Tensor, Tensor] | None,
    eps: float,
    direction: float,
) -> tuple[Tensor, Tensor]:
    yq, yk = _empty(q), _empty(k)
    n_row, n_q_head, n_token, head_dim = q.shape
    n_k_head = k.shape[1]
    stride_q_row, _, stride_q_token, _ = q.stride()
    stride_k_row, _, stride_k_token, _ = k.stride()
    if (
        cos.dim() == 3
        and (stride_q_row, stride_k_row) == (n_token * stride_q_token, n_token * stride_k_token)
        and n_row * n_token * max(n_q_head, n_k_head) < 2**31
    ):
        # Tokens of one row: when each row has one, as in decoding, a tile is filled by several.
        n_row, n_token = 1, n_row * n_token
    block_h, block_d = _blocks(head_dim // 2)
    n_tiles = n_row * (cdiv(n_token * n_q_head, block_h) + cdiv(n_token * n_k_head, block_h))
    if n_tiles and head_dim:
        launch(
            _rotary_kernel,
            n_tiles,
            (q, k, cos, sin, yq, yk, *(norms or (cos, sin))),
            (
                *q.stride()[:3],
                *k.stride()[:3],
                cos.stride(0) if cos.dim() == 3 else 0,
                n_row,
                n_q_head,
                n_k_head,
                n_token,
                head_dim // 2,
                direction,
                eps,
            ),
            NORMED=norms is not None,
            BLOCK_H=block_h,
            BLOCK_D=block_d,
            num_warps=4,
        )
    return yq, yk


@operation("ponder::rotary")
def _rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    """q and k rotated by θ (by −θ where inverse); q and k have unit stride within a head."""
    return _rotated(q, k, cos, sin, None, 0.0, -1.0 if inverse else 1.0)


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


@operation("ponder::normed_rotary")
def _normed_rotary(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, q_norm: Tensor, k_norm: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """As `_rotary`, of q and k that are divided by each head's root mean square first."""
    return _rotated(q, k, cos, sin, (q_norm, k_norm), eps, 1.0)


@_normed_rotary.register_fake
def _(q, k, cos, sin, q_norm, k_norm, eps):
    return _empty(q), _empty(k)


@operation("ponder::normed_rotary_backward")
def _normed_rotary_backward(
    dyq: Tensor,
    dyk: Tensor,
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_norm: Tensor,
    k_norm: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dweights): dweights (2, D) in fp32 are q_norm's and k_norm's gradients."""
    dq, dk = _empty(q), _empty(k)
    n_row, n_q_head, n_token, head_dim = q.shape
    n_k_head = k.shape[1]
    block_h, block_d = _blocks(head_dim // 2)
    n_programs = min(PROGRAMS, n_row * cdiv(n_token * max(n_q_head, n_k_head), block_h))
    partial = q.new_empty((2, n_programs, head_dim), dtype=torch.float32)
    if n_programs and head_dim:
        launch(
            _backward_kernel,
            2 * n_programs,
            (dyq, dyk, q, k, cos, sin, q_norm, k_norm, dq, dk, partial),
            (
                *(stride for x in (dyq, dyk, q, k) for stride in x.stride()[:3]),
                cos.stride(0) if cos.dim() == 3 else 0,
                n_row,
                n_q_head,
                n_k_head,
                n_token,
                head_dim // 2,
                eps,
            ),
            BLOCK_H=block_h,
            BLOCK_D=block_d,
            num_warps=4,
        )
    return dq, dk, partial.sum(1)


@_normed_rotary_backward.register_fake
def _(dyq, dyk, q, k, cos, sin, q_norm, k_norm, eps):
    return _empty(q), _empty(k), q.new_empty((2, q.shape[-1]), dtype=torch.float32)


def _normed_setup_context(ctx, inputs, output):
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _normed_backward(ctx, dyq, dyk):
    *_, q_norm, k_norm = saved = ctx.saved_tensors
    dyq, dyk = unit_stride(dyq), unit_stride(dyk)
    dq, dk, (dq_norm, dk_norm) = _normed_rotary_backward(dyq, dyk, *saved, ctx.eps)
    return dq, dk, None, None, dq_norm.to(q_norm.dtype), dk_norm.to(k_norm.dtype), None


_normed_rotary.register_autograd(_normed_backward, setup_context=_normed_setup_context)


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
        empty = _empty if inverse else _empty_heads
        y = empty(q), empty(k)
        _cpu.rotate((unit_stride(q), unit_stride(k)), y, cos, sin, -1.0 if inverse else 1.0)
        return y

    @staticmethod
    def backward(ctx, dq, dk):  # pyright: ignore[reportIncompatibleMethodOverride]
        dq, dk = _RotaryInC.apply(dq, dk, *ctx.saved_tensors, not ctx.inverse)
        return dq, dk, None, None, None


class _NormedRotaryInC(torch.autograd.Function):
    """As `_RotaryInC`, of q and k that are divided by each head's root mean square first."""

    @staticmethod
    def forward(ctx, q, k, cos, sin, q_norm, k_norm, eps):
        q, k = unit_stride(q), unit_stride(k)
        ctx.save_for_backward(q, k, cos, sin, q_norm, k_norm)
        ctx.eps = eps
        y = _empty_heads(q), _empty_heads(k)
        _cpu.rotate((q, k), y, cos, sin, 1.0, (q_norm, k_norm), eps)
        return y

    @staticmethod
    @only_once
    def backward(ctx, dyq, dyk):  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, cos, sin, *norms = ctx.saved_tensors
        dx, dy = (_empty(q), _empty(k)), (unit_stride(dyq), unit_stride(dyk))
        dnorms = _cpu.rotate_backward(dy, (q, k), dx, cos, sin, norms, ctx.eps)
        dnorms = (d.to(norm.dtype) for d, norm in zip(dnorms, norms, strict=True))
        return *dx, None, None, *dnorms, None


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


def _check(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, q_norm: Tensor | None, k_norm: Tensor | None
) -> None:
    if q.dim() != 4 or q.shape[-1] % 2:
        raise ValueError(f"rotary: q is {tuple(q.shape)}; it must be (B, H, T, D) with an even D")
    n_row, _, n_token, head_dim = q.shape
    if k.dim() != 4 or (k.shape[0], *k.shape[2:]) != (n_row, n_token, head_dim):
        raise ValueError(
            f"rotary: k is {tuple(k.shape)}; beside q of {tuple(q.shape)} it must be "
            f"({n_row}, H, {n_token}, {head_dim})"
        )
    check_device("rotary", q, k=k, cos=cos, sin=sin, q_norm=q_norm, k_norm=k_norm)
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
    if (q_norm is None) != (k_norm is None):
        missing = "q_norm" if q_norm is None else "k_norm"
        raise ValueError(f"rotary: {missing} is None; q and k are both normalized, or neither is")
    for name, x in (("q_norm", q_norm), ("k_norm", k_norm)):
        if x is not None and x.shape != (head_dim,):
            raise ValueError(f"rotary: {name} is {tuple(x.shape)}; it must be ({head_dim},)")


def rotary(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """Rotary position embedding: each pair (x[i], x[i + D/2]) of q and k turned by its angle.

        y = (a cos θ − b sin θ,  b cos θ + a sin θ),  x = (a, b) the halves of a head

    q (B, Hq, T, D) and k (B, Hk, T, D) of one dtype (fp32, fp16 or bf16), any strides (a
    transposed (B, T, H, D) is not copied). cos and sin (T, D/2), or
    (B, T, D/2) where rows stand at positions of their own; fp32 (other dtypes are converted).
    With the weights q_norm and k_norm (D,) each head passes `rms_norm` with this eps first, in the
    same kernel: QK-norm, as Qwen3 has it.
    Returns q and k in their dtype; the arithmetic is fp32. Differentiable in q, k and the weights,
    whose gradients are summed in a fixed order; cos and sin are taken as constants and get no
    gradient.

    Raises ValueError for shapes or dtypes that do not fit, or where one of q_norm and k_norm is
    missing. Sources: Su et al. 2021, section 3.4.2; for QK-norm Henry et al. 2020, "Query-Key
    Normalization for Transformers", with an RMS norm for their l2 norm.
    """
    _check(q, k, cos, sin, q_norm, k_norm)
    triton = use_triton(q)
    in_c = not triton and _cpu.takes(q, k, q_norm, k_norm)
    if q_norm is not None and k_norm is not None and not (triton or in_c):
        pairs = (q, q_norm), (k, k_norm)
        q, k = (rms_norm(x, weight, eps=eps) for x, weight in pairs)  # pyright: ignore
        q_norm = k_norm = None
    if triton or in_c:
        cos, sin = cos.detach().float().contiguous(), sin.detach().float().contiguous()
    if in_c:
        if q_norm is None:
            return _RotaryInC.apply(q, k, cos, sin, False)  # pyright: ignore[reportReturnType]
        return _NormedRotaryInC.apply(q, k, cos, sin, q_norm, k_norm, eps)  # pyright: ignore
    if not triton:
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
    q, k = unit_stride(q), unit_stride(k)
    if q_norm is None or k_norm is None:
        return _rotary(q, k, cos, sin, False)
    return _normed_rotary(q, k, cos, sin, q_norm.contiguous(), k_norm.contiguous(), eps)
