"""The C of this package, compiled at first use by this machine's compiler, for its CPU."""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

HEADER = Path(__file__).with_name("vectors.h")  # which all of it includes
# Nothing is rounded otherwise than it is written, but for products that are fused with a sum.
COMMON = "-O3 -std=gnu11 -ffp-contract=fast -fno-math-errno -fno-trapping-math -shared -fPIC"
# The first that the compiler takes: Apple's has no OpenMP, and Arm's CPUs another name.
CHOICES = "-march=native -fopenmp", "-mcpu=native -fopenmp", "-march=native", "-mcpu=native"
PLAIN = Tensor, torch.nn.Parameter
DTYPES = torch.float32, torch.bfloat16


def known(*tensors: Tensor | None) -> bool:
    """Whether C reads these, or None: plain tensors on a CPU, in fp32 or bf16."""
    return all(
        x is None or type(x) in PLAIN and x.dtype in DTYPES and x.device.type == "cpu"
        for x in tensors
    )


def compiler() -> list[str] | None:
    """The command of the C compiler: $CC, or cc, gcc or clang; None where there is none."""
    import shlex  # not before a kernel is called: `import ponder.kernels` is quick

    for name in (os.environ.get("CC", ""), "cc", "gcc", "clang"):
        words = shlex.split(name)
        if words and shutil.which(words[0]):
            return words
    return None


def in_words() -> str:
    """What `ponder info` says of a function that is in C."""
    return f"in C, compiled by {' '.join(compiler() or ())}"


def _folder() -> Path:
    """Where compiled libraries are kept, as what training computes once is: $PONDER_CACHE, or the
    user's cache folder; a new folder where that is closed."""
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = Path(os.environ.get("PONDER_CACHE") or user / "ponder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError:
        return Path(tempfile.mkdtemp(prefix="ponder-"))


def _said(words: list[str]) -> str:
    return subprocess.run(words, capture_output=True, text=True, check=False, timeout=120).stdout


def _cpu() -> str:
    """What tells one kind of CPU from another."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(
        sorted({x for x in lines if x.startswith(("flags", "Features", "model name"))})
    )


@cache
def threaded_library(source: Path) -> ctypes.CDLL | None:
    """`library`, but None where its one thread stands against PyTorch's many."""
    found = library(source)
    if found is None:
        return None
    has_threads = ctypes.c_int.in_dll(found, "has_threads").value
    return found if has_threads or torch.get_num_threads() == 1 else None


@cache
def library(source: Path) -> ctypes.CDLL | None:
    """The file, compiled; None where there is no compiler, or with a warning where it failed."""
    command = compiler()
    if command is None:
        return None
    text = source.read_text(), HEADER.read_text(), COMMON, CHOICES
    known = *text, command, _said([*command, "--version"]), _cpu()
    digest = hashlib.sha256(repr(known).encode()).hexdigest()[:16]
    folder = _folder()
    path = folder / f"{source.stem}-{digest}.so"
    try:
        if not path.exists():
            with tempfile.TemporaryDirectory(dir=folder) as aside:
                os.replace(_compiled(command, source, Path(aside) / path.name), path)
        return ctypes.CDLL(str(path))
    except (OSError, subprocess.CalledProcessError) as error:
        reason = (getattr(error, "stderr", None) or str(error)).strip().partition("\n")[0]
        warnings.warn(
            f"{source.name} could not be compiled, PyTorch is used: {reason}", stacklevel=2
        )
        return None


def _compiled(command: list[str], source: Path, path: Path) -> Path:
    """The library at `path`; CalledProcessError of the first choice where none does."""
    tried = []
    for choice in CHOICES:
        words = [*command, *COMMON.split(), *choice.split(), "-o", str(path), str(source), "-lm"]
        tried.append(subprocess.run(words, capture_output=True, text=True, check=False))
        if tried[-1].returncode == 0:
            return path
    tried[0].check_returncode()
    return path
