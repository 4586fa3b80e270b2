"""Cross-entropy of logits with target indices, in fp32 whatever the logits' dtype.

    loss[i] = log Σ_v exp(logits[i, v]) − logits[i, targets[i]]

Shapes: N rows (all dimensions but the last, flattened), V the vocabulary.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ._runtime import TRITON_TYPE, Specialization, jit, tl, use_triton

REDUCTIONS = ("mean", "sum", "none")


def cross_entropy_reference(
    logits: Tensor, targets: Tensor, ignore_index: int = -100, reduction: str = "mean"
) -> Tensor:
    """The definition, computed in fp32 (fp64 stays fp64)."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    kept = targets != ignore_index
    index = targets.where(kept, 0)[..., None].long()
    losses = (logits.logsumexp(-1) - logits.gather(-1, index)[..., 0]).where(kept, 0)
    return reduce_losses(losses, targets, ignore_index, reduction)


def reduce_losses(losses: Tensor, targets: Tensor, ignore_index: int, reduction: str) -> Tensor:
    """The mean is over the targets that are not ignored, and 0 where all are."""
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / _count(targets, ignore_index)


def _count(targets: Tensor, ignore_index: int) -> Tensor:
    return (targets != ignore_index).sum().clamp_min(1)


@jit
def log_sum_exp(row_ptr, n_cols, n_readable, BLOCK_V: tl.constexpr):
    """fp32, of n_cols numbers; n_readable ≥ n_cols of them may be read (a better aligned mask)."""
    # The least fp32, not -inf: a block of -inf alone must not give exp(-inf − -inf).
    maximum = tl.full((), -3.4028234663852886e38, tl.float32)
    b_sum = tl.zeros((BLOCK_V,), tl.float32)
    for start in range(0, n_cols, BLOCK_V):
        o_col = start + tl.arange(0, BLOCK_V)
        b_logits = tl.load(row_ptr + o_col, mask=o_col < n_readable, other=0.0).to(tl.float32)
        b_logits = tl.where(o_col < n_cols, b_logits, float("-inf"))
        risen = tl.maximum(maximum, tl.max(b_logits, 0))
        b_sum = b_sum * tl.exp(maximum - risen) + tl.exp(b_logits - risen)
        maximum = risen
    return maximum + tl.log(tl.sum(b_sum, 0))


@jit
def _cross_entropy_forward_kernel(
    logits_ptr,
    stride_row,
    targets_ptr,
    losses_ptr,
    lse_ptr,
    n_cols,
    ignore_index,
    BLOCK_V: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + i_row)
    if target == ignore_index:
        tl.store(losses_ptr + i_row, 0.0)
        tl.store(lse_ptr + i_row, 0.0)
    else:
        row_ptr = logits_ptr + i_row * stride_row
        # No such target: NaN shows without a synchronization, and nothing is read out of bounds.
        exists = (target >= 0) & (target < n_cols)
        chosen = tl.load(row_ptr + target, mask=exists, other=float("nan")).to(tl.float32)
        lse = log_sum_exp(row_ptr, n_cols, n_cols, BLOCK_V)
        tl.store(losses_ptr + i_row, lse - chosen)
        tl.store(lse_ptr + i_row, lse)


@jit
def _cross_entropy_backward_kernel(
    logits_ptr,
    stride_row,
    targets_ptr,
    lse_ptr,
    upstream_ptr,
    dlogits_ptr,
    n_cols,
    ignore_index,
    BLOCK_V: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + i_row)
    lse = tl.load(lse_ptr + i_row)
    upstream = tl.load(upstream_ptr + i_row)
    exists = (target >= 0) & (target < n_cols)
    upstream = tl.where(exists, upstream, float("nan"))
    row_ptr = logits_ptr + i_row * stride_row
    drow_ptr = dlogits_ptr + i_row * n_cols
    dtype = dlogits_ptr.dtype.element_ty
    for start in range(0, n_cols, BLOCK_V):
        o_col = start + tl.arange(0, BLOCK_V)
        m_col = o_col < n_cols
        if target == ignore_index:
            tl.store(drow_ptr + o_col, tl.zeros((BLOCK_V,), dtype), mask=m_col)
        else:
            b_logits = tl.load(row_ptr + o_col, mask=m_col, other=0.0).to(tl.float32)
            b_grad = tl.exp(b_logits - lse) - tl.where(o_col == target, 1.0, 0.0)
            tl.store(drow_ptr + o_col, (b_grad * upstream).to(dtype), mask=m_col)


def block_and_warps(n_cols: int) -> tuple[int, int]:
    """Columns of a step of the loop, 8 to 32 for each thread, and warps."""
    if n_cols <= 256:
        return 256, 1
    return (2048, 4) if n_cols <= 4096 else (8192, 8)


BLOCKS = [block_and_warps(n) for n in (256, 4096, 4097)]


def specializations(capability: int) -> Iterator[Specialization]:
    """Every way in which the launchers below can compile the kernels."""
    for dtype in TRITON_TYPE.values():
        for block_v, num_warps in BLOCKS:
            shared = dict(logits_ptr=f"*{dtype}:16", stride_row="i32:16", targets_ptr="*i64:16")
            shared |= dict(n_cols="i32:16", ignore_index="i32", lse_ptr="*fp32:16")
            yield Specialization(
                _cross_entropy_forward_kernel,
                shared | dict(losses_ptr="*fp32:16"),
                dict(BLOCK_V=block_v),
                num_warps=num_warps,
            )
            yield Specialization(
                _cross_entropy_backward_kernel,
                shared | dict(upstream_ptr="*fp32:16", dlogits_ptr=f"*{dtype}:16"),
                dict(BLOCK_V=block_v),
                num_warps=num_warps,
            )


