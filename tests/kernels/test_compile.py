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

ROOT = Path(__file__).parents[2]
KERNEL_FILES = sorted(p.stem for p in (ROOT / "kernels").glob("[!_]*.py"))


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("name", KERNEL_FILES)
def test_every_configuration_compiles(name, capability, tmp_path):
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    script = Path(__file__).with_name("ahead_of_time.py")
    run = subprocess.run(
        [sys.executable, script, name, str(capability)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert "FAULT" not in run.stdout, run.stdout
    compiled = re.search(r"^compiled (\d+)$", run.stdout, re.MULTILINE)
    assert compiled and int(compiled[1]) > 0, f"{name} lists no specializations"
