"""Cross-entropy of a linear layer's logits, of which only a chunk of rows exists at any time.

    loss[i] = log Σ_v exp(logits[i, v]) − logits[i, targets[i]],  logits = x Wᵀ + bias

For V in the tens of thousands the logits and their gradient outweigh everything else in a step. So
the rows are taken in chunks, and each chunk's logits become the loss and then, in place, their own
gradient, which the two products dx = dlogits W and dW += dlogitsᵀ x consume before the next chunk
overwrites it. That is done in the forward pass: a sum's gradient is the same for every upstream
gradient but for a factor, which the backward pass applies. Where every row has an upstream
gradient of its own (reduction "none"), the backward pass computes the chunks again. The options
(smoothed targets, a cap on the logits, …) are those of cross_entropy.py.

Shapes: N rows (all dimensions but the last, flattened), C channels, V the vocabulary.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _cpu
from ._runtime import (
    TRITON_TYPE,
    Specialization,
    autocast_dtype,
    cdiv,
    check_device,
    check_dtype,
    jit,
    launch,
    operation,
    tl,
    use_triton,
)
from .cross_entropy import (
    BLOCKS,
    Options,
    block_and_warps,
    check_options,
    check_targets,
    clear_row,
    compiled_flags,
    cross_entropy_reference,
    launch_forward,
    on_cpu,
    reduce_losses,
    row_gradient,
    row_loss,
)

# Logits that exist at once. On a GPU 4 % of those of 32k tokens and 50k words; a taller chunk would
# read and write the whole of dW less often. On the CPU, 2**23 took 0.80 to 0.91 of the plain
# operations' time at V from 2048 to 50257; smaller chunks gain at V = 8192 and lose at 50257.
CHUNK = {"cuda": 2**26, "cpu": 2**23}
# On the CPU, as many logits as this take no longer when they are all held at once.
PLAIN = 2**21
PAD = 64  # a chunk's rows start on 128-byte boundaries, whatever V


def linear_cross_entropy_reference(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    **options: Any,
) -> Tensor:
    """The definition: all logits at once; the options are cross_entropy_reference's."""
    logits = F.linear(x, weight, bias)
    return cross_entropy_reference(logits, targets, ignore_index, reduction, **options)


@jit
def _loss_and_gradient_kernel(
    logits_ptr,
    targets_ptr,
    upstream_ptr,
    losses_ptr,
    stride_row,
    n_cols,
    ignore_index,
    label_smoothing,
    z_loss,
    softcap,
    SMOOTHING: tl.constexpr,
    Z_LOSS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HAS_UPSTREAM: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    # The padding is read and written too, up to stride_row: an aligned mask keeps accesses wide.
    i_row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + i_row)
    row_ptr = logits_ptr + i_row * stride_row
    if target == ignore_index:
        tl.store(losses_ptr + i_row, 0.0)
        clear_row(row_ptr, n_cols, stride_row, BLOCK_V)
    else:
        loss, maximum, total = row_loss(
            row_ptr,
            target,
            n_cols,
            stride_row,
            label_smoothing,
            z_loss,
            softcap,
            SMOOTHING,
            Z_LOSS,
            SOFTCAP,
            BLOCK_V,
        )
        tl.store(losses_ptr + i_row, loss)
        tl.debug_barrier()  # every thread has read the target's logit before one overwrites it
        upstream = 1.0
        if HAS_UPSTREAM:
            upstream = tl.load(upstream_ptr + i_row)
        row_gradient(
            row_ptr,
            row_ptr,
            target,
            maximum,
            total,
            upstream,
            n_cols,
            stride_row,
            label_smoothing,
            z_loss,
            softcap,
            SMOOTHING,
            Z_LOSS,
            SOFTCAP,
            BLOCK_V,
        )


def specializations(capability: int) -> Iterator[Specialization]:
    """The ways in which the launcher below can compile the kernel, see `compiled_flags`."""
    for dtype in TRITON_TYPE.values():
        for block_v, num_warps in BLOCKS:
            for flags in compiled_flags(dtype, block_v):
                for has_upstream in (False, True):
                    yield Specialization(
                        _loss_and_gradient_kernel,
                        dict(
                            logits_ptr=f"*{dtype}:16",
                            stride_row="i32:16",
                            targets_ptr="*i64:16",
                            upstream_ptr="*fp32:16",
                            losses_ptr="*fp32:16",
                            n_cols="i32:16",
                            ignore_index="i32",
                            **dict.fromkeys(Options._fields, "fp32"),
                        ),
                        flags | dict(HAS_UPSTREAM=has_upstream, BLOCK_V=block_v),
                        num_warps=num_warps,
                    )


