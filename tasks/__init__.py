"""Problems with exact verifiers and worked chains of thought.

A completion reads `<think>` trace `</think>` answer. Texts are plain characters of the task's
alphabet; the special tokens are not among them.
"""

import re
import sys
from hashlib import blake2b
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

from .countdown import Countdown
from .last_digit import LastDigit
from .multiply import Multiply
from .permute import Permute
from .task import (
    SPLITS,
    Problem,
    Task,
    TooFew,
    WorkedTask,
    at_most,
    check_ask,
    check_budget,
    check_range,
    final_text,
    judge,
    problems_of,
    said,
    split_of,
)

__all__ = [
    "SPLITS",
    "Problem",
    "Task",
    "TooFew",
    "WorkedTask",
    "at_most",
    "check_ask",
    "check_budget",
    "check_range",
    "code_of",
    "content_of",
    "final_text",
    "get",
    "judge",
    "names",
    "problems_of",
    "split_of",
]
BUILT_IN = {task.name: task for task in (LastDigit, Permute, Multiply, Countdown)}


def names() -> list[str]:
    """The names that `get` knows, besides gym:NAME."""
    from .word_problems import SOURCES

    return [*BUILT_IN, *SOURCES]


def _settings(name: str, text: str) -> dict[str, Any]:
    """The settings in a task's name: whole numbers, LOW-HIGH for a range, or words."""
    settings: dict[str, Any] = {}
    for part in filter(None, text.split(",")):
        field, equals, value = part.partition("=")
        if not (field and equals and value):
            raise ValueError(
                f"task {name!r}: {part!r} is no setting; say NAME:SETTING=VALUE,… and a range as "
                "LOW-HIGH"
            )
        numbers = [int(n) for n in value.split("-") if n.isdecimal()]
        whole = "-".join(map(str, numbers)) == value
        settings[field] = (tuple(numbers) if len(numbers) > 1 else numbers[0]) if whole else value
    return settings


MEMBERS = ("name", "alphabet", "problems", "trace", "verify", "answer")  # of a Task
OWN = re.compile(r"(?P<file>.+\.py):(?P<kind>\w+)(?::(?P<rest>.*))?")


def _own(file: str, kind: str) -> type[Any]:
    """The class of a user's own file, whose code runs. Its `code` is a digest of the file, so that
    no run goes on with a task that has changed."""
    path = Path(file)
    if not path.is_file():
        raise ValueError(f"task {file}:{kind}: there is no file {file}")
    spec = spec_from_file_location(f"task {path.resolve()}", path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = module_from_spec(spec)  # where dataclasses look
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"{file} does not run ({said(error)})") from error
    found = getattr(module, kind, None)
    if not isinstance(found, type):
        classes = [n for n, c in vars(module).items() if getattr(c, "__module__", "") == spec.name]
        raise ValueError(f"{file} has no class {kind}; it has {', '.join(classes) or 'none'}")
    found.code = blake2b(path.read_bytes(), digest_size=8).hexdigest()
    return found


SEEN = 64  # problems that stand for what a task of one's own reads


def code_of(task: Task) -> str | None:
    """A digest of the file of a task of one's own, and of what else the task says that it depends
    on, by `content`; None for one of ponder's."""
    code, content = getattr(task, "code", None), getattr(task, "content", None)
    return code if code is None or content is None else _digest(code, str(content))


def content_of(task: Task) -> str:
    """A digest of what training problems depend on besides a task's name and settings; "" where
    that is ponder's own code alone. Where a task of one's own has no `content`, its first problems
    stand for what it reads."""
    code, content = code_of(task), getattr(task, "content", None)
    if code is None or content is not None:
        return code or content or ""
    seen = problems_of(task, "train", SEEN, 0)
    return _digest(code, *(x for p in seen for x in (p.prompt, task.trace(p), p.answer)))


def _digest(*texts: str) -> str:
    told = "\0".join(texts).encode("utf-8", "surrogatepass")
    return blake2b(told, digest_size=8).hexdigest()


def get(name: str, **settings: Any) -> Task:
    """The task of that name.

    Settings are the fields of a task's class, such as operands=(3, 8); the name may carry them:
    `multiply:digits=3-3`, `countdown:traces=path,size=3`. `gsm8k:PATH` is a data set from outside
    read from a local file, `gym:NAME` a task of reasoning-gym, `FILE.py:CLASS` a class of one's
    own, whose file is run. Raises ValueError for a name, a setting or a value that is not known.
    """
    from .gym import Gym
    from .word_problems import SOURCES, WordProblems

    kind, _, rest = name.partition(":")
    made, own = BUILT_IN.get(kind), OWN.fullmatch(name)
    if own:
        made, rest = _own(own["file"], own["kind"]), own["rest"] or ""
        kind = f"{own['file']}:{own['kind']}"
    if made:
        settings = _settings(name, rest) | settings
        name = kind
    elif not (kind in SOURCES or (kind == "gym" and rest)):
        known = ", ".join([*names(), "gym:NAME", "FILE.py:CLASS"])
        raise ValueError(f"unknown task {name!r}; known: {known}")
    fields = list(getattr(made, "__dataclass_fields__", ()))
    for setting in settings:
        if setting not in fields:
            known = f"known: {', '.join(fields)}" if fields else "it has none"
            raise ValueError(f"{name}: unknown setting {setting!r}; {known}")
    if made is None:
        return Gym(rest) if kind == "gym" else WordProblems(kind, rest or None)
    try:
        task = made(**settings)
    except TypeError as error:  # abstract, or with fields that have no default
        raise ValueError(f"{name}: {error}") from error
    if lacking := [member for member in MEMBERS if own and not hasattr(task, member)]:
        raise ValueError(f"{name} is no task: it has no {', '.join(lacking)}")
    return task
