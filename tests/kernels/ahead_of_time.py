"""Compile every configuration of one kernel module for one chip, with no GPU, and inspect it.

`python tests/kernels/ahead_of_time.py norm 90` prints a line a fault, then the number compiled. It
is a process of its own because the other kernel tests run with TRITON_INTERPRET=1.
"""

import argparse
import importlib
import re
import subprocess
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

SHARED_MEMORY_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448}  # bytes a block may use
MAX_SPILL = 64  # bytes of stack a thread
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def compile_ahead(spec, capability: int):
    fn = getattr(spec.kernel, "compiled", spec.kernel)  # jit replaces itself once used
    signature, attrs = {}, {}
    for i, parameter in enumerate(fn.params):
        name = parameter.name
        assert (name in spec.signature) != (name in spec.constexprs), f"{fn.__name__}: {name}"
        kind = spec.signature.get(name, "constexpr")
        if kind.endswith(":16"):
            kind = kind.removesuffix(":16")
            attrs[(i,)] = [["tt.divisibility", 16]]
        signature[name] = kind
    source = ASTSource(fn, signature, dict(spec.constexprs), attrs)
    options = {"num_warps": spec.num_warps, "num_stages": spec.num_stages}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def resources(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of stack: what did not fit in registers) a thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
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
    parser.add_argument("module")
    parser.add_argument("capability", type=int, choices=SHARED_MEMORY_LIMIT)
    parser.add_argument("--verbose", action="store_true", help="a line for every configuration")
    args = parser.parse_args()
    module = importlib.import_module(f"ponder.kernels.{args.module}")
    compiled = 0
    for spec in module.specializations(args.capability):
        kernel = compile_ahead(spec, args.capability)
        compiled += 1
        registers, stack = resources(kernel.asm["cubin"])
        shared = kernel.metadata.shared
        label = (
            f"{spec.kernel.__name__} {dict(spec.constexprs)} warps={spec.num_warps} "
            f"stages={spec.num_stages} {sorted(set(spec.signature.values()))}"
        )
        if args.verbose:
            print(f"{label}: {registers} registers, {stack} B stack, {shared} B shared")
        if stack > MAX_SPILL:
            print(f"FAULT {label}: spills {stack} bytes")
        if shared > SHARED_MEMORY_LIMIT[args.capability]:
            print(f"FAULT {label}: {shared} bytes of shared memory")
        for value in narrow_addresses(kernel.asm["ttir"]):
            print(f"FAULT {label}: {value} is a 32-bit product in an address")
        if spec.matrix and args.capability == 90 and "wgmma" not in kernel.asm["ptx"]:
            print(f"FAULT {label}: no wgmma")
    print(f"compiled {compiled}")


if __name__ == "__main__":
    main()
