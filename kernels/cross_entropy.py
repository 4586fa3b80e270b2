"""Cross-entropy of logits with target indices, in fp32 whatever the logits' dtype.

    loss[i] = log Σ_v exp(logits[i, v]) − logits[i, targets[i]]

and, each only where it is asked for: a cap on the logits, smoothed targets, a penalty on the
log-sum-exp. Shapes: N rows (all dimensions but the last, flattened), V the vocabulary.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _cpu
from ._activations import exp
from ._runtime import (
    TRITON_TYPE,
    Specialization,
    check_dtype,
    check_reduction,
    jit,
    launch,
    operation,
    tl,
    traced,
    unit_stride,
    use_triton,
)
from .softmax import with_block

FEW = 2**17  # logits for which PyTorch's own operation takes no longer on a CPU


class Options(NamedTuple):
    """What changes the loss. Zero is off, and costs nothing: its code is not compiled."""

    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float = 0.0

    def flags(self) -> dict[str, bool]:
        """Which of them are on, by the kernels' names."""
        return dict(SMOOTHING=self[0] != 0, Z_LOSS=self[1] != 0, SOFTCAP=self[2] != 0)


def cross_entropy_reference(
    logits: Tensor,
    targets: Tensor,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
) -> Tensor:
    """The definition, computed in fp32 (fp64 stays fp64)."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    targets = targets.long()
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    kept = targets != ignore_index
    index = targets.where(kept, 0)[..., None].long()
    logprobs = logits.log_softmax(-1)
    losses = -logprobs.gather(-1, index)[..., 0]
    if label_smoothing:
        losses = (1 - label_smoothing) * losses - label_smoothing * logprobs.mean(-1)
    if z_loss:
        losses = losses + z_loss * logits.logsumexp(-1).square()
    return reduce_losses(losses.where(kept, 0), targets, ignore_index, reduction)


def reduce_losses(losses: Tensor, targets: Tensor, ignore_index: int, reduction: str) -> Tensor:
    """The mean is over the targets that are not ignored, and 0 where all are; targets are int64,
    as a narrow type would wrap ignore_index to a class."""
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / _count(targets, ignore_index)


def _count(targets: Tensor, ignore_index: int) -> Tensor:
    return (targets != ignore_index).sum().clamp_min(1)


@jit
def _capped(b_logits, softcap):
    """(softcap · tanh(logits / softcap), its derivative)."""
    u = b_logits * (1.0 / softcap)
    e = exp(-2.0 * tl.abs(u))
    inverse = 1.0 / (1.0 + e)
    tanh = (1.0 - e) * inverse
    tanh = tl.where(u < 0.0, -tanh, tanh)
    # Near 0 the difference 1 − e cancels: there the series, to its u⁹ term.
    square = u * u
    series = -17.0 / 315.0 + square * (62.0 / 2835.0)
    series = u * (1.0 + square * (-1.0 / 3.0 + square * (2.0 / 15.0 + square * series)))
    # The derivative, 1 − tanh², without its cancellation where tanh is near 1.
    return softcap * tl.where(square < 0.0625, series, tanh), 4.0 * e * inverse * inverse


@jit
def row_loss(
    row_ptr,
    target,
    n_cols,
    n_readable,
    label_smoothing,
    z_loss,
    softcap,
    SMOOTHING: tl.constexpr,
    Z_LOSS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """(loss, max z, Σ exp(z − max z)) in fp32 of the row's n_cols logits, z where they are capped.

    n_readable ≥ n_cols of them may be read (a better aligned mask). The maximum and the sum stay
    apart: their log-sum-exp would round away a small loss beside large logits.
    """
    # No such target: NaN shows without a synchronization, and nothing is read out of bounds.
    exists = (target >= 0) & (target < n_cols)
    chosen = tl.load(row_ptr + target, mask=exists, other=float("nan")).to(tl.float32)
    if SOFTCAP:
        chosen = _capped(chosen, softcap)[0]
    if SMOOTHING:
        # Logits are summed as differences from a number that is near them.
        origin = tl.where(chosen > float("-inf"), chosen, 0.0)
        b_below = tl.zeros((BLOCK_V,), tl.float32)
    maximum = tl.full((), -3.4028234663852886e38, tl.float32)
    b_sum = tl.zeros((BLOCK_V,), tl.float32)
    for start in range(0, n_cols, BLOCK_V):
        o_col = start + tl.arange(0, BLOCK_V)
        m_col = o_col < n_cols
        b_logits = tl.load(row_ptr + o_col, mask=o_col < n_readable, other=0.0).to(tl.float32)
        if SOFTCAP:
            b_logits = _capped(b_logits, softcap)[0]
        if SMOOTHING:
            b_below += tl.where(m_col, origin - b_logits, 0.0)
        if start + BLOCK_V > n_cols:
            b_logits = tl.where(m_col, b_logits, float("-inf"))
        maximum, b_sum = with_block(maximum, b_sum, b_logits)
    total = tl.sum(b_sum, 0)
    log_sum = tl.log(total)
    loss = (maximum - chosen) + log_sum
    if SMOOTHING:
        of_all = (maximum - origin) + log_sum + tl.sum(b_below, 0) / n_cols
        loss = (1.0 - label_smoothing) * loss + label_smoothing * of_all
    if Z_LOSS:
        log_sum_exp = maximum + log_sum
        loss += z_loss * log_sum_exp * log_sum_exp
    return loss, maximum, total


@jit
def row_gradient(
    row_ptr,
    drow_ptr,
    target,
    maximum,
    total,
    upstream,
    n_cols,
    n_readable,
    label_smoothing,
    z_loss,
    softcap,
    SMOOTHING: tl.constexpr,
    Z_LOSS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Writes n_readable columns of the gradient, which may overwrite the logits.

    dz = (softmax(z) (1 + 2 z_loss lse) − (1 − label_smoothing) onehot − label_smoothing / V) dloss
    """
    exists = (target >= 0) & (target < n_cols)
    upstream = tl.where(exists, upstream, float("nan"))
    of_exp = upstream / total
    of_target = upstream
    if Z_LOSS:
        of_exp *= 1.0 + 2.0 * z_loss * (maximum + tl.log(total))
    if SMOOTHING:
        of_target = (1.0 - label_smoothing) * upstream
        of_each = label_smoothing * upstream / n_cols
    dtype = drow_ptr.dtype.element_ty
    for start in range(0, n_cols, BLOCK_V):
        o_col = start + tl.arange(0, BLOCK_V)
        m_col = o_col < n_readable
        b_logits = tl.load(row_ptr + o_col, mask=m_col, other=float("-inf")).to(tl.float32)
        if SOFTCAP:
            b_logits, b_slope = _capped(b_logits, softcap)
        b_grad = exp(b_logits - maximum) * of_exp
        if (target >= start) & (target < start + BLOCK_V):
            b_grad -= tl.where(o_col == target, of_target, 0.0)
        if SMOOTHING:
            b_grad -= of_each
        if SOFTCAP:
            b_grad *= b_slope
        tl.store(drow_ptr + o_col, b_grad.to(dtype), mask=m_col)


