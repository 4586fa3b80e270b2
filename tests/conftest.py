"""One thread a test process, and the kernels' interpreter for tests/kernels alone."""

import importlib.util
import os
from pathlib import Path

# Tests run side by side, one process a core: each keeps to one thread, child processes too.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

import ponder  # noqa: F401  takes the repository root off the path

INTERPRET = not torch.cuda.is_available() and importlib.util.find_spec("triton") is not None
KERNELS = Path(__file__).parent / "kernels"

if INTERPRET:
    # Triton's own library is built for the interpreter, or not, when it is imported.
    os.environ["TRITON_INTERPRET"] = "1"
    from ponder.tests.interpreter import mend

    mend()


@pytest.fixture
def set_threads():
    """torch.set_num_threads, undone behind the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of what a file holds, the part that benchmarks/isolated.py gave to this process."""
    part, _, parts = os.environ.get("PONDER_TESTS", "0/1").partition("/")
    items[:] = items[int(part) :: int(parts)]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Before any fixture: kernels run interpreted in their own tests, and nowhere else."""
    if INTERPRET and item.path.is_relative_to(KERNELS):
        os.environ["TRITON_INTERPRET"] = "1"
    else:
        os.environ.pop("TRITON_INTERPRET", None)