class _TritonStep:
    """Turns a chunk of logits into losses, and into their own gradient where asked."""

    def __init__(self, n_rows: int, n_cols: int, like: Tensor, ignore_index: int, options: Options):
        padded = cdiv(n_cols, PAD) * PAD
        self.logits = like.new_empty(n_rows, padded)[:, :n_cols]
        self.statistics = like.new_empty(n_rows, 2, dtype=torch.float32)
        self.ignore_index, self.options = ignore_index, options

    def losses(self, logits: Tensor, targets: Tensor, losses: Tensor) -> None:
        launch_forward(logits, targets, losses, self.statistics, self.ignore_index, self.options)

    def gradient(
        self, logits: Tensor, targets: Tensor, losses: Tensor, upstream: Tensor | None
    ) -> Tensor:
        n_rows, n_cols = logits.shape
        block_v, num_warps = block_and_warps(n_cols)
        launch(
            _loss_and_gradient_kernel,
            n_rows,
            (logits, targets, losses if upstream is None else upstream, losses),
            (logits.stride(0), n_cols, self.ignore_index, *self.options),
            **self.options.flags(),
            HAS_UPSTREAM=upstream is not None,
            BLOCK_V=block_v,
            num_warps=num_warps,
        )
        return logits


class _CStep:
    """The same in C, for the CPU."""

    def __init__(self, n_rows: int, n_cols: int, like: Tensor, ignore_index: int, options: Options):
        self.logits = like.new_empty(n_rows, n_cols)
        self.rules = ignore_index, options

    def losses(self, logits: Tensor, targets: Tensor, losses: Tensor) -> None:
        _cpu.losses(logits, targets, *self.rules, losses=losses)

    def gradient(
        self, logits: Tensor, targets: Tensor, losses: Tensor, upstream: Tensor | None
    ) -> Tensor:
        found = dict(losses=losses, dlogits=logits)
        _cpu.losses(logits, targets, *self.rules, upstream=upstream, **found)
        return logits


class _TorchStep:
    """The same in PyTorch's operations, for the CPU where there is no C.

    softmax reads and writes a row once while it is in cache, and the log-sum-exp follows from it:
    the largest probability is exp(max − lse). That is half the time of log_softmax, exp.
    """

    def __init__(self, n_rows: int, n_cols: int, like: Tensor, ignore_index: int, options: Options):
        self.logits = like.new_empty(n_rows, n_cols)
        wide = torch.promote_types(like.dtype, torch.float32)
        self.probabilities = like.new_empty(n_rows, n_cols, dtype=wide)
        self.capped = self.logits
        if options.softcap and like.dtype != wide:  # the cap's slope is a small difference from 1
            self.capped = torch.empty_like(self.probabilities)
        self.ignore_index, self.options = ignore_index, options

    def losses(self, logits: Tensor, targets: Tensor, losses: Tensor) -> Tensor:
        """Returns the log-sum-exps; leaves the capped logits and the probabilities behind."""
        label_smoothing, z_loss, softcap = self.options
        p = self.probabilities[: len(logits)]
        if self.capped is not self.logits:
            logits = self.capped[: len(logits)].copy_(logits)
        if softcap:
            logits.div_(softcap).tanh_().mul_(softcap)
        torch.softmax(logits, -1, dtype=p.dtype, out=p)
        maximum, log_sum = logits.amax(-1).to(p.dtype), p.amax(-1).log_().neg_()
        kept = targets != self.ignore_index
        chosen = logits.gather(1, targets.where(kept, 0)[:, None])[:, 0]
        loss = (maximum - chosen) + log_sum
        lse = maximum + log_sum
        if label_smoothing:
            of_all = lse - logits.mean(-1, dtype=p.dtype)
            loss = (1 - label_smoothing) * loss + label_smoothing * of_all
        if z_loss:
            loss = loss + z_loss * lse.square()
        losses.copy_(loss.where(kept, 0))
        return lse

    def gradient(
        self, logits: Tensor, targets: Tensor, losses: Tensor, upstream: Tensor | None
    ) -> Tensor:
        label_smoothing, z_loss, softcap = self.options
        lse = self.losses(logits, targets, losses)
        p = self.probabilities[: len(logits)]
        kept = targets != self.ignore_index
        index = targets.where(kept, 0)[:, None]
        if z_loss:
            p.mul_((1 + 2 * z_loss * lse)[:, None])
        p.scatter_add_(1, index, p.new_full((), label_smoothing - 1).expand_as(index))
        if label_smoothing:
            p.sub_(label_smoothing / p.shape[1])
        if softcap:
            tanh = self.capped[: len(logits)].div_(softcap)
            p.addcmul_(p, tanh.square_(), value=-1)
        if upstream is not None:
            p.mul_(upstream[:, None])
        if not kept.all():
            p.index_fill_(0, (~kept).nonzero()[:, 0], 0.0)
        return p if p.dtype == logits.dtype else logits.copy_(p)


