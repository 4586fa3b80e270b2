"""Compile every configuration of one kernel module for one chip, with no GPU, and inspect it.

`python tests/kernels/ahead_of_time.py norm 90` prints a line a fault, then the number compiled;
with no module it reads such pairs from standard input, a line each. The module `launches` stands
for what real calls launch. It is a process of its own
because the other kernel tests run with TRITON_INTERPRET=1. Chips: NVIDIA's by compute capability,
and gfx942, AMD's MI300.

What a compilation makes is a function of Triton's version, the chip, the options and the first
intermediate code of a kernel. compiled.csv holds what came out, by a digest of these: what is
there need not be compiled again, which takes a core half an hour for all. Every 32nd is, and
must give what the record says. `--record` compiles what is missing, and writes it down.
"""

import argparse
import csv
import hashlib
import importlib
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

import triton
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend

# By chip: its capability as torch tells it, Triton's target, bytes of shared memory for a block.
CHIPS = {
    "80": (80, GPUTarget("cuda", 80, 32), 166_912),
    "90": (90, GPUTarget("cuda", 90, 32), 232_448),
    "100": (100, GPUTarget("cuda", 100, 32), 232_448),
    "120": (120, GPUTarget("cuda", 120, 32), 101_376),
    "gfx942": (94, GPUTarget("hip", "gfx942", 64), 65_536),
}
MAX_SPILL = 64  # bytes of stack a thread
RECORD = Path(__file__).with_name("compiled.csv")
RECORDED = ("80", "90", "100")
KERNELS = Path(__file__).parents[2] / "kernels"
LAUNCHES = "launches"  # beside this file
COLUMNS = "digest triton chip kernel configuration registers stack shared wgmma".split()
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def prepared(spec, target: GPUTarget, *, ones: bool = False) -> tuple[ASTSource, dict]:
    """A configuration's source and options.

    ones: with the constant 1 in the place of each number in `_may_be_one`.
    """
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
    return source, {name: value for name, value in options.items() if value is not None}


def compile_ahead(spec, target: GPUTarget, *, ones: bool = False):
    """The compiled kernel of a configuration."""
    source, options = prepared(spec, target, ones=ones)
    return triton.compile(source, target=target, options=options)


def digest(spec, target: GPUTarget, *, ones: bool = False) -> str:
    """Of all that a compilation depends on."""
    source, options = prepared(spec, target, ones=ones)
    backend = make_backend(target)
    options = backend.parse_options(options | source.parse_options())
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    functions = backend.get_codegen_implementation(options)
    module = source.make_ir(target, options, functions, backend.get_module_map(), context)
    place = r' loc\((?:[^()"]|"[^"]*"|\([^()]*\))*\)|^#loc.*\n'  # of the source, in files
    text = re.sub(place, "", str(module), flags=re.MULTILINE)
    chosen = {name: x for name, x in vars(options).items() if name != "extern_libs"}  # paths
    parts = (triton.__version__, target, sorted(chosen.items()), text)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:20]


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


class Record:
    """What earlier compilations gave, by digest."""

    def __init__(self):
        rows = []
        if RECORD.exists():
            with RECORD.open(newline="") as file:
                rows = list(csv.DictReader(file))
        self.rows = {row["digest"]: row for row in rows}
        # Another Triton may even make its first code by other functions.
        self.used = not rows or rows[0]["triton"] == triton.__version__
        self.used &= os.environ.get("PONDER_COMPILE") != "all"

    def found(self, spec, chip: str, target: GPUTarget, *, ones: bool = False) -> tuple[dict, bool]:
        """The row of a configuration, compiled where there is none, and whether it was."""
        key = digest(spec, target, ones=ones) if self.used else ""
        known = self.rows.get(key)
        if known and int(key, 16) % 32:
            return known, False
        kernel = compile_ahead(spec, target, ones=ones)
        registers, stack = resources(kernel.asm)
        row = dict(
            digest=key,
            triton=triton.__version__,
            chip=chip,
            kernel=spec.kernel.__name__,
            configuration=_configuration(spec, ones),
            registers=registers,
            stack=stack,
            shared=kernel.metadata.shared,
            wgmma=int("wgmma" in kernel.asm.get("ptx", "")),
        )
        row = {name: str(value) for name, value in row.items()}
        narrow = narrow_addresses(kernel.asm["ttir"])
        # (Two configurations may come to one code, and so to one row.)
        if known and any(known[name] != row[name] for name in COLUMNS[-4:]):
            print(f"FAULT {RECORD.name} says {known}; compiled it is {row}")
        for value in narrow:
            label = f"{row['kernel']} {row['configuration']}"
            print(f"FAULT {label}: {value} is a 32-bit product in an address")
            row["digest"] = ""  # not for the record
        return row, True


