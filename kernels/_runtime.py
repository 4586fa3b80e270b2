"""What every kernel file shares: Triton imported late, the choice of path, and block arithmetic.

Triton is imported at the first launch, not before, so that `import ponder.kernels` is quick and
works where Triton does not exist (macOS, Windows): there every function takes PyTorch's operation.
"""

import contextvars
import functools
import importlib.util
import json
import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._C._functorch import TransformType
from torch._compile import _disable_dynamo
from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters
from torch._library.autograd import make_autograd_impl

if TYPE_CHECKING:
    import triton.language as tl

    jit: Any
else:

    class tl:
        """Stands where `triton.language` will stand from the module's first launch on."""

        constexpr = "constexpr"  # Triton reads annotations by this name

    class jit:
        """`triton.jit`, applied at the first launch to every kernel of the module at once."""

        def __init__(self, fn: Callable | None = None, **options):
            self.fn, self.options = fn, options
            if fn is not None:
                functools.update_wrapper(self, fn)

        def __call__(self, fn: Callable) -> "jit":
            return jit(fn, **self.options)  # @jit(do_not_specialize=[...])

        def __getitem__(self, grid):
            return self.compiled[grid]

        @property
        def compiled(self):
            """The `triton.JITFunction` (or, with TRITON_INTERPRET=1, the interpreted one)."""
            if "jitted" not in self.__dict__:
                with _COMPILING:  # another thread must not meet a module half changed
                    self._compile_module()
            return self.jitted

        def _compile_module(self) -> None:
            import triton
            import triton.language

            scope = self.fn.__globals__
            own = [v for v in scope.values() if isinstance(v, jit) and v.fn.__globals__ is scope]
            made = {v: v.__dict__.get("jitted") or triton.jit(v.fn, **v.options) for v in own}
            scope["tl"] = triton.language
            for name, value in list(scope.items()):
                if isinstance(value, jit):
                    scope[name] = made[value] if value in made else value.compiled
            for kernel, jitted in made.items():
                kernel.jitted = jitted


_COMPILING = threading.RLock()

# Looked up here: torch 2.11's compiler does not trace find_spec, and would break the graph at it.
_TRITON = importlib.util.find_spec("triton") is not None


def triton_installed() -> bool:
    return _TRITON


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors (for tests)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def _supported(index: int | None) -> bool:
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return True  # a fake tensor's; one of AMD's
    return capability(torch.device("cuda", index or 0)) >= 80


def _new_enough(index: int | None) -> bool:
    """Whether that GPU is one of those which Triton, and the kernels' tiles, are made for."""
    return _supported(index)


_new_enough._dynamo_marked_constant = True  # as torch.compiler.assume_constant_result, which takes
# half of torch.compile along


def use_triton(x: Tensor) -> bool:
    """Whether `x` takes the Triton kernel; otherwise PyTorch's own operation."""
    if x.is_cuda:
        return triton_installed() and _new_enough(x.device.index)
    return x.device.type == "cpu" and interpreting() and triton_installed()


def path() -> str:
    """What calls take on this machine, and why, in words."""
    if torch.cuda.is_available():
        if not triton_installed():
            return "PyTorch's operations, as Triton is not installed"
        if not _new_enough(torch.cuda.current_device()):
            return f"PyTorch's operations, as {torch.cuda.get_device_name()} is older than Ampere"
        return f"Triton kernels, on {torch.cuda.get_device_name()}"
    if interpreting() and triton_installed():
        return "Triton kernels in the interpreter, as TRITON_INTERPRET=1 is set"
    return "PyTorch's operations, as there is no GPU"


def traced() -> bool:
    """Whether something other than plain eager PyTorch looks at the calls: a compiler, TorchScript,
    fake tensors, a FLOP counter, selective checkpointing, a function transform."""
    return (
        torch.compiler.is_compiling()
        or torch._C._is_tracing()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
    )


def _on_its_device(launch: Callable) -> Callable:
    """The launcher, run with the device of its first tensor current: there Triton launches."""

    @functools.wraps(launch)
    def run(*args):
        x = args[0]
        if x.is_cuda and x.device.index != torch.cuda.current_device():
            with torch.cuda.device(x.device):
                return launch(*args)
        return launch(*args)

    return run


def _refuse_forward_mode(name: str) -> None:
    """PyTorch would take the tangents of an operator of one's own for zeros, and say nothing."""
    if torch._C._are_functorch_transforms_active():
        kinds = [x.key() for x in retrieve_all_functorch_interpreters()]
        if TransformType.Jvp in kinds:
            raise NotImplementedError(f"{name} has no forward-mode derivative (torch.func.jvp)")


