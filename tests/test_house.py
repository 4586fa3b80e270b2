"""The plan of the house: which room may import which, what the wheel holds, what its tree shows."""

import ast
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("kernels", "models", "tasks", "training", "inference")
MAY_IMPORT = {
    "kernels": set(),
    "models": {"kernels"},
    "tasks": set(),
    "training": {"models", "tasks", "kernels", "provenance", "figures"},
    "inference": {"figures", "models", "tasks", "kernels", "provenance"},
}
FILES = [(room, path) for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]


def imports(path: Path):
    """(level, first part of the module's name) of every import in a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield 0, alias.name.split(".")[0]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module] if node.module else [alias.name for alias in node.names]
            for name in names:
                yield node.level, name.split(".")[0]


@pytest.mark.parametrize(("room", "path"), FILES, ids=lambda v: getattr(v, "stem", v))
def test_imports_run_one_way(room, path):
    depth = len(path.relative_to(ROOT).parts)
    for level, name in imports(path):
        if level == depth:
            assert name in MAY_IMPORT[room], f"{path} imports {name}"
        assert not (level == 0 and name in (*ROOMS, "ponder")), f"{path}: {name} without its dots"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    tracked = subprocess.run(
        ["git", "-C", ROOT, "ls-files"], capture_output=True, text=True, check=True
    ).stdout.split()
    for name in tracked:
        if (ROOT / name).is_file():
            target = source / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / name).read_bytes())
    words = f"-m pip wheel -q --no-deps --no-build-isolation -w {folder} {source}".split()
    subprocess.run([sys.executable, *words], check=True)
    return next(folder.glob("*.whl"))


def test_the_wheel_holds_the_package_and_nothing_beside_it(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"ponder"}
    assert not [n for n in names if re.search(r"README|Makefile|^ponder/(tests|docs)/", n)]


def test_every_module_of_the_wheel_imports(wheel, tmp_path):
    archive = zipfile.ZipFile(wheel)
    archive.extractall(tmp_path)
    modules = [
        n.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for n in archive.namelist()
        if n.endswith(".py") and not n.endswith("__main__.py")
    ]
    assert "ponder.kernels.attention" in modules and "ponder.inference.sweep" in modules
    code = f"""
import importlib, sys
sys.path.insert(0, {str(tmp_path)!r})
for name in {modules!r}:
    module = importlib.import_module(name)
    assert module.__file__.startswith({str(tmp_path)!r}), module.__file__
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr


def test_the_wheel_alone_needs_torch_and_triton(wheel):
    archive = zipfile.ZipFile(wheel)
    name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
    needs = re.findall(r"^Requires-Dist: ([\w-]+)(.*)$", archive.read(name).decode(), re.MULTILINE)
    assert {package for package, rest in needs if "extra ==" not in rest} == {"torch", "triton"}
    extras = {extra for _, rest in needs for extra in re.findall(r'extra == "(\w+)"', rest)}
    wanted = "train inference report gym math trackers docs all dev"
    assert extras == set(wanted.split())


def test_the_wheel_works_with_torch_alone(wheel, tmp_path):
    """Without Triton too, as on macOS and Windows: everything else is as if not installed."""
    zipfile.ZipFile(wheel).extractall(tmp_path)
    others = "triton transformers datasets accelerate tokenizers safetensors huggingface_hub scipy"
    others = [*others.split(), "matplotlib", "jinja2", "tqdm", "tyro"]
    posix = "fcntl resource pwd grp termios tty pty syslog".split()
    calls = "fork getuid geteuid getpgid killpg setsid uname sysconf sched_getaffinity".split()
    signals = "SIGALRM SIGHUP SIGKILL SIGUSR1 SIGQUIT alarm setitimer pthread_kill".split()
    code = f"""
import sys
for name in {others!r}:
    sys.modules[name] = None
sys.path.insert(0, {str(tmp_path)!r})
import torch
for name in {posix!r}:  # which Windows lacks; PyTorch asks for some of them where they are
    sys.modules[name] = None
import os, signal
for module, names in ((os, {calls!r}), (signal, {signals!r})):
    for name in names:
        delattr(module, name)
from ponder import kernels, models
from ponder.models import GPT, GPTConfig, patch

assert kernels.__file__.startswith({str(tmp_path)!r}), kernels.__file__
tokens = torch.arange(20)[None]
GPT(GPTConfig(32))(tokens, tokens).backward()
x = torch.randn(1, 2, 5, 8)
kernels.attention(x, x, x, causal=True)
kernels.decode_attention(x[:, :, :1], x, x, torch.tensor([5]))
row = torch.zeros(5).long()
kernels.sample_tokens(x[0, 0], temperature=0.0, seeds=row, positions=row)
for call, said in (
    (lambda: models.load("folder"), "checkpoints need the package safetensors"),
    (lambda: GPT.from_pretrained("folder"), "checkpoints need the package safetensors"),
    (lambda: patch(torch.nn.Linear(1, 1)), "patch needs Transformers"),
):
    try:
        call()
    except (ImportError, ValueError) as error:
        assert said in str(error), error
    else:
        raise AssertionError(said)
from ponder.cli import run

assert run(["train", "--help"]) == 2
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert run.stderr.endswith(
        "ponder: train needs the package tyro: pip install 'ponder[train,inference,report]'\n"
    )


def test_kernels_import_nothing_beside_torch():
    """Neither Triton nor PyTorch's compiler, which take longer than the kernels' own files."""
    code = """
import sys, torch
before = set(sys.modules)
import ponder.kernels
more = [name for name in set(sys.modules) - before if name.split(".")[0] != "ponder"]
assert not more, more
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_the_tree_is_shown_as_it_is():
    page = (ROOT / "CONTRIBUTING.md").read_text()
    tree = re.search(r"```text\n(.*?)```", page, re.DOTALL)
    assert tree, "CONTRIBUTING.md has no tree"
    shown = re.findall(r"^(\S+)", re.sub(r"^  +", "", tree[1], flags=re.MULTILINE), re.MULTILINE)
    rooms = [name for name in shown if name.endswith("/")]
    for name in shown:
        found = [p for p in (ROOT / name, *(ROOT / room / name for room in rooms)) if p.exists()]
        assert found, f"the tree shows {name}, which is not there"
    for room in ROOMS:
        for path in (ROOT / room).glob("*.py"):
            if path.name != "__init__.py":
                assert path.name in shown, f"the tree does not show {room}/{path.name}"


def test_transformers_does_not_take_our_kernels_for_its_own():
    code = """
import sys
import ponder, ponder.kernels, transformers
from transformers.utils.import_utils import is_kernels_available
is_kernels_available()
assert "kernels" not in sys.modules or "ponder" not in (sys.modules["kernels"].__file__ or "")
try:
    import kernels
except ImportError:
    pass
else:
    assert kernels.__file__ != ponder.kernels.__file__, kernels.__file__
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr


def test_the_memory_checkers_run_calls_every_kernel():
    from ponder import kernels

    text = (ROOT / "benchmarks" / "every_kernel.py").read_text()
    called = set(re.findall(r"kernels\.(\w+)", text))
    assert called == set(kernels.__all__)