@jit
def clear_row(row_ptr, n_cols, n_writable, BLOCK_V: tl.constexpr):
    zeros = tl.zeros((BLOCK_V,), row_ptr.dtype.element_ty)
    for start in range(0, n_cols, BLOCK_V):
        o_col = start + tl.arange(0, BLOCK_V)
        tl.store(row_ptr + o_col, zeros, mask=o_col < n_writable)


@jit
def _cross_entropy_forward_kernel(
    logits_ptr,
    targets_ptr,
    losses_ptr,
    statistics_ptr,
    stride_row,
    n_cols,
    ignore_index,
    label_smoothing,
    z_loss,
    softcap,
    SMOOTHING: tl.constexpr,
    Z_LOSS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + i_row)
    loss = 0.0
    maximum = 0.0
    total = 0.0
    if target != ignore_index:
        loss, maximum, total = row_loss(
            logits_ptr + i_row * stride_row,
            target,
            n_cols,
            n_cols,
            label_smoothing,
            z_loss,
            softcap,
            SMOOTHING,
            Z_LOSS,
            SOFTCAP,
            BLOCK_V,
        )
    tl.store(losses_ptr + i_row, loss)
    tl.store(statistics_ptr + 2 * i_row, maximum)
    tl.store(statistics_ptr + 2 * i_row + 1, total)


