"""Docstrings say what a caller must know: shapes, dtypes, units, errors, sources.

Looked at is what the reference in docs/api shows: every public function, class and method of its
modules. What can be told from the code is held against the text: a function of tensors names
shapes, one that raises ValueError says so, one that counts or measures names its unit.
"""

import ast
import re
from pathlib import Path

import pytest

from ponder import kernels

ROOT = Path(__file__).parents[1]
SHAPE = r"\((\.\.\.|[A-Z]\w*[,)]|[A-Z]\w* ?·|N,|resamples|iterations)|[Ss]hape|scalar"
ERRORS = r"ValueError|[Rr]aises?\b|errors as"
UNITS = {  # a word of the function's name: what its docstring then says
    r"flops": r"FLOP|[Oo]perations",
    r"memory|bytes": r"[Bb]ytes|does not fit|fit",
    r"seconds": r"[Ss]econds|Of (one|the)",
    r"loss|cross_entropy": r"nats|squared",
}


def modules():
    """Every module that a page of the reference shows; kernels have a test of their own."""
    for page in sorted({*(ROOT / "docs/api").glob("*.md")} - {ROOT / "docs/api/kernels.md"}):
        for name in re.findall(r"^::: ponder\.([\w.]+)", page.read_text(), re.MULTILINE):
            path = ROOT / name.replace(".", "/")
            yield path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def public(nodes, owner="", above=""):
    """(name, node, docstring with its class's) of public functions, classes and methods."""
    for node in nodes:
        if getattr(node, "name", "_").startswith("_"):
            continue
        text = ast.get_docstring(node) or ""
        if isinstance(node, ast.ClassDef):
            yield owner + node.name, node, text
            yield from public(node.body, f"{owner}{node.name}.", text)
        elif isinstance(node, ast.FunctionDef):
            yield owner + node.name, node, text and f"{text}\n{above}"


def own_raises(function: ast.FunctionDef) -> bool:
    """Whether the function itself, and none that it calls, raises ValueError."""
    raised = [n for n in ast.walk(function) if isinstance(n, ast.Raise) and n.exc]
    return any(ast.unparse(n.exc).startswith("ValueError(") for n in raised)


def takes_or_gives_tensors(function: ast.FunctionDef) -> bool:
    hints = [a.annotation for a in (*function.args.args, *function.args.kwonlyargs)]
    hints.append(function.returns)
    return any(re.search(r"\b(Tensor|ndarray|Array)\b", ast.unparse(h)) for h in hints if h)


def faults(name: str, node, text: str) -> list[str]:
    if not text:
        return ["has no docstring"]
    if isinstance(node, ast.ClassDef):
        return []
    found = []
    if takes_or_gives_tensors(node) and not re.search(SHAPE, text):
        found.append("takes or gives tensors and names no shape")
    if own_raises(node) and not re.search(ERRORS, text):
        found.append("raises ValueError and does not say so")
    for word, unit in UNITS.items():
        if re.search(word, node.name) and not re.search(unit, text):
            found.append(f"is called {node.name} and names no unit ({unit})")
    return found


# What a base class or a protocol has explained.
INHERITED = re.compile(
    r"\.(name|alphabet|oracle|sizes|run|forward|solve|draw|every|prompt|steps|key|step"
    r"|state_dict|load_state_dict|search|thinks|texts|source|rows|validation)$"
)


@pytest.mark.parametrize("path", list(modules()), ids=lambda path: str(path.relative_to(ROOT)))
def test_the_reference_tells_shapes_units_and_errors(path):
    found = []
    for name, node, text in public(ast.parse(path.read_text()).body):
        if text or not INHERITED.search(name):
            found += [f"{name} {fault}" for fault in faults(name, node, text)]
    assert not found, f"{path.relative_to(ROOT)}: {'; '.join(found)}"


@pytest.mark.parametrize("name", kernels.__all__)
def test_a_kernel_tells_shapes_dtypes_errors_and_source(name):
    text = getattr(kernels, name).__doc__
    for other in re.findall(r"those of `(\w+)`", text):  # layer_norm: as rms_norm
        text += getattr(kernels, other).__doc__
    for what, pattern in {
        "shapes": SHAPE,
        "dtypes": r"fp32",
        "errors": r"Raises ValueError for",
        "a source": r"Sources?: [\s\S]*(\d{4}|torch\.nn)",
    }.items():
        assert re.search(pattern, text), f"{name} tells no {what}"


def test_what_is_missing_is_found():
    """The looking itself: each fault in a function that has it."""
    code = '''
def bare(x): ...

def loss_of(x: Tensor):
    """The loss."""
    raise ValueError("no")
'''
    (_, bare, no_text), (_, loss, text) = public(ast.parse(code).body)
    assert faults("bare", bare, no_text) == ["has no docstring"]
    assert len(faults("loss_of", loss, text)) == 3
    assert not faults("loss_of", loss, "x (B, T): the loss in nats. Raises ValueError for ...")


@pytest.mark.parametrize(
    "path", ["training/config", "training/plan", "training/ladder", "inference/config"]
)
def test_every_option_says_what_it_is(path):
    """In --help, that is, and in the reference."""
    for config in ast.parse((ROOT / f"{path}.py").read_text()).body:
        if isinstance(config, ast.ClassDef) and config.name.endswith(("Config", "Options")):
            for field, text in zip(config.body, [*config.body[1:], None], strict=True):
                if isinstance(field, ast.AnnAssign):
                    told = isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
                    assert told, f"{config.name}.{ast.unparse(field.target)}"
