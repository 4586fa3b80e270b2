"""Mean squared error, in fp32 whatever the inputs' dtypes.

    loss = mean((input − target)²)

Shapes: N elements (all dimensions flattened).
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ._runtime import (
    TRITON_TYPE,
    Specialization,
    cdiv,
    check_device,
    check_dtype,
    check_reduction,
    jit,
    launch,
    operation,
    tl,
    use_triton,
)

BLOCK = 4096  # elements of a step, 16 for each of 256 threads
WARPS = 8
PROGRAMS = 1024  # partial sums at most: a fixed number, so that the sum's order never changes


def mse_loss_reference(input: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    """The definition, computed in fp32 (fp64 stays fp64)."""
    wide = torch.promote_types(input.dtype, torch.float32)
    losses = (input.to(wide) - target.to(wide)).square()
    return losses if reduction == "none" else getattr(losses, reduction)()


@jit
def _mse_loss_forward_kernel(
    input_ptr,
    target_ptr,
    loss_ptr,
    n_elements,
    blocks_per_program,
    PER_ELEMENT: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """loss_ptr: a loss for each element, or else a partial sum for each program."""
    i_program = tl.program_id(0).to(tl.int64)
    b_sum = tl.zeros((BLOCK_N,), tl.float32)
    for i in range(blocks_per_program):
        offset = (i_program * blocks_per_program + i) * BLOCK_N + tl.arange(0, BLOCK_N)
        mask = offset < n_elements
        difference = tl.load(input_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        difference -= tl.load(target_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        if PER_ELEMENT:
            tl.store(loss_ptr + offset, difference * difference, mask=mask)
        else:
            b_sum += difference * difference
    if not PER_ELEMENT:
        tl.store(loss_ptr + i_program, tl.sum(b_sum, 0))


@jit
def _mse_loss_backward_kernel(
    upstream_ptr,
    input_ptr,
    target_ptr,
    dinput_ptr,
    dtarget_ptr,
    n_elements,
    PER_ELEMENT: tl.constexpr,
    NEED_INPUT: tl.constexpr,
    NEED_TARGET: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    offset = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = offset < n_elements
    difference = tl.load(input_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    difference -= tl.load(target_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    if PER_ELEMENT:
        upstream = tl.load(upstream_ptr + offset, mask=mask, other=0.0)
    else:
        upstream = tl.load(upstream_ptr)
    gradient = difference * (2.0 * upstream)
    if NEED_INPUT:
        tl.store(dinput_ptr + offset, gradient.to(dinput_ptr.dtype.element_ty), mask=mask)
    if NEED_TARGET:
        tl.store(dtarget_ptr + offset, (-gradient).to(dtarget_ptr.dtype.element_ty), mask=mask)


def specializations(capability: int) -> Iterator[Specialization]:
    """The ways in which the launchers below can compile the kernels.

    Which gradients are stored is a matter of a line each, so it is varied in fp32 alone.
    """
    # (input's dtype, target's): equal, or a 16-bit prediction of an fp32 target.
    pairs = [(d, d) for d in TRITON_TYPE.values()] + [("fp16", "fp32"), ("bf16", "fp32")]
    for dtype, target_dtype in pairs:
        shared = dict(input_ptr=f"*{dtype}:16", target_ptr=f"*{target_dtype}:16")
        shared |= dict(n_elements="i32:16")
        for per_element in (False, True):
            constexprs = dict(PER_ELEMENT=per_element, BLOCK_N=BLOCK)
            yield Specialization(
                _mse_loss_forward_kernel,
                shared | dict(loss_ptr="*fp32:16", blocks_per_program="i32"),
                constexprs,
                num_warps=WARPS,
            )
            one = [(True, False), (False, True)] if dtype == "fp32" else []
            for needs in [(True, True), *one]:
                yield Specialization(
                    _mse_loss_backward_kernel,
                    shared
                    | dict(
                        upstream_ptr="*fp32:16",
                        dinput_ptr=f"*{dtype}:16",
                        dtarget_ptr=f"*{target_dtype}:16",
                    ),
                    constexprs | dict(NEED_INPUT=needs[0], NEED_TARGET=needs[1]),
                    num_warps=WARPS,
                )


@operation("ponder::mse_loss")
def _mse_loss(input: Tensor, target: Tensor, per_element: bool) -> Tensor:
    """fp32: the squared errors (N,) of contiguous input and target (N,), or their sum."""
    n = input.numel()
    n_blocks = cdiv(n, BLOCK)
    n_programs = n_blocks if per_element else min(n_blocks, PROGRAMS)
    loss = input.new_empty(n if per_element else n_programs, dtype=torch.float32)
    if n:
        launch(
            _mse_loss_forward_kernel,
            n_programs,
            (input, target, loss),
            (n, cdiv(n_blocks, n_programs)),
            PER_ELEMENT=per_element,
            BLOCK_N=BLOCK,
            num_warps=WARPS,
        )
    return loss if per_element else loss.sum()


@_mse_loss.register_fake
def _(input, target, per_element):
    return input.new_empty(input.shape if per_element else (), dtype=torch.float32)


@operation("ponder::mse_loss_backward")
def _mse_loss_backward(
    upstream: Tensor,
    input: Tensor,
    target: Tensor,
    per_element: bool,
    need_input: bool,
    need_target: bool,
) -> tuple[Tensor, Tensor]:
    """(dinput, dtarget); a gradient that is not needed is empty."""
    dinput, dtarget = _gradients(input, target, need_input, need_target)
    n = input.numel()
    if n:
        launch(
            _mse_loss_backward_kernel,
            cdiv(n, BLOCK),
            (upstream, input, target, dinput, dtarget),
            (n,),
            PER_ELEMENT=per_element,
            NEED_INPUT=need_input,
            NEED_TARGET=need_target,
            BLOCK_N=BLOCK,
            num_warps=WARPS,
        )
    return dinput, dtarget


def _gradients(input, target, need_input, need_target):
    return (
        input.new_empty(input.shape if need_input else 0),
        target.new_empty(target.shape if need_target else 0),
    )


@_mse_loss_backward.register_fake
def _(upstream, input, target, per_element, need_input, need_target):
    return _gradients(input, target, need_input, need_target)


def _setup_context(ctx, inputs, output):
    input, target, ctx.per_element = inputs
    ctx.save_for_backward(input, target)


def _backward(ctx, upstream):
    needs = ctx.needs_input_grad[:2]
    gradients = _mse_loss_backward(
        upstream.contiguous(), *ctx.saved_tensors, ctx.per_element, *needs
    )
    return *(g if need else None for g, need in zip(gradients, needs, strict=True)), None


_mse_loss.register_autograd(_backward, setup_context=_setup_context)


def mse_loss(input: Tensor, target: Tensor, *, reduction: str = "mean") -> Tensor:
    """Mean squared error: loss = mean((input − target)²).

    input in fp32, fp16 or bf16; target in input's shape, in its dtype or fp32. reduction "mean",
    "sum", or "none" (losses in input's shape). The result and all arithmetic are fp32, summed in a
    fixed order; each gradient has its tensor's dtype. The mean over no element is NaN, as in
    torch.nn.functional.mse_loss.

    Shapes (...), any; the loss is in squared units of input. Raises ValueError for shapes, dtypes
    or a reduction that do not fit. Source: torch.nn.functional.mse_loss, the definition.
    """
    check_reduction("mse_loss", reduction)
    if not input.is_floating_point():
        raise ValueError(f"mse_loss: input is {input.dtype}; it must be a floating dtype")
    if target.shape != input.shape or target.dtype not in (input.dtype, torch.float32):
        raise ValueError(
            f"mse_loss: target is {tuple(target.shape)} {target.dtype}; it must have input's "
            f"shape {tuple(input.shape)} and dtype {input.dtype}, or fp32"
        )
    check_device("mse_loss", input, target=target)
    if not use_triton(input):
        wide = torch.promote_types(input.dtype, torch.float32)
        return F.mse_loss(input.to(wide), target.to(wide), reduction=reduction)
    check_dtype("mse_loss", "input", input.dtype)
    flat = [t.reshape(-1).contiguous() for t in (input, target)]
    loss = _mse_loss(*flat, reduction == "none")
    if reduction == "none":
        return loss.view(input.shape)
    return loss / input.numel() if reduction == "mean" else loss