@jit
def _cross_entropy_backward_kernel(
    logits_ptr,
    targets_ptr,
    statistics_ptr,
    upstream_ptr,
    dlogits_ptr,
    stride_row,
    n_cols,
    ignore_index,
    label_smoothing,
    z_loss,
    softcap,
    SMOOTHING: tl.constexpr,
    Z_LOSS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + i_row)
    drow_ptr = dlogits_ptr + i_row * n_cols
    if target == ignore_index:
        clear_row(drow_ptr, n_cols, n_cols, BLOCK_V)
    else:
        row_gradient(
            logits_ptr + i_row * stride_row,
            drow_ptr,
            target,
            tl.load(statistics_ptr + 2 * i_row),
            tl.load(statistics_ptr + 2 * i_row + 1),
            tl.load(upstream_ptr + i_row),
            n_cols,
            n_cols,
            label_smoothing,
            z_loss,
            softcap,
            SMOOTHING,
            Z_LOSS,
            SOFTCAP,
            BLOCK_V,
        )


def block_and_warps(n_cols: int) -> tuple[int, int]:
    """Columns of a step of the loop, 8 to 32 for each thread, and warps."""
    if n_cols <= 256:
        return 256, 1
    return (2048, 4) if n_cols <= 4096 else (8192, 8)


BLOCKS = [block_and_warps(n) for n in (256, 4096, 4097)]


def compiled_flags(dtype: str, block_v: int) -> Iterator[dict[str, bool]]:
    """Flags to compile ahead: none and all of them everywhere, each alone at the widest in fp32.

    A flag only adds code and registers, and none depends on another.
    """
    yield Options().flags()
    yield Options(1.0, 1.0, 1.0).flags()
    if (dtype, block_v) == ("fp32", BLOCKS[-1][0]):
        for i in range(3):
            yield Options(*(float(i == j) for j in range(3))).flags()


def specializations(capability: int) -> Iterator[Specialization]:
    """The ways in which the launchers below can compile the kernels, see `compiled_flags`."""
    for dtype in TRITON_TYPE.values():
        shared = dict(logits_ptr=f"*{dtype}:16", stride_row="i32:16", targets_ptr="*i64:16")
        shared |= dict(n_cols="i32:16", ignore_index="i32", statistics_ptr="*fp32:16")
        shared |= dict.fromkeys(Options._fields, "fp32")
        for block_v, num_warps in BLOCKS:
            for flags in compiled_flags(dtype, block_v):
                yield Specialization(
                    _cross_entropy_forward_kernel,
                    shared | dict(losses_ptr="*fp32:16"),
                    flags | dict(BLOCK_V=block_v),
                    num_warps=num_warps,
                )
                yield Specialization(
                    _cross_entropy_backward_kernel,
                    shared | dict(upstream_ptr="*fp32:16", dlogits_ptr=f"*{dtype}:16"),
                    flags | dict(BLOCK_V=block_v),
                    num_warps=num_warps,
                )


def launch_forward(
    logits: Tensor,
    targets: Tensor,
    losses: Tensor,
    statistics: Tensor,
    ignore_index: int,
    options: Options,
) -> None:
    """losses (N,), statistics (N, 2), fp32, of logits (N, V) with unit stride in a row."""
    n_rows, n_cols = logits.shape
    block_v, num_warps = block_and_warps(n_cols)
    if n_rows:
        launch(
            _cross_entropy_forward_kernel,
            n_rows,
            (logits, targets, losses, statistics),
            (logits.stride(0), n_cols, ignore_index, *options),
            **options.flags(),
            BLOCK_V=block_v,
            num_warps=num_warps,
        )


