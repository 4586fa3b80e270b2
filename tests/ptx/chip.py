"""A driver for Triton whose chip is the machine: kernels launched on CPU tensors run there."""

import contextlib
import ctypes
import functools
import hashlib
import importlib
import os
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from unittest.mock import patch

import numpy as np

from ponder import kernels
from ponder.kernels import _runtime

from .instructions import header
from .program import SPECIAL, Program

MACHINE = Path(__file__).with_name("machine.c")
UNSET = 0x7FFFDEAD  # a NaN, in registers that nobody wrote


class _Machine(ctypes.Structure):
    """`Machine` of machine.c."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in "code pool registers special memory".split()),
        *((name, ctypes.c_uint64) for name in ("n_tensors", "seed")),
        *((name, ctypes.c_int32) for name in ("n_slots", "threads", "shared_size")),
        ("grid", ctypes.c_int32 * 3),
        ("error", ctypes.c_char_p),
        ("error_size", ctypes.c_int32),
    ]


@functools.cache
def _library() -> ctypes.CDLL:
    """machine.c, compiled once for each state of its sources."""
    lanes, options = header(), "-O2 -march=native -fno-strict-aliasing -ffp-contract=off"
    key = hashlib.sha256((lanes + MACHINE.read_text() + options).encode()).hexdigest()[:16]
    library = Path(tempfile.gettempdir(), f"ponder-ptx-{os.getuid()}-{key}.so")
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            Path(folder, "lanes.h").write_text(lanes)
            made = Path(folder, "machine.so")
            words = f"cc {options} -shared -fPIC -I {folder} {MACHINE} -o {made} -lm".split()
            subprocess.run(words, check=True)
            made.replace(library)
    return ctypes.CDLL(str(library))


def run(
    program: Program,
    grid: tuple[int, int, int],
    values: list[int],
    memory: Iterable[tuple[int, int]],
    *,
    shared: int,
    seed: int,
) -> None:
    """Run a kernel.

    Args:
        grid: programs.
        values: the bits of each parameter.
        memory: (first, end) addresses of all that it may read and write.
        shared: bytes of shared memory.
        seed: of the order in which programs and warps run, and copies and products end.

    Raises:
        RuntimeError: if it does what a GPU would not forgive.
    """
    registers = np.full((program.n_slots, 32), UNSET, np.uint32)
    parameters = [
        (program.slots[name], value, "64" in kind)
        for (kind, name), value in zip(program.parameters, values, strict=True)
        if name in program.slots
    ]
    stored = np.array(values, np.uint64)
    addresses = [
        (program.slots[f"&{name}"], stored.ctypes.data + 8 * i, True)
        for i, (_, name) in enumerate(program.parameters)
        if f"&{name}" in program.slots
    ]
    for slot, bits, wide in [*program.constants, *parameters, *addresses]:
        if wide:
            registers[slot : slot + 2].reshape(-1).view(np.uint64)[:] = bits
        else:
            registers[slot] = bits & 0xFFFFFFFF
    special = [program.slots.get(name, -1) for name in SPECIAL]
    memory = [*memory, (stored.ctypes.data, stored.ctypes.data + stored.nbytes)]
    ranges = np.array(memory, np.uint64).reshape(-1)
    error = ctypes.create_string_buffer(1000)
    arrays = [np.array(x, np.int32) for x in (program.code, program.pool)]
    arrays += [registers, np.array(special, np.int32), ranges]
    machine = _Machine(
        *(x.ctypes.data for x in arrays),
        *(len(ranges) // 2, seed, program.n_slots, program.threads, max(shared, 16)),
        (ctypes.c_int32 * 3)(*grid),
        ctypes.cast(error, ctypes.c_char_p),
        len(error),
    )
    if _library().run(ctypes.byref(machine)):
        raise RuntimeError(f"{program.name}: {error.value.decode()}")


class Compiled:
    """What stands for a `triton.compiler.CompiledKernel`: `run` is the launch."""

    function = packed_metadata = None

    def launch_metadata(self, *args) -> None: ...

    def run(self, x, y, z, stream, function, packed, metadata, enter, leave, *args) -> None: ...

    def __getitem__(self, programs: tuple[int, int, int]) -> Callable[..., None]:
        nothing = [None] * 5
        return lambda *args, stream: self.run(*programs, stream, *nothing, *args)


class Kernel(Compiled):
    """What Triton compiled, as it launches it."""

    launches = 0

    def __init__(self, compiled, signature: dict[str, str]):
        text = compiled.asm["ptx"]
        self.program = Program(text if isinstance(text, str) else text.decode())
        self.kinds = list(signature.values())
        self.metadata = compiled.metadata

    def run(self, x, y, z, stream, function, packed, metadata, enter, leave, *args) -> None:
        values, tensors = [], []
        for kind, arg in zip(self.kinds, args, strict=True):
            if kind == "fp32":
                values.append(struct.unpack("I", struct.pack("f", arg))[0])
            elif kind.startswith("*"):
                values.append(0 if arg is None else arg.data_ptr())
                tensors += [] if arg is None else [arg.untyped_storage()]
            elif kind != "constexpr":
                values.append(int(arg) & 2**64 - 1)
        # Where it makes its descriptors; and of profiles, which it does not write.
        size = self.metadata.global_scratch_size * x * y * z
        scratch = np.full(size + 512, 0xFF, np.uint8)
        first = -(-scratch.ctypes.data // 512) * 512
        values = [*values, first, 0][: len(self.program.parameters)]
        memory = {(t.data_ptr(), t.data_ptr() + t.nbytes()) for t in tensors}
        memory.add((first, first + size))
        Kernel.launches += 1
        shared, seed = self.metadata.shared, Kernel.launches
        run(self.program, (x, y, z), values, memory, shared=shared, seed=seed)


class Chip:
    """A driver that Triton takes for one of this capability."""

    def __init__(self, capability: int):
        self.capability = capability

    def get_current_device(self) -> int:
        return self.capability  # so that Triton keeps what it knows of chips apart

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)


@contextlib.contextmanager
def chip(
    capability: int, compiled: Callable, *, use_triton: Callable, processors: int
) -> Iterator[None]:
    """Launchers and Triton see a chip of this capability. `compiled` stands for
    `JITFunction._do_compile`: it gives what is launched."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    paths = Path(kernels.__file__).parent.glob("*.py")
    names = [f"ponder.kernels.{path.stem}" for path in paths if path.stem != "__init__"]
    replaced = dict(
        use_triton=use_triton,
        interpreting=lambda: False,
        capability=lambda device: capability,
        _processors=lambda device: processors,
    )
    with contextlib.ExitStack() as stack:
        for module in map(importlib.import_module, names):
            for name in replaced.keys() & vars(module).keys():
                stack.enter_context(patch.object(module, name, replaced[name]))
        stack.enter_context(patch.object(JITFunction, "_do_compile", compiled))
        stack.enter_context(patch.object(_runtime, "_launched", {}))
        stack.enter_context(patch.object(driver, "_active", Chip(capability)))
        yield