def _in_chunks(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    upstream: Tensor | None,
    ignore_index: int,
    options: Options,
    dtype: torch.dtype,
    need_x: bool = False,
    need_weight: bool = False,
    need_bias: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(losses, dx, dweight, dbias); a gradient that is not needed is empty.

    The products are computed in `dtype`; losses, dweight and dbias are fp32 (fp64 for fp64).
    """
    n_rows, n_cols = x.shape[0], weight.shape[0]
    wide = torch.promote_types(dtype, torch.float32)
    losses, dx, dweight, dbias = _outputs(x, weight, dtype, need_x, need_weight, need_bias)
    dweight.zero_()
    dbias.zero_()
    weight = weight.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    # As many chunks as must be, all of about the same height.
    chunk = CHUNK.get(x.device.type, CHUNK["cuda"])
    most = max(1, chunk // n_cols)
    if x.device.type == "cpu" and dtype != wide:
        # A chunk's part of dW is added to fp32 in a pass of its own, which costs as much as some
        # rows of logits for each input. 1024 × 50304, 256 inputs, bf16: 248 → 142 ms.
        most = max(most, min(2 * x.shape[1], 4 * chunk // n_cols))
    height = cdiv(n_rows, max(1, cdiv(n_rows, most)))
    like = x.new_empty(0, dtype=dtype)
    by_hand = _TritonStep if use_triton(x) else _CStep
    step_type = by_hand if use_triton(x) or _cpu.takes(like) else _TorchStep
    step = step_type(height, n_cols, like, ignore_index, options)
    for start in range(0, n_rows, max(1, height)):
        rows = slice(start, min(start + height, n_rows))
        b_x = x[rows].to(dtype)
        logits = step.logits[: len(b_x)]
        if bias is None:
            torch.mm(b_x, weight.t(), out=logits)
        else:
            torch.addmm(bias, b_x, weight.t(), out=logits)
        if not (need_x or need_weight or need_bias):
            step.losses(logits, targets[rows], losses[rows])
            continue
        b_upstream = None if upstream is None else upstream[rows]
        dlogits = step.gradient(logits, targets[rows], losses[rows], b_upstream)
        if need_x:
            dx[rows] = torch.mm(dlogits, weight)
        if need_weight and dtype == wide:
            torch.addmm(dweight, dlogits.t(), b_x, out=dweight)
        elif need_weight and x.is_cuda and torch.version.hip is None:
            # cuBLAS adds to fp32 what it multiplied in 16 bits: no second matrix of dW's size, and
            # no rounding of each chunk's part.
            torch.addmm(dweight, dlogits.t(), b_x, out_dtype=wide, out=dweight)
        elif need_weight:
            dweight += torch.mm(dlogits.t(), b_x)
        if need_bias:
            dbias += dlogits.sum(0, dtype=wide)
    return losses, dx, dweight, dbias


def _outputs(x, weight, dtype, need_x, need_weight, need_bias):
    wide = torch.promote_types(dtype, torch.float32)
    return (
        x.new_empty(x.shape[0], dtype=wide),
        x.new_empty(x.shape if need_x else 0),
        x.new_empty(weight.shape if need_weight else 0, dtype=wide),
        x.new_empty(weight.shape[0] if need_bias else 0, dtype=wide),
    )


@operation("ponder::linear_cross_entropy_losses")
def _losses(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    ignore_index: int,
    options: list[float],
    dtype: torch.dtype,
) -> Tensor:
    """losses (N,) of x (N, C); the gradients wait for the upstream gradient of each row."""
    args = (x, weight, bias, targets, None, ignore_index, Options(*options), dtype)
    return _in_chunks(*args)[0]


@_losses.register_fake
def _(x, weight, bias, targets, ignore_index, options, dtype):
    return _outputs(x, weight, dtype, False, False, False)[0]


@operation("ponder::linear_cross_entropy_total")
def _total(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    upstream: Tensor | None,
    ignore_index: int,
    options: list[float],
    dtype: torch.dtype,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(Σ losses, dx, dweight, dbias), the gradients those of Σ losses · upstream."""
    args = (x, weight, bias, targets, upstream, ignore_index, Options(*options), dtype)
    losses, dx, dweight, dbias = _in_chunks(*args, need_x, need_weight, need_bias)
    return losses.sum(), dx, dweight, dbias


@_total.register_fake
def _(x, weight, bias, targets, upstream, ignore_index, options, dtype, *needs):
    losses, *gradients = _outputs(x, weight, dtype, *needs)
    return losses.new_empty(()), *gradients


def _setup_losses(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:4])
    ctx.rest = inputs[4:]