@operation("ponder::cross_entropy")
def _cross_entropy(
    logits: Tensor, targets: Tensor, ignore_index: int, options: list[float]
) -> tuple[Tensor, Tensor]:
    """(losses (N,), statistics (N, 2)), both fp32, of logits (N, V) and int64 targets (N,).

    The statistics: a row's max and Σ exp(· − max).
    """
    losses = logits.new_empty(logits.shape[0], dtype=torch.float32)
    statistics = losses.new_empty((*losses.shape, 2))
    if use_triton(logits):
        launch_forward(logits, targets, losses, statistics, ignore_index, Options(*options))
    else:
        found = dict(losses=losses, statistics=statistics)
        _cpu.losses(logits, targets, ignore_index, options, **found)
    return losses, statistics


@_cross_entropy.register_fake
def _(logits, targets, ignore_index, options):
    losses = logits.new_empty(logits.shape[0], dtype=torch.float32)
    return losses, losses.new_empty((*losses.shape, 2))


@operation("ponder::cross_entropy_backward")
def _cross_entropy_backward(
    upstream: Tensor,
    logits: Tensor,
    targets: Tensor,
    statistics: Tensor,
    ignore_index: int,
    options: list[float],
) -> Tensor:
    """The gradient of Σ losses · upstream, in logits' dtype."""
    n_rows, n_cols = logits.shape
    dlogits = logits.new_empty(logits.shape)
    block_v, num_warps = block_and_warps(n_cols)
    if not use_triton(logits):
        given = dict(upstream=upstream, statistics=statistics)
        _cpu.losses(logits, targets, ignore_index, options, dlogits=dlogits, **given)
    elif n_rows:
        launch(
            _cross_entropy_backward_kernel,
            n_rows,
            (logits, targets, statistics, upstream, dlogits),
            (logits.stride(0), n_cols, ignore_index, *options),
            **Options(*options).flags(),
            BLOCK_V=block_v,
            num_warps=num_warps,
        )
    return dlogits


@_cross_entropy_backward.register_fake
def _(upstream, logits, targets, statistics, ignore_index, options):
    return logits.new_empty(logits.shape)


def _setup_context(ctx, inputs, output):
    logits, targets, ctx.ignore_index, ctx.options = inputs
    ctx.save_for_backward(logits, targets, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, dlosses, _):
    dlogits = _cross_entropy_backward(
        dlosses.contiguous(), *ctx.saved_tensors, ctx.ignore_index, ctx.options
    )
    return dlogits, None, None, None


_cross_entropy.register_autograd(_backward, setup_context=_setup_context)


def check_options(
    name: str, label_smoothing: float, z_loss: float, softcap: float | None
) -> Options:
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"{name}: label_smoothing is {label_smoothing}; it must be from 0 to 1")
    if not 0 <= z_loss < math.inf:
        raise ValueError(f"{name}: z_loss is {z_loss}; it must be 0 or more, and finite")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"{name}: softcap is {softcap}; it must be positive and finite, or None")
    return Options(float(label_smoothing), float(z_loss), float(softcap or 0.0))


def check_targets(
    name: str,
    logits: Tensor,
    n_classes: int,
    targets: Tensor,
    ignore_index: int,
    reduction: str,
) -> Tensor:
    """The targets, flat and int64; ValueError where they do not fit the rows of `logits`, or of
    what they are made from.

    Their values are looked at on the CPU alone, and not where calls are traced (fake tensors have
    none): on a GPU that would wait for everything before.
    """
    shape, device = logits.shape[:-1], logits.device
    check_reduction(name, reduction)
    if not n_classes:
        raise ValueError(f"{name}: there are 0 classes; there must be 1 or more")
    if targets.shape != shape:
        raise ValueError(
            f"{name}: targets are {tuple(targets.shape)}; it must be {tuple(shape)}, one a row"
        )
    if targets.device != device:
        raise ValueError(f"{name}: targets are on {targets.device}; they must be on {device}")
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        raise ValueError(f"{name}: targets are {targets.dtype}; they must be integers")
    targets = targets.reshape(-1).long().contiguous()  # a column of a table has a stride
    if targets.device.type == "cpu" and not traced() and targets.numel():
        least, largest = targets.aminmax()
        if least < 0 or largest >= n_classes:
            wrong = targets[((targets < 0) | (targets >= n_classes)) & (targets != ignore_index)]
            if wrong.numel():
                raise ValueError(
                    f"{name}: a target is {wrong[0].item()}; it must be at least 0 and less than "
                    f"{n_classes}, or ignore_index, {ignore_index}"
                )
    return targets


