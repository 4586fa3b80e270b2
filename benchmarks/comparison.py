"""One case of a kernel's benchmark: the same inputs for ours and for what a user could choose."""

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ponder.benchmarks.measure import DEVICE, Row, left_out_if_it_fails, milliseconds, rows
from ponder.training.devices import products_on_cpu
from ponder.training.hardware import PRECISION, has_bf16_products

BF16, FP32 = torch.bfloat16, torch.float32
MODES = ("forward", "forward+backward")
# Of an output or a gradient, in norm.
ALLOWED = {BF16: 2e-2, FP32: 1e-4}
Inputs = list[Tensor]


@dataclass(frozen=True)
class Setting:
    """In which dtype, and at what sizes, a group of cases is compared."""

    dtype: torch.dtype = BF16
    smoke: bool = False  # tiny sizes, to try the code

    def of(self, tiny: Any, cpu: Any, gpu: Any) -> Any:
        """The one of the three that is asked for here."""
        return tiny if self.smoke else gpu if DEVICE == "cuda" else cpu

    def tensor(self, *shape: int, scale: float = 1.0, grad: bool = True) -> Tensor:
        """Normal numbers on the device."""
        x = torch.randn(shape, device=DEVICE) * scale
        return x.to(self.dtype).requires_grad_(grad)


def settings(smoke: bool) -> list[Setting]:
    """Those that this machine is compared in: a GPU in bf16, a CPU in what it has products for."""
    dtypes = [BF16]
    if DEVICE == "cpu" and not smoke:
        dtypes = [FP32, BF16] if has_bf16_products(torch.device("cpu")) else [FP32]
    return [Setting(dtype, smoke) for dtype in dtypes]


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

    @property
    def dtype(self) -> str:
        return PRECISION[self.inputs[0].dtype]


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
        ceiling = own_ceiling
        if ceiling is None:
            ceiling = copy_ceiling() if nbytes else matmul_ceiling(case.inputs[0].dtype)
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
                allowed=ALLOWED[case.inputs[0].dtype],
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
        upstream = [torch.randn_like(y) for y in outputs]
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
def matmul_ceiling(dtype: torch.dtype = BF16) -> float:
    """FLOP/s of torch's own large matrix product, measured now."""
    if DEVICE == "cpu":
        return products_on_cpu(dtype)
    n = 8192
    a, b = (torch.randn(n, n, device=DEVICE, dtype=dtype) for _ in range(2))
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