@contextlib.contextmanager
def machine(capability: int) -> Iterator[None]:
    """Kernels that are launched on CPU tensors, with TRITON_INTERPRET=1, run on the machine."""
    import triton
    from triton.backends.nvidia.compiler import CUDABackend

    triton.knobs.runtime.interpret = False  # whatever the environment says
    os.environ["TRITON_DISABLE_LINE_INFO"] = "1"  # as ahead_of_time.py does
    add_stages, create = CUDABackend.add_stages, CUDABackend.__init__

    def until_ptx(self, stages, *args, **options) -> None:
        add_stages(self, stages, *args, **options)
        del stages["cubin"]

    def created(self, target) -> None:
        create(self, target)
        self.binary_ext = "ptx"

    def compiled(fn, key, signature, device, constexprs, options, attrs, warmup) -> Kernel:
        cache, _, target, _, _ = fn.device_caches[device]
        source = fn.ASTSource(fn, signature, constexprs, attrs)
        made = triton.compile(source, target=target, options=options.__dict__)
        cache[key] = kernel = Kernel(made, signature)
        return kernel

    def use_triton(x) -> bool:
        return x.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"

    stages = patch.object(CUDABackend, "add_stages", until_ptx)
    # With few processors, programs that stay have several tiles each.
    seen = chip(capability, compiled, use_triton=use_triton, processors=3)
    with stages, patch.object(CUDABackend, "__init__", created), seen:
        yield
