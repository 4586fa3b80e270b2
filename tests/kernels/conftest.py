"""Kernels run in Triton's interpreter here, or on the GPU where there is one; with PONDER_PTX they
are compiled, and run on the machine of tests/ptx."""

import os

import pytest
import torch

from ponder.kernels import _attention_cpu, _cpu, _decode_attention_cpu

if chip := os.environ.get("PONDER_PTX"):
    # Of no use there: what compiles, the interpreter's own, how a path is chosen; Hopper's kernels.
    collect_ignore = ["test_compile.py", "test_compiled.py", "test_interpreter.py"]
    collect_ignore += ["test_runtime.py"] + ["test_attention_hopper.py"] * (chip != "90")


def _cpu_params(*names: str) -> list:
    return [pytest.param(name, marks=pytest.mark.cpu) for name in names]


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(params=["kernel", *_cpu_params("cpu")])
def path(request, device, monkeypatch) -> str:
    """The device of both ways to compute: the kernels, and PyTorch's operations on CPU tensors."""
    if request.param == "kernel":
        return device
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    return "cpu"


def _on_a_cpu(way: str, monkeypatch) -> str:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    if way == "by PyTorch":
        for module in (_cpu, _attention_cpu, _decode_attention_cpu):
            monkeypatch.setattr(module, "threaded_library", lambda source: None)
    return "cpu"


@pytest.fixture(params=_cpu_params("in C", "by PyTorch"))
def way_on_a_cpu(request, monkeypatch) -> str:
    """The device of both ways of what is written in C for CPU tensors."""
    return _on_a_cpu(request.param, monkeypatch)


@pytest.fixture(params=["kernel", *_cpu_params("in C", "by PyTorch")])
def way(request, device, monkeypatch) -> str:
    """The device of all ways to compute that such a function has."""
    return device if request.param == "kernel" else _on_a_cpu(request.param, monkeypatch)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty comes filled with NaN, so that an output that no kernel wrote shows."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = before
    torch.use_deterministic_algorithms(False)
