"""Compiled kernels, run without a GPU: some of this folder's tests, on the machine of tests/ptx.

`make ptx` runs them all. A process of its own, as Triton is here an interpreter.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed here")

FOLDER = Path(__file__).parent


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run on the GPU here")
@pytest.mark.parametrize(
    "capability, part",
    [
        ("90", "test_ptx.py"),
        ("80", "test_ptx.py"),
        ("90", "21/64"),
        ("80", "20/128"),
        ("100", "107/128"),
    ],
)
def test_on_the_machine(capability, part, tmp_path):
    """The machine's own tests; every 64th of the kernels' for sm_90, every 128th for others."""
    changes = dict(PONDER_PTX=capability, TRITON_CACHE_DIR=str(tmp_path))
    path = FOLDER
    if part.endswith(".py"):
        path = FOLDER / part
    else:
        changes["PONDER_TESTS"] = part
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | changes
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not cpu"]
    # (which compiles anew for each of its examples)
    words += [f"--ignore={FOLDER / 'test_any_configuration.py'}", str(path)]
    said = subprocess.run(words, env=environment, capture_output=True, text=True).stdout
    last = said.strip().splitlines()[-1]
    assert " passed" in last and "failed" not in last and "error" not in last, said[-5000:]