def only_once(backward: Callable) -> Callable:
    """A decorator of backward passes: RuntimeError where they are to be differentiated again.

    Not PyTorch's `once_differentiable`, whose error hangs on the incoming gradients: no path leads
    from it to the inputs, so that `torch.autograd.grad` never meets it, and drops the term.
    """

    @functools.wraps(backward)
    def run(ctx, *gradients):
        if torch.is_grad_enabled():
            raise RuntimeError(
                "ponder's kernels have no second derivative, which create_graph=True asks for; "
                "take PyTorch's own operations there"
            )
        return backward(ctx, *gradients)

    return run


_libraries: dict[str, torch.library.Library] = {}  # an op is there as long as its library


class Operation:
    """A launcher as an operator of PyTorch that is called directly where nothing traces the call.

    The operator is what a tracer sees. Its dispatch costs more than a small kernel's launch: with
    two tensors, 24 µs a call against 7, and 105 against 50 with the backward pass (one CPU core).
    It is what `torch.library.custom_op` makes, but for the autograd kernel, which is made when a
    tracer first asks for it: 0.2 ms of the import instead of 1.3.
    """

    def __init__(self, name: str, launch: Callable):
        self.name, launch = name, _on_its_device(launch)
        self.launch = self.apply = launch
        if name in _libraries:  # the file is imported again, after a change to it
            _libraries.pop(name)._destroy()
        space, _, own = name.partition("::")
        self.library = _libraries[name] = torch.library.Library(space, "FRAGMENT")
        schema = torch.library.infer_schema(launch, mutates_args=())
        self.library.define(own + schema, tags=(torch.Tag.pt2_compliant_tag,))
        # The compiler is to look at what calls the operator, not into its launcher.
        compiled = _disable_dynamo(launch)
        self.library.impl(own, compiled, "CompositeExplicitAutograd")
        self.library.impl(own, self._autograd, "Autograd", with_keyset=True)
        self.op = getattr(getattr(torch.ops, space), own).default
        # By the names that PyTorch looks for; without a backward, one that is needed raises.
        self._backward_fn: Callable | None = None
        self._setup_context_fn: Callable | None = None

    @functools.cached_property
    def _autograd_kernel(self) -> Callable:
        return make_autograd_impl(self.op, self)

    def _autograd(self, keyset, *args, **kwargs):
        return self._autograd_kernel(keyset, *args, **kwargs)

    def register_fake(self, fake: Callable) -> Callable:
        """As custom_op's."""
        return torch.library.register_fake(self.name, fake, lib=self.library)

    def __call__(self, *args):
        if not traced():
            return self.apply(*args) if torch.is_grad_enabled() else self.launch(*args)
        if not torch.compiler.is_compiling():
            _refuse_forward_mode(self.name)
        return self.op(*args)

    def register_autograd(
        self, backward: Callable, *, setup_context: Callable, twice: bool = False
    ) -> None:
        """As custom_op's; twice: the backward itself consists of operations with gradients."""
        backward = backward if twice else only_once(backward)
        self._backward_fn, self._setup_context_fn = backward, setup_context

        # Not a setup_context of its own: PyTorch then binds the arguments anew, for 15 µs a call.
        def forward(ctx, *args):
            output = self.launch(*args)
            setup_context(ctx, args, output)
            return output

        members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        kind = type(self.launch.__name__, (torch.autograd.Function,), members)
        # Past what Function's own does for function transforms, of which there is none here: an
        # argument of attention's at a time, 10 µs a call.
        self.apply = super(torch.autograd.Function, kind).apply  # pyright: ignore


def operation(name: str) -> Callable[[Callable], Operation]:
    """A decorator of launchers, with the methods of what `torch.library.custom_op` gives."""
    return functools.partial(Operation, name)


def check_device(name: str, x: Tensor, **others: Tensor | None) -> None:
    """Raise ValueError unless all are on x's device: a kernel would read another's addresses."""
    for argument, other in others.items():
        if other is not None and other.device != x.device:
            raise ValueError(
                f"{name}: {argument} is on {other.device}; it must be on {x.device}, as the first"
            )


def check_dtype(name: str, argument: str, dtype: torch.dtype) -> None:
    """Raise ValueError unless the kernels know the dtype."""
    if dtype not in TRITON_TYPE:
        raise ValueError(f"{name}: {argument} is {dtype}; supported are fp32, fp16 and bf16")


def check_reduction(name: str, reduction: str) -> None:
    """Raise ValueError unless a loss can be reduced so."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"{name}: reduction is {reduction!r}; it must be one of {REDUCTIONS}")


def unit_stride(x: Tensor) -> Tensor:
    """x with its last dimension's elements side by side; the others may lie anyhow."""
    return x if x.stride(-1) == 1 else x.contiguous()


