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
CASES = [(name, chip) for name in KERNEL_FILES for chip in CHIPS]
CASES += [("rotary", chip) for chip in ("120", "gfx942") if chip not in CHIPS]


@pytest.mark.parametrize("name, chip", CASES)
def test_every_configuration_compiles(name, chip, tmp_path):
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    script = Path(__file__).with_name("ahead_of_time.py")
    run = subprocess.run(
        [sys.executable, script, name, chip],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert "FAULT" not in run.stdout, run.stdout
    compiled = re.search(r"^compiled (\d+)$", run.stdout, re.MULTILINE)
    assert compiled and int(compiled[1]) > 0, f"{name} lists no specializations"


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
