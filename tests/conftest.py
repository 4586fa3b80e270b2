"""One thread a test process, and the kernels' interpreter (or machine) for tests/kernels alone."""

import importlib.util
import os
from pathlib import Path

# Tests run side by side, one process a core: each keeps to one thread, child processes too.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

import ponder  # noqa: F401  takes the repository root off the path
from ponder.tests.order import pytest_collection_modifyitems  # noqa: F401

INTERPRET = not torch.cuda.is_available() and importlib.util.find_spec("triton") is not None
KERNELS = Path(__file__).parent / "kernels"

PTX = os.environ.get("PONDER_PTX")  # a capability: kernels are compiled for it, and run as PTX

if INTERPRET and not PTX:
    # Triton's own library is built for the interpreter, or not, when it is imported.
    os.environ["TRITON_INTERPRET"] = "1"
    from ponder.tests.interpreter import mend

    mend()


def pytest_configure(config: pytest.Config) -> None:
    if PTX:
        from ponder.tests.ptx.chip import machine

        chip = machine(int(PTX))
        chip.__enter__()
        config.add_cleanup(lambda: chip.__exit__(None, None, None))


@pytest.fixture
def set_threads():
    """torch.set_num_threads, undone behind the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Before any fixture: kernels run interpreted in their own tests, and nowhere else."""
    if INTERPRET and item.path.is_relative_to(KERNELS):
        os.environ["TRITON_INTERPRET"] = "1"
    else:
        os.environ.pop("TRITON_INTERPRET", None)