def empty_like(x: Tensor, head_dim: int | None = None) -> Tensor:
    """Empty, of x's (B, H, T, D), or another D, in x's layout if a head's numbers lie side by side
    in that, else contiguous."""
    if head_dim not in (None, x.shape[-1]):
        batch, n_heads, length, _ = x.shape
        if x.transpose(1, 2).is_contiguous():
            return x.new_empty(batch, length, n_heads, head_dim).transpose(1, 2)
        return x.new_empty(batch, n_heads, length, head_dim)
    y = torch.empty_like(x)
    return y if y.stride(-1) == 1 else torch.empty_like(x, memory_format=torch.contiguous_format)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """That of x in a matrix product, where autocast is on: it leaves fp64 as it is."""
    kind = x.device.type
    if x.is_meta or not torch.is_autocast_enabled(kind) or x.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(kind)


def autocast(first: Tensor, *others: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors in autocast's dtype where autocast is on, as torch's matrix products do."""
    dtype, tensors = autocast_dtype(first), (first, *others)
    return tensors if dtype is None else tuple(t if t is None else t.to(dtype) for t in tensors)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


@functools.cache
def capability(device: torch.device) -> int:
    """The compute capability of a CUDA device as one number: 80, 90, 100. 0 in the interpreter;
    94 on any GPU of AMD's, whose numbers mean other things: what it stands for has no TMA."""
    if device.type != "cuda":
        return 0
    if torch.version.hip is not None:
        return 94
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.cache
def tiles_file() -> dict[str, Any]:
    """The tiles that `python -m ponder.benchmarks.tiles` found on this machine, from the file that
    PONDER_TILES names: {"capability", "attention", "mlp"}. Empty where it names none."""
    path = os.environ.get("PONDER_TILES")
    return json.loads(Path(path).read_text()) if path else {}


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    """Where a kernel's TMA descriptors lie; PyTorch's allocator aligns to 512 bytes."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


@functools.cache
def _driver() -> Any:
    from triton.runtime import driver

    return driver


# What was launched: (compiled kernel, numbers and constants, its source, whose id is in the key).
_launched: dict[tuple, tuple[Any, tuple, Any]] = {}
MOST_LAUNCHED = 4096


def launch(
    kernel: Any,
    programs: int | tuple[int, int, int],
    tensors: tuple[Tensor | None, ...],
    numbers: tuple[float | None, ...],
    *,
    descriptors: bool = False,
    **constants: Any,
) -> None:
    """Run a kernel whose arguments are tensors, then numbers, then constants, in so many programs.

    Triton inspects all of them at each launch. What it compiled for the same numbers, and for
    tensors of the same dtypes and alignments, is launched directly here, in a third to two thirds
    of its time. descriptors: the kernel makes TMA descriptors.
    """
    programs = programs if isinstance(programs, tuple) else (programs, 1, 1)
    arguments = kernel, programs, tensors, numbers, constants
    if descriptors:  # in a copy of the context, so that the caller's Triton allocator stays
        contextvars.copy_context().run(_launch_with_scratch, *arguments)
    else:
        _launch(*arguments)


def _launch_with_scratch(*args) -> None:
    import triton

    triton.set_allocator(_scratch)
    _launch(*args)


def _launch(kernel, programs, tensors, numbers, constants) -> None:
    if isinstance(kernel, jit):
        kernel = kernel.compiled
    # AMD's kernels are compiled for the sizes of tensors too; the interpreter compiles nothing.
    if torch.version.hip is not None or not hasattr(kernel, "device_caches"):
        kernel[programs](*tensors, *numbers, **constants)
        return
    active = _driver().active
    device = active.get_current_device()
    key: Any = [id(kernel), device, numbers, *constants, *constants.values()]
    for x in tensors:
        key.append(x if x is None else (x.dtype, x.data_ptr() % 16 == 0))
    found = _launched.get(key := tuple(key))
    if found:
        compiled, rest, _ = found
        stream = active.get_current_stream(device)
        compiled[programs](*tensors, *rest, stream=stream)
        return
    compiled = kernel[programs](*tensors, *numbers, **constants)
    names = [p.name for p in kernel.params if p.is_constexpr]
    if len(_launched) >= MOST_LAUNCHED:
        _launched.clear()
    _launched[key] = compiled, (*numbers, *[constants[name] for name in names]), kernel


REDUCTIONS = ("mean", "sum", "none")
TRITON_TYPE = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class Specialization:
    """One way in which a launcher can compile a kernel; the tests compile each of them ahead.

    `signature` maps every run-time argument to its Triton type ("*bf16", "i32", "fp32"; "*bf16:16"
    says that the pointer or number is divisible by 16); `constexprs` holds the rest.
    """

    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int | None = None  # the chip's own
    matrix: bool = False  # holds a matrix product, so sm_90 code must show wgmma
