"""Compile every configuration of one kernel module for one chip, with no GPU, and inspect it.

`python tests/kernels/ahead_of_time.py norm 90` prints a line a fault, then the number compiled;
with no module it reads such pairs from standard input, a line each. It is a process of its own
because the other kernel tests run with TRITON_INTERPRET=1. Chips: NVIDIA's by compute capability,
and gfx942, AMD's MI300.
"""

import argparse
import importlib
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# By chip: its capability as torch tells it, Triton's target, bytes of shared memory for a block.
CHIPS = {
    "80": (80, GPUTarget("cuda", 80, 32), 166_912),
    "90": (90, GPUTarget("cuda", 90, 32), 232_448),
    "100": (100, GPUTarget("cuda", 100, 32), 232_448),
    "120": (120, GPUTarget("cuda", 120, 32), 101_376),
    "gfx942": (94, GPUTarget("hip", "gfx942", 64), 65_536),
}
MAX_SPILL = 64  # bytes of stack a thread
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def compile_ahead(spec, target: GPUTarget, *, ones: bool = False):
    """ones: with the constant 1 in the place of each number in `_may_be_one`."""
    fn = getattr(spec.kernel, "compiled", spec.kernel)  # jit replaces itself once used
    signature, constants, attrs = {}, dict(spec.constexprs), {}
    for i, parameter in enumerate(fn.params):
        name = parameter.name
        assert (name in spec.signature) != (name in spec.constexprs), f"{fn.__name__}: {name}"
        kind = spec.signature.get(name, "constexpr")
        if ones and name in _may_be_one(spec):
            kind, constants[name] = "constexpr", 1
        if kind.endswith(":16"):
            kind = kind.removesuffix(":16")
            attrs[(i,)] = [["tt.divisibility", 16]]
        signature[name] = kind
    source = ASTSource(fn, signature, constants, attrs)
    options = {"num_warps": spec.num_warps, "num_stages": spec.num_stages}
    return triton.compile(source, target=target, options=options)


def _may_be_one(spec) -> set[str]:
    """The numbers of which Triton compiles another kernel where they are 1."""
    fn = getattr(spec.kernel, "compiled", spec.kernel)
    free = {x.name for x in fn.params if not x.do_not_specialize}
    return {name for name, kind in spec.signature.items() if kind == "i32"} & free


def resources(asm: dict) -> tuple[int, int]:
    """(registers, bytes of stack: what did not fit in registers) a thread."""
    if "amdgcn" in asm:
        names = (r"\.vgpr_count:\s+(\d+)", r"\.private_segment_fixed_size: (\d+)")
        registers, stack = (re.findall(name, asm["amdgcn"]) for name in names)
        return int(registers[0]), int(stack[0])
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.findall(r"REG:(\d+) STACK:(\d+)", usage)
    return max(int(r) for r, _ in found), max(int(s) for _, s in found)


def narrow_addresses(ttir: str) -> list[str]:
    """The 32-bit products of two variables that an address is computed from.

    A row times a stride passes 2³¹ long before memory ends; so one of the two must be widened
    before. (A block's index times its constant size is a row, which 32 bits hold.)
    """
    definition = re.compile(
        r"^\s*(%\w+)(?::\d+)? = (\S+) (.*?) : (.*?)(?: loc\(.*)?$", re.MULTILINE
    )
    values = {
        name: (op, re.findall(r"%\w+", operands), kind)
        for name, op, operands, kind in definition.findall(ttir)
    }
    found, seen = [], set()

    def follow(name: str) -> None:
        if name in seen or name not in values:
            return
        seen.add(name)
        op, operands, kind = values[name]
        constants = [x for x in operands if values.get(x, ("",))[0] == "arith.constant"]
        if op == "arith.muli" and kind.rstrip(">").endswith("i32") and not constants:
            found.append(name)
        # What was loaded, compared or divided is no product any more.
        if op not in ("tt.load", "arith.cmpi", "arith.divsi", "arith.remsi"):
            for x in operands:
                follow(x)

    for op, operands, _ in list(values.values()):
        if op == "tt.addptr":
            follow(operands[1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("module", nargs="?")
    parser.add_argument("chip", nargs="?", default="90", choices=CHIPS)
    parser.add_argument("--only", default="", metavar="TEXT", help="kernels whose name has it")
    parser.add_argument("--verbose", action="store_true", help="a line for every configuration")
    args = parser.parse_args()
    if args.module:
        inspect(args.module, args.chip, args.only, args.verbose)
    else:
        for line in sys.stdin:
            inspect(*line.split())


def inspect(name: str, chip: str, only: str = "", verbose: bool = False) -> None:
    module = importlib.import_module(f"ponder.kernels.{name}")
    capability, target, shared_limit = CHIPS[chip]
    compiled, last = 0, {}
    for spec in module.specializations(capability):
        if only not in spec.kernel.__name__:
            continue
        kernel = compile_ahead(spec, target)
        compiled += 1
        registers, stack = resources(kernel.asm)
        shared = kernel.metadata.shared
        label = (
            f"{spec.kernel.__name__} {dict(spec.constexprs)} warps={spec.num_warps} "
            f"stages={spec.num_stages} {sorted(set(spec.signature.values()))}"
        )
        if verbose:
            print(f"{label}: {registers} registers, {stack} B stack, {shared} B shared")
        # Of gfx942 only that it compiles and fits; --verbose tells what it spills.
        if stack > MAX_SPILL and target.backend == "cuda":
            print(f"FAULT {label}: spills {stack} bytes")
        if shared > shared_limit:
            print(f"FAULT {label}: {shared} bytes of shared memory")
        for value in narrow_addresses(kernel.asm["ttir"]):
            print(f"FAULT {label}: {value} is a 32-bit product in an address")
        if spec.matrix and chip == "90" and "wgmma" not in kernel.asm["ptx"]:
            print(f"FAULT {label}: no wgmma")
        if _may_be_one(spec):
            last[spec.kernel.__name__] = spec
    for spec in last.values():
        compile_ahead(spec, target, ones=True)
        compiled += 1
    print(f"compiled {compiled}", flush=True)


if __name__ == "__main__":
    main()