def _backward_losses(ctx, upstream):
    x, weight, bias, targets = ctx.saved_tensors
    needs = ctx.needs_input_grad[:3]
    args = (x, weight, bias, targets, upstream.contiguous(), *ctx.rest)
    _, dx, dweight, dbias = _total(*args, *needs)
    return (
        dx if needs[0] else None,
        dweight.to(weight.dtype) if needs[1] else None,
        dbias.to(bias.dtype) if needs[2] else None,
        *[None] * 4,
    )


_losses.register_autograd(_backward_losses, setup_context=_setup_losses)


def _setup_total(ctx, inputs, output):
    x, weight, bias = inputs[:3]
    ctx.dtypes = [None if t is None else t.dtype for t in (x, weight, bias)]
    ctx.save_for_backward(*output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward_total(ctx, upstream, *_):
    """The gradients of the sum, times the upstream gradient; they are kept as they were."""
    scaled: list[Tensor | None] = [None] * 3
    if upstream is not None:
        for i, (gradient, dtype) in enumerate(zip(ctx.saved_tensors, ctx.dtypes, strict=True)):
            if ctx.needs_input_grad[i]:
                # One element, not a scalar: the factor must not be rounded to 16 bits first.
                out = gradient.new_empty(gradient.shape, dtype=dtype)
                scaled[i] = torch.mul(gradient, upstream.reshape(1), out=out)
    return *scaled, *[None] * 8


_total.register_autograd(_backward_total, setup_context=_setup_total)


def _product_dtype(x: Tensor, weight: Tensor, bias: Tensor | None) -> torch.dtype:
    """The dtype of the products: autocast's where it is on, else the inputs' own."""
    if dtype := autocast_dtype(x):
        return dtype
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None and t.dtype != x.dtype:
            raise ValueError(
                f"linear_cross_entropy: {name} is {t.dtype}; it must be as x, {x.dtype}"
            )
    return x.dtype


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
) -> Tensor:
    """Cross-entropy in nats of the logits x Wᵀ + bias, without ever holding all of them.

        loss[i] = log Σ_v exp(logits[i, v]) − logits[i, targets[i]]

    x (..., C), weight (V, C) and bias (V,) of one dtype (under autocast: any, and the products are
    in autocast's); targets (...) integers in [0, V) or ignore_index, whose loss and gradient are 0.
    reduction "mean" (over the targets that are not ignored; 0 where there is none), "sum", or
    "none" (losses in the targets' shape). label_smoothing, z_loss, softcap: see `cross_entropy`.
    The result, the log-sum-exp and the accumulated gradients of weight and bias are fp32; gradients
    come in the dtype of their tensor.

    Memory beyond inputs and gradients: one chunk of logits (CHUNK of them; on a CPU without a C
    compiler two or three times that), whatever N · V, and the fp32 gradient of weight. "mean" and
    "sum" compute the gradients in the forward pass (none where grad mode is off), "none" computes
    the logits again in the backward pass. Differentiable once: a gradient of the gradient raises.

    Raises ValueError for shapes, dtypes, a reduction or options that do not fit, and on the CPU for
    a target out of range; on a GPU, where looking would cost a synchronization, such a target's
    loss and gradients are NaN. Source: Wijmans et al. 2024, "Cut Your Losses in Large-Vocabulary
    Language Models"; the gradient in the forward pass, chunk by chunk: Hsu et al. 2024, "Liger
    Kernel".
    """
    n_cols = weight.shape[0]
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(
            f"linear_cross_entropy: weight is {tuple(weight.shape)}; x of {tuple(x.shape)} needs "
            f"(V, {x.shape[-1]})"
        )
    if bias is not None and bias.shape != (n_cols,):
        raise ValueError(
            f"linear_cross_entropy: bias is {tuple(bias.shape)}; weight of {tuple(weight.shape)} "
            f"needs ({n_cols},)"
        )
    check_device("linear_cross_entropy", x, weight=weight, bias=bias)
    shape = x.shape[:-1]
    options = check_options("linear_cross_entropy", label_smoothing, z_loss, softcap)
    flat = check_targets("linear_cross_entropy", x, n_cols, targets, ignore_index, reduction)
    dtype = _product_dtype(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1])
    if use_triton(x):
        check_dtype("linear_cross_entropy", "x", dtype)
    elif rows.shape[0] * n_cols <= PLAIN:
        logits = F.linear(rows, weight, bias)
        return on_cpu(logits, flat, ignore_index, options, reduction, shape)
    needs = [
        torch.is_grad_enabled() and t is not None and t.requires_grad for t in (x, weight, bias)
    ]
    if reduction == "none" or not any(needs):
        losses = _losses(rows, weight, bias, flat, ignore_index, list(options), dtype)
        return reduce_losses(losses.view(shape), flat, ignore_index, reduction)
    args = (rows, weight, bias, flat, None, ignore_index, list(options), dtype)
    total = _total(*args, *needs)[0]
    return reduce_losses(total, flat, ignore_index, reduction)
