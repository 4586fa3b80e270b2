"""The one way in which kernels are judged: against fp64 truth, beside PyTorch's own error."""

from collections.abc import Callable

import torch
from torch import Tensor

EPSILON = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}

# What a GPU's approximations may add: a weight takes exp2 and a division, of 2 units in the last
# place each (PTX ISA, ex2.approx and div.full), a norm rsqrt and a division.
HARDWARE = 2.0**-21
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def relative_error(x: Tensor, truth: Tensor) -> float:
    """‖x − truth‖ / ‖truth‖ in fp64; NaN where x holds one."""
    truth = truth.double()
    return ((x.double() - truth).norm() / truth.norm().clamp_min(1e-30)).item()


def run(fn: Callable, inputs: list[Tensor], upstream: list[Tensor]) -> list[Tensor]:
    """Every output of fn, then the gradient of every floating input."""
    leaves = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
    outputs = fn(*leaves)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    loss = sum((y.double() * g.double()).sum() for y, g in zip(outputs, upstream, strict=True))
    grads = torch.autograd.grad(loss, [x for x in leaves if x.requires_grad])
    return [y.detach() for y in outputs] + list(grads)


def check(
    kernel: Callable,
    reference: Callable,
    inputs: list[Tensor],
    *,
    reduction: int,
    names: str = "",
    hardware: float = HARDWARE,
) -> None:
    """Assert kernel error ≤ PyTorch's error at the same precision + a derived tolerance.

    Truth is `reference` on the inputs in fp64. The tolerance is that of a sum of `reduction`
    products whose roundings are independent: 2 ε sqrt(reduction), ε the unit roundoff of fp32
    (the accumulator), plus 2 ε of the dtype for the roundings of inputs' products and of the
    output, and on a GPU `hardware`. `names` labels the outputs and gradients, in order, for the
    message.
    """
    dtype = next(x.dtype for x in inputs if x.is_floating_point())
    wide = [x.double() if x.is_floating_point() else x for x in inputs]
    with torch.no_grad():
        shapes = reference(*wide)
    shapes = shapes if isinstance(shapes, tuple) else (shapes,)
    upstream = [torch.randn_like(y) for y in shapes]
    truth = run(reference, wide, upstream)
    ours = run(kernel, inputs, upstream)
    torch_own = run(reference, inputs, upstream)
    tolerance = 2 * EPSILON[torch.float32] * reduction**0.5 + 2 * EPSILON[dtype]
    tolerance += hardware * inputs[0].is_cuda
    labels = names.split() or [str(i) for i in range(len(truth))]
    assert len(labels) == len(truth), f"{len(labels)} names for {len(truth)} results"
    for label, a, b, t in zip(labels, ours, torch_own, truth, strict=True):
        error, allowed = relative_error(a, t), relative_error(b, t) + tolerance
        assert error <= allowed, f"{label}: error {error:.2e}, allowed {allowed:.2e}"
