"""One case of a kernel's benchmark: the same inputs for ours and for what a user could choose."""

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ponder.benchmarks.measure import DEVICE, Row, left_out_if_it_fails, milliseconds, rows

BF16 = torch.bfloat16
MODES = ("forward", "forward+backward")
Inputs = list[Tensor]


@dataclass
class Case:
    """What is compared. Those of the inputs that require a gradient get one."""

    benchmark: str
    name: str
    implementations: Mapping[str, Callable[..., Any]]  # of the inputs, in order
    inputs: Inputs
    reference: Callable[..., Any]  # the definition, to be computed in fp32
    modes: Sequence[str] = MODES
    flops: float = 0.0  # of the forward pass
    backward: float = 2.0  # FLOPs of the backward pass, in forward passes
    nbytes: Mapping[str, float] = field(default_factory=dict)  # by mode, where memory is the limit
    ceiling: Callable[[], float] | None = None  # FLOP/s or bytes/s; default: measured now
    # As much of the inputs, and of outputs and gradients, as the truth can be told for.
    part: Callable[[Inputs], Inputs] = list
    allowed: float = 2e-2  # relative error of an output or a gradient, in norm

    @property
    def dtype(self) -> str:
        return str(self.inputs[0].dtype).replace("torch.bfloat16", "bf16").replace("torch.", "")


def measure(case: Case, *, repeats: int = 20) -> Iterator[Row]:
    """The rows of a case; what is wrong gets none."""
    errors: dict[str, float] = {}
    what = f"{case.benchmark} {case.name}"
    for name, f in case.implementations.items():
        with left_out_if_it_fails(what, name):
            errors[name] = _error(case, f)
    own_ceiling = case.ceiling and case.ceiling()
    for mode in case.modes:
        # Inputs of their own: some implementations write over theirs.
        inputs = {name: [_leaf(x, x.dtype) for x in case.inputs] for name in errors}
        works = {}
        for name in errors:
            with left_out_if_it_fails(what, name):  # as for want of memory, with all inputs there
                work = _work(case.implementations[name], inputs[name], mode)
                work()
                works[name] = work
        flops = case.flops * (1.0 if mode == "forward" else 1.0 + case.backward)
        nbytes = case.nbytes.get(mode)
        ceiling = own_ceiling or (copy_ceiling() if nbytes else matmul_ceiling())
        with left_out_if_it_fails(what, "ponder or a peer"):  # only now
            yield from rows(
                case.benchmark,
                f"{case.name} {mode}",
                case.dtype,
                works,
                repeats=repeats,
                flops=None if nbytes else flops,
                nbytes=nbytes,
                ceiling=ceiling,
                errors=errors,
                allowed=case.allowed,
                queued=True,
            )


def compile_all(case: Case) -> None:
    """Call each implementation once in each mode, so that all it compiles is in the caches.

    But for eager PyTorch: there is nothing to compile, and its fp32 logits take the most memory.
    """
    for name, f in case.implementations.items():
        for mode in case.modes if name != "eager" else ():
            with left_out_if_it_fails(f"{case.benchmark} {case.name}", name):
                _work(f, [_leaf(x, x.dtype) for x in case.inputs], mode)()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()  # other processes do the same


def _leaf(x: Tensor, dtype: torch.dtype) -> Tensor:
    copy = x.detach().to(dtype, copy=True) if x.is_floating_point() else x
    return copy.requires_grad_(x.requires_grad)


def _outputs(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [x for x in result if x is not None]


def _work(f: Callable, inputs: Inputs, mode: str) -> Callable[[], None]:
    leaves = [x for x in inputs if x.requires_grad]
    with torch.no_grad():
        upstream = [torch.randn_like(y) for y in _outputs(f(*inputs))]

    def forward() -> None:
        with torch.no_grad():
            f(*inputs)

    def forward_backward() -> None:
        torch.autograd.grad(_outputs(f(*inputs)), leaves, upstream)

    return forward if mode == "forward" else forward_backward


def _error(case: Case, f: Callable) -> float:
    """The largest relative error among outputs and gradients, of `part` of what f gives.

    f takes the inputs that are timed, so that a compiler is asked for no further shapes.
    """
    inputs = [_leaf(x, x.dtype) for x in case.inputs]
    wide = [
        _leaf(x.detach().requires_grad_(y.requires_grad), torch.float32)
        for x, y in zip(case.part(case.inputs), case.inputs, strict=True)
    ]
    outputs, true_outputs = _outputs(f(*inputs)), _outputs(case.reference(*wide))
    # Copies, before a backward pass writes over it.
    found = case.part([y.detach().clone() for y in outputs])
    truth = [y.detach().clone() for y in true_outputs]
    if "forward+backward" in case.modes:
        torch.manual_seed(1)
        upstream = [tensor(*y.shape, grad=False) for y in outputs]
        found += case.part(_gradients(outputs, inputs, upstream))
        truth += _gradients(true_outputs, wide, case.part(upstream))
    errors = [
        (x.double() - t.double()).norm() / t.double().norm().clamp_min(1e-12)
        for t, x in zip(truth, found, strict=True)
    ]
    return torch.stack(errors).max().item()  # NaN if one is, where Python's max may drop it


def _gradients(outputs: Inputs, inputs: Inputs, upstream: Inputs) -> Inputs:
    leaves = [x for x in inputs if x.requires_grad]
    # Copies, as Liger's norms write their gradient over them.
    upstream = [u.to(y.dtype, copy=True) for u, y in zip(upstream, outputs, strict=True)]
    return list(torch.autograd.grad(outputs, leaves, upstream))


@cache
def matmul_ceiling() -> float:
    """bf16 FLOP/s of torch's own large matrix product, measured now."""
    n = 8192 if DEVICE == "cuda" else 512
    a, b = (torch.randn(n, n, device=DEVICE, dtype=BF16) for _ in range(2))
    times = milliseconds({"matmul": lambda: a @ b}, repeats=20)["matmul"]
    return 2 * n**3 / (sorted(times)[10] / 1e3)


@cache
def copy_ceiling() -> float:
    """Bytes/s of a large copy on the device, reads and writes both counted, measured now."""
    a = torch.randn(1 << (28 if DEVICE == "cuda" else 26), device=DEVICE)
    b = torch.empty_like(a)
    times = milliseconds({"copy": lambda: b.copy_(a)}, repeats=20)["copy"]
    return 2 * a.nbytes / (sorted(times)[10] / 1e3)


def peer(module: str, name: str) -> Any | None:
    """A function of a package that a user may have; None where it is not, or not usable here."""
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        return None
    except Exception as error:  # of a package that is there and does not fit the rest
        print(f"{module} cannot be imported here: {type(error).__name__} {error}")
        return None


def compiled(f: Callable, **options: Any) -> Callable:
    """`torch.compile` for each shape anew: after eight of them, it would go on uncompiled."""
    from torch._dynamo import config

    config.recompile_limit, config.accumulated_recompile_limit = 1000, 10000
    return torch.compile(f, dynamic=False, **options)


def tensor(*shape: int, scale: float = 1.0, grad: bool = True) -> Tensor:
    """Normal bf16 numbers on the device."""
    x = torch.randn(shape, device=DEVICE) * scale
    return x.to(BF16).requires_grad_(grad)