def _configuration(spec, ones: bool) -> str:
    values = " ".join(f"{name}={value}" for name, value in spec.constexprs.items())
    types = " ".join(sorted({kind.removesuffix(":16") for kind in spec.signature.values()}))
    size = f"warps={spec.num_warps} stages={spec.num_stages or 'default'}"
    return f"{values} {size} {types}{' ones' if ones else ''}".strip()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("module", nargs="?")
    parser.add_argument("chip", nargs="?", default="90", choices=CHIPS)
    parser.add_argument("--only", default="", metavar="TEXT", help="kernels whose name has it")
    parser.add_argument("--verbose", action="store_true", help="a line for every configuration")
    parser.add_argument("--record", action="store_true", help="compile what compiled.csv lacks")
    args = parser.parse_args()
    # Where lines of the source are is of no use here, takes a fifteenth of the time, and would
    # make another code of every line that moved.
    os.environ["TRITON_DISABLE_LINE_INFO"] = "1"
    if args.record:
        write_record()
    elif args.module:
        inspect(args.module, args.chip, args.only, args.verbose)
    else:
        for line in sys.stdin:
            inspect(*line.split())


def inspect(name: str, chip: str, only: str = "", verbose: bool = False) -> list[dict]:
    module = importlib.import_module(name if name == LAUNCHES else f"ponder.kernels.{name}")
    capability, target, shared_limit = CHIPS[chip]
    record = Record()
    rows, compiled, last = [], 0, {}
    for spec in module.specializations(capability):
        if only not in spec.kernel.__name__:
            continue
        row, new = record.found(spec, chip, target)
        rows.append(row)
        compiled += new
        registers, stack, shared, wgmma = (int(row[name]) for name in COLUMNS[-4:])
        label = f"{row['kernel']} {row['configuration']}"
        if verbose:
            print(f"{label}: {registers} registers, {stack} B stack, {shared} B shared")
        # Of gfx942 only that it compiles and fits; --verbose tells what it spills.
        if stack > MAX_SPILL and target.backend == "cuda":
            print(f"FAULT {label}: spills {stack} bytes")
        if shared > shared_limit:
            print(f"FAULT {label}: {shared} bytes of shared memory")
        if spec.matrix and chip == "90" and not wgmma:
            print(f"FAULT {label}: no wgmma")
        if name != LAUNCHES and _may_be_one(spec):  # launches have their ones
            last[spec.kernel.__name__] = spec
    for spec in last.values():
        row, new = record.found(spec, chip, target, ones=True)
        rows.append(row)
        compiled += new
    print(f"looked at {len(rows)}, {compiled} of them compiled", flush=True)
    return rows


def write_record() -> None:
    """Bring compiled.csv up to date, on all cores; what is there when it is stopped is kept."""
    names = sorted(path.stem for path in KERNELS.glob("[!_]*.py"))
    names.append(LAUNCHES)
    slow = ("attention", "mlp", "decode_attention")
    names.sort(key=lambda name: name not in slow)
    rows, seen = Record().rows, set()
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        tasks = [pool.submit(inspect, name, chip) for name in names for chip in RECORDED]
        for task in as_completed(tasks):
            found = {row["digest"]: row for row in task.result() if row["digest"]}
            rows |= found
            seen |= set(found)
            _write(rows.values())
    _write(row for key, row in rows.items() if key in seen)


def _write(rows) -> None:
    order = "kernel chip configuration digest".split()
    aside = RECORD.with_suffix(".new")  # other processes read it
    with aside.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted(rows, key=lambda row: [row[name] for name in order]))
    aside.replace(RECORD)


if __name__ == "__main__":
    main()
