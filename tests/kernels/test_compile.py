"""Every kernel, in every configuration that a launcher can pick, compiled ahead for real chips.

A kernel that passes in the interpreter can still fail to compile, spill its registers or ask for
more shared memory than the chip has: this is where that shows, with no GPU.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed here")

from .ahead_of_time import narrow_addresses  # noqa: E402  (imports triton)

ROOT = Path(__file__).parents[2]
KERNEL_FILES = sorted(p.stem for p in (ROOT / "kernels").glob("[!_]*.py"))
# `make compile` names more chips; of those, here only what is quickly compiled.
CHIPS = os.environ.get("CHIPS", "80 90 100").split()
CASES = [(name, chip) for name in [*KERNEL_FILES, "launches"] for chip in CHIPS]
CASES += [("rotary", chip) for chip in ("120", "gfx942") if chip not in CHIPS]


@pytest.fixture(scope="module")
def compiler(tmp_path_factory):
    """Asks one process for all: to import PyTorch and hash Triton takes it seconds."""
    folder = tmp_path_factory.mktemp("compiled")
    environment = os.environ | {"TRITON_CACHE_DIR": str(folder)}
    environment.pop("TRITON_INTERPRET", None)
    words = [sys.executable, Path(__file__).with_name("ahead_of_time.py")]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    running: list[subprocess.Popen] = []

    def told(name: str, chip: str) -> str:
        """What it prints, until it is done or fails."""
        if not running or running[-1].poll() is not None:
            running.append(subprocess.Popen(words, env=environment, cwd=folder, text=True, **pipes))
        process = running[-1]
        print(name, chip, file=process.stdin, flush=True)
        lines = []
        for line in process.stdout:
            lines.append(line)
            if line.startswith("looked at "):
                break
        else:
            process.wait()
        return "".join(lines)

    yield told
    for process in running:
        process.communicate()


@pytest.mark.parametrize("name, chip", CASES)
def test_every_configuration_compiles(name, chip, compiler):
    said = compiler(name, chip)
    assert "FAULT" not in said, said
    looked = re.search(r"^looked at (\d+), ", said, re.MULTILINE)
    assert looked, said[-3000:]
    assert int(looked[1]) > 0, f"{name} lists no specializations"


@pytest.mark.parametrize("wide", [True, False])
def test_a_32_bit_product_in_an_address_is_found(wide):
    row = "%row" if wide else "%pid"
    kind = "i64" if wide else "i32"
    ttir = f"""
    %c128_i32 = arith.constant 128 : i32 loc(#loc)
    %pid = tt.get_program_id x : i32 loc(#loc)
    %row = arith.extsi %pid : i32 to i64 loc(#loc)
    %block = arith.muli %pid, %c128_i32 : i32 loc(#loc)
    %first = arith.muli {row}, %stride : {kind} loc(#loc)
    %start = tt.splat %first : {kind} -> tensor<128x{kind}> loc(#loc)
    %at = arith.addi %start, %o : tensor<128x{kind}> loc(#loc)
    %p = tt.addptr %x, %at : tensor<128x!tt.ptr<f32>>, tensor<128x{kind}> loc(#loc)
    """
    assert narrow_addresses(ttir) == ([] if wide else ["%first"])