def on_cpu(
    logits: Tensor,
    targets: Tensor,
    ignore_index: int,
    options: Options,
    reduction: str,
    shape: torch.Size,
) -> Tensor:
    """The loss of logits (N, V) and targets (N,), in C or by PyTorch's own operation."""
    if logits.numel() > FEW and _cpu.takes(logits):
        return _fused(logits, targets, ignore_index, options, reduction, shape)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if options.softcap:
        logits = options.softcap * torch.tanh(logits / options.softcap)
    kind = "none" if reduction == "none" else "sum"
    loss = F.cross_entropy(
        logits,
        targets,
        ignore_index=ignore_index,
        reduction=kind,
        label_smoothing=options.label_smoothing,
    )
    if options.z_loss:
        squares = logits.logsumexp(-1).square().where(targets != ignore_index, 0)
        loss = loss + options.z_loss * reduce_losses(squares, targets, ignore_index, kind)
    if reduction == "mean":
        return loss / _count(targets, ignore_index)
    return loss.view(shape) if reduction == "none" else loss


def _fused(
    logits: Tensor,
    targets: Tensor,
    ignore_index: int,
    options: Options,
    reduction: str,
    shape: torch.Size,
) -> Tensor:
    losses, _ = _cross_entropy(unit_stride(logits), targets, ignore_index, list(options))
    return reduce_losses(losses.view(shape), targets, ignore_index, reduction)


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
) -> Tensor:
    """Cross-entropy in nats: loss[i] = lse[i] − logits[i, targets[i]].

    lse[i] = log Σ_v exp(logits[i, v]); logits (..., V) in fp32, fp16 or bf16, never overwritten;
    targets (...) integers in [0, V) or ignore_index, whose loss and gradient are 0. reduction
    "mean" (over the targets that are not ignored), "sum", or "none" (losses in the targets' shape).
    The result and all arithmetic are fp32; the gradient has logits' dtype. The mean over no target
    at all is 0, where torch.nn.functional.cross_entropy gives NaN: a micro-batch that is masked
    whole then adds nothing to an accumulated loss instead of destroying it.

    softcap: softcap · tanh(logits / softcap) takes the logits' place (Gemma 2, section 2).
    label_smoothing, from 0 to 1, is the part of the target that all V classes share alike, as in
    torch.nn.functional.cross_entropy: loss += label_smoothing · (logits[target] − mean_v logits).
    z_loss: loss += z_loss · lse², which holds lse near 0 (PaLM, section 5, with 1e-4).

    Raises ValueError for shapes, dtypes, a reduction or options that do not fit, and on the CPU for
    a target out of range; on a GPU, where looking would cost a synchronization, such a target's
    loss and gradient are NaN. Sources: Bridle 1990; label_smoothing: Szegedy et al. 2016,
    section 7; softcap: Gemma Team 2024; z_loss: Chowdhery et al. 2022.
    """
    shape, n_cols = logits.shape[:-1], logits.shape[-1]
    options = check_options("cross_entropy", label_smoothing, z_loss, softcap)
    flat = check_targets("cross_entropy", logits, n_cols, targets, ignore_index, reduction)
    if use_triton(logits):
        check_dtype("cross_entropy", "logits", logits.dtype)
    compute = _fused if use_triton(logits) else on_cpu
    rows = logits.reshape(-1, n_cols)
    return compute(rows, flat, ignore_index, options, reduction, shape)
