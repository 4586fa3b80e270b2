"""The C of this package, compiled at first use by this machine's compiler, for its CPU."""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from ctypes import c_int64, c_void_p
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

HEADERS = sorted(Path(__file__).parent.glob("*.h"))  # some of which each file includes
# Nothing is rounded otherwise than it is written, but for products that are fused with a sum.
COMMON = "-O3 -std=gnu11 -ffp-contract=fast -fno-math-errno -fno-trapping-math -shared -fPIC"
# The first that the compiler takes: Apple's has no OpenMP, and Arm's CPUs another name.
CHOICES = "-march=native -fopenmp", "-mcpu=native -fopenmp", "-march=native", "-mcpu=native"
PLAIN = Tensor, torch.nn.Parameter
DTYPES = torch.float32, torch.bfloat16


class View(ctypes.Structure):
    """A tensor (B, H, T, D) with unit stride within a head, as C is told of it."""

    _fields_ = [("data", c_void_p), *((name, c_int64) for name in ("batch", "head", "token"))]

    def __init__(self, x: Tensor):
        super().__init__(x.data_ptr(), *x.stride()[:3])


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


def _folder() -> Path | None:
    """Where compiled libraries are kept, as what training computes once is: $PONDER_CACHE, or the
    user's cache folder; None where that is closed, or nobody's."""
    try:
        given, user = (os.environ.get(name) for name in ("PONDER_CACHE", "XDG_CACHE_HOME"))
        folder = Path(given or Path(user or Path.home() / ".cache") / "ponder")
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except (OSError, RuntimeError):  # RuntimeError: the user has no home
        return None


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
    text = *(file.read_text(encoding="utf-8") for file in (source, *HEADERS)), COMMON, CHOICES
    known = *text, command, _said([*command, "--version"]), _cpu()
    digest = hashlib.sha256(repr(known).encode()).hexdigest()[:16]
    name, folder = f"{source.stem}-{digest}.so", _folder()
    try:
        if folder is not None and (folder / name).exists():
            return ctypes.CDLL(str(folder / name))
        with tempfile.TemporaryDirectory(prefix="ponder-", dir=folder) as aside:
            path = _compiled(command, source, Path(aside) / name)
            found = ctypes.CDLL(str(path))
            if folder is not None:
                os.replace(path, folder / name)
            return found
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