def launch_forward(
    logits: Tensor, targets: Tensor, losses: Tensor, lse: Tensor, ignore_index: int
) -> None:
    """losses (N,) and lse (N,), fp32, of logits (N, V) with unit stride in a row."""
    n_rows, n_cols = logits.shape
    block_v, num_warps = block_and_warps(n_cols)
    if n_rows:
        _cross_entropy_forward_kernel[(n_rows,)](
            logits,
            logits.stride(0),
            targets,
            losses,
            lse,
            n_cols,
            ignore_index,
            BLOCK_V=block_v,
            num_warps=num_warps,
        )


@torch.library.custom_op("ponder::cross_entropy", mutates_args=())
def _cross_entropy(logits: Tensor, targets: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """(losses, lse), both fp32 (N,), of logits (N, V) and int64 targets (N,)."""
    losses = logits.new_empty(logits.shape[0], dtype=torch.float32)
    lse = torch.empty_like(losses)
    launch_forward(logits, targets, losses, lse, ignore_index)
    return losses, lse


@_cross_entropy.register_fake
def _(logits, targets, ignore_index):
    losses = logits.new_empty(logits.shape[0], dtype=torch.float32)
    return losses, torch.empty_like(losses)


@torch.library.custom_op("ponder::cross_entropy_backward", mutates_args=())
def _cross_entropy_backward(
    upstream: Tensor, logits: Tensor, targets: Tensor, lse: Tensor, ignore_index: int
) -> Tensor:
    """(softmax(logits) − onehot(targets)) · upstream, row by row, in logits' dtype."""
    n_rows, n_cols = logits.shape
    dlogits = logits.new_empty(logits.shape)
    block_v, num_warps = block_and_warps(n_cols)
    if n_rows:
        _cross_entropy_backward_kernel[(n_rows,)](
            logits,
            logits.stride(0),
            targets,
            lse,
            upstream,
            dlogits,
            n_cols,
            ignore_index,
            BLOCK_V=block_v,
            num_warps=num_warps,
        )
    return dlogits


@_cross_entropy_backward.register_fake
def _(upstream, logits, targets, lse, ignore_index):
    return logits.new_empty(logits.shape)


def _setup_context(ctx, inputs, output):
    logits, targets, ctx.ignore_index = inputs
    ctx.save_for_backward(logits, targets, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, dlosses, _):
    logits, targets, lse = ctx.saved_tensors
    dlogits = _cross_entropy_backward(dlosses.contiguous(), logits, targets, lse, ctx.ignore_index)
    return dlogits, None, None


_cross_entropy.register_autograd(_backward, setup_context=_setup_context)


def check_targets(
    name: str, shape: torch.Size, n_classes: int, targets: Tensor, ignore_index: int, reduction: str
) -> Tensor:
    """The targets, flat and int64; ValueError where they do not fit.

    Their values are looked at on the CPU alone, and not under torch.compile: on a GPU that would
    wait for everything before.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"{name}: reduction is {reduction!r}; it must be one of {REDUCTIONS}")
    if targets.shape != shape:
        raise ValueError(
            f"{name}: targets are {tuple(targets.shape)}; it must be {tuple(shape)}, one a row"
        )
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        raise ValueError(f"{name}: targets are {targets.dtype}; they must be integers")
    targets = targets.reshape(-1).long()
    looked_at = targets.device.type == "cpu" and not torch.compiler.is_compiling()
    if looked_at and targets.numel():
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
    logits: Tensor, targets: Tensor, ignore_index: int, reduction: str, shape: torch.Size
) -> Tensor:
    """PyTorch's own operation, on logits (N, V) and targets (N,)."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    kind = "none" if reduction == "none" else "sum"
    loss = F.cross_entropy(logits, targets, ignore_index=ignore_index, reduction=kind)
    if reduction == "mean":
        return loss / _count(targets, ignore_index)
    return loss.view(shape) if reduction == "none" else loss


def cross_entropy(
    logits: Tensor, targets: Tensor, *, ignore_index: int = -100, reduction: str = "mean"
) -> Tensor:
    """Cross-entropy in nats: loss[i] = log Σ_v exp(logits[i, v]) − logits[i, targets[i]].

    logits (..., V) in fp32, fp16 or bf16, never overwritten; targets (...) integers in [0, V) or
    ignore_index, whose loss and gradient are 0. reduction "mean" (over the targets that are not
    ignored), "sum", or "none" (losses in the targets' shape). The result and all arithmetic are
    fp32; the gradient has logits' dtype. The mean over no target at all is 0, where
    torch.nn.functional.cross_entropy gives NaN: a micro-batch that is masked whole then adds
    nothing to an accumulated loss instead of destroying it.

    Raises ValueError for shapes, dtypes or a reduction that do not fit, and on the CPU for a target
    out of range; on a GPU, where looking would cost a synchronization, such a target's loss and
    gradient are NaN.
    """
    shape, n_cols = logits.shape[:-1], logits.shape[-1]
    flat = check_targets("cross_entropy", shape, n_cols, targets, ignore_index, reduction)
    if not use_triton(logits):
        return on_cpu(logits.reshape(-1, n_cols), flat, ignore_index, reduction, shape)
    if logits.dtype not in TRITON_TYPE:
        raise ValueError(
            f"cross_entropy: logits are {logits.dtype}; supported are fp32, fp16 and bf16"
        )
    rows = logits.reshape(-1, n_cols)
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    losses, _ = _cross_entropy(rows, flat, ignore_index)
    return reduce_losses(losses.view(shape), targets, ignore_index, reduction)
