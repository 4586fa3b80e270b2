"""The command `ponder`: parses, calls, prints. No torch is imported before a command needs it."""

import errno
import io
import os
import sqlite3
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_type_hints

from . import __version__

HELP = """usage: ponder COMMAND [options]     (ponder COMMAND --help explains one)

Small GPT-style models on fused Triton kernels, and what thinking longer buys them.

commands:
  demo      train a small reasoning model, sweep samples and budgets, write the report
  train     train a model: ponder train [PRESET] [--data KIND:PLACE] ...
  sweep     measure accuracy against inference compute: samples × thinking budgets
  report    draw a training run's curves, a sweep's report, or a comparison of several sweeps
  scale     train a ladder of sizes and fit the scaling law: ponder scale [tiny|cpu|gpu] ...
  plan      memory, time and layout of a run before it starts: ponder plan [MODEL] ...
  generate  let a model answer prompts
  info      versions, hardware, and which path each kernel takes

options:
  --version  the version
"""


# What a disk or its owner says to a write, or to a path that cannot be: no fault of ours.
REFUSALS = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
    *(errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP),
}


def _parse(options: type, arguments: list[str], **settings: Any) -> Any:
    """tyro.cli, but each field's text is one paragraph: tyro keeps a docstring's line breaks."""
    import tyro
    from docstring_parser import parse_from_object

    for group in (options, *filter(is_dataclass, get_type_hints(options).values())):
        texts = {p.arg_name: p.description or "" for p in parse_from_object(group).params}
        for field in fields(group):
            if field.name in texts:
                field.metadata = MappingProxyType({"help": " ".join(texts[field.name].split())})
    return tyro.cli(options, args=arguments, **settings)


def _tell(what: str, place: Path) -> None:
    """Where something is; one of the processes that share a run says it."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"{what}: {place}")


@dataclass(frozen=True)
class DemoOptions:
    """Train a small reasoning model on two CPU cores or a GPU, and show what thinking buys. One
    that was stopped goes on by the same command."""

    out: Path = Path("runs/demo")
    """the folder that gets model/, train/, sweep/, report/ and run.json"""


def _demo(arguments: list[str]) -> None:
    options = _parse(DemoOptions, arguments, prog="ponder demo")
    from .demo import demo

    print(f"report: {demo(options.out)}")


def _train(arguments: list[str]) -> None:
    from .training.config import PRESETS, TrainConfig, preset

    default = TrainConfig()
    if arguments and not arguments[0].startswith("-"):
        default, arguments = preset(arguments[0]), arguments[1:]
    config = _parse(
        TrainConfig,
        arguments,
        default=default,
        prog=f"ponder train [{'|'.join(PRESETS)}]",
        description="Train a model; a preset gives the defaults of the options. They stand in this "
        "order: the data and what to begin from, the model's shape, how it learns, how the machine "
        "computes, what is written.",
    )
    config.check()
    from .training.loop import train

    _tell("model", train(config))


def _sweep(arguments: list[str]) -> None:
    from .inference.config import SweepConfig

    config = _parse(SweepConfig, arguments, prog="ponder sweep")
    config.check()
    from .inference.sweep import sweep

    _tell("report", sweep(config))


@dataclass(frozen=True)
class ReportOptions:
    """Draw a run's report: a training run's curves, a sweep's from its stored samples; of several
    sweeps, a comparison of their models."""

    folders: tuple[Path, ...]
    """folders that `ponder train`, `ponder sweep`, `ponder scale` or `ponder demo` left"""
    out: Path = Path("runs/comparison")
    """the folder that gets the comparison of several sweeps"""


def _report(arguments: list[str]) -> None:
    from tyro.conf import PositionalRequiredArgs

    positional = [PositionalRequiredArgs]
    options = _parse(ReportOptions, arguments, prog="ponder report", config=positional)
    if not options.folders:
        raise ValueError("give a folder that a ponder command left, or several to compare them")
    if len(options.folders) > 1:
        from .inference.redraw import compare

        print(f"comparison: {compare(options.folders, options.out)}")
        return
    from .provenance import read_run

    [folder] = options.folders
    runs = read_run(folder)
    if "train" in runs:
        from .training.report import write_training_report

        print(f"training: {write_training_report(folder)}")
    if "scale" in runs:
        law = folder / "scaling" / "scaling.png"
        if not law.is_file():
            raise ValueError(f"{folder} has no law yet; go on with ponder scale --resume")
        print(f"law: {law}")
    if "sweep" in runs or not {"train", "scale"} & {*runs}:
        from .inference.redraw import redraw

        print(f"report: {redraw(folder)}")


def _generate(arguments: list[str]) -> None:
    from .inference.config import GenerateConfig

    config = _parse(GenerateConfig, arguments, prog="ponder generate")
    config.check()
    from .inference.shell import generate

    generate(config)


def _scale(arguments: list[str]) -> None:
    from .training.ladder import PRESETS, ScaleConfig, preset

    default = ScaleConfig()
    if arguments and not arguments[0].startswith("-"):
        default, arguments = preset(arguments[0]), arguments[1:]
    config = _parse(
        ScaleConfig,
        arguments,
        default=default,
        prog=f"ponder scale [{'|'.join(PRESETS)}]",
        description="Train every size with every number of tokens, fit the scaling law to the "
        "losses, and train one larger run that the law has predicted.",
    )
    config.check()
    from .training.ladder import scale

    _tell("law", scale(config))


def _plan(arguments: list[str]) -> None:
    from .training.plan import MODELS, PlanConfig, plan
    from .training.plan_text import describe

    model = "gpt2"
    if arguments and not arguments[0].startswith("-"):
        model, arguments = arguments[0], arguments[1:]
    config = _parse(
        PlanConfig,
        arguments,
        prog=f"ponder plan [{'|'.join(MODELS)}|PRESET|FOLDER]",
        description="Memory, time and layout of a run before it starts: of a named size, of a "
        "preset of `ponder train`, or of a folder with a config.json. By default of gpt2.",
    )
    print(describe(plan(config, model), model))


@dataclass(frozen=True)
class InfoOptions:
    """Versions, hardware, and which path each kernel takes."""


def _info(arguments: list[str]) -> None:
    _parse(InfoOptions, arguments, prog="ponder info")
    from . import kernels, provenance
    from .kernels._cpu import path
    from .kernels._native import in_words, library
    from .models.decoder import SOURCE

    for name, value in provenance.versions().items():
        print(f"{name:14}{value}")
    for name, value in provenance.machine().items():
        print(f"{name:14}{value}")
    for name in kernels.__all__:
        print(f"{name:22}{path(name)}")
    way = in_words() if library(SOURCE) else "by PyTorch, as there is no C compiler that works"
    print(f"{'sampling on a CPU':22}{way}")


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "demo": _demo,
    "train": _train,
    "sweep": _sweep,
    "report": _report,
    "scale": _scale,
    "plan": _plan,
    "generate": _generate,
    "info": _info,
}


def run(arguments: list[str]) -> int:
    """The exit status: 0; 1 where samples are lacking; 2 where what was asked for cannot be."""
    for stream in (sys.stdout, sys.stderr):  # where they are not UTF-8, "?" is better than nothing
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    if not sys.stderr.isatty():  # but a log, which takes no progress ten times a second
        os.environ.setdefault("TQDM_MININTERVAL", "10")
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(HELP, end="")
        return 0
    if arguments[0] == "--version":
        print(f"ponder {__version__}")
        return 0
    from .inference import Unfinished

    command = COMMANDS.get(arguments[0])
    try:
        if command is None:
            raise ValueError(
                f"no command is named {arguments[0]!r}; there are {', '.join(COMMANDS)}"
            )
        command(arguments[1:])
    except ValueError as error:
        print(f"ponder: {error}", file=sys.stderr)
        return 2
    except Unfinished as error:
        print(f"ponder: {error}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:  # pip install ponder alone brings torch and Triton
        name = (error.name or "").split(".")[0]
        if name in ("", "ponder"):
            raise
        extras = "pip install 'ponder[train,inference,report]'"
        print(f"ponder: {arguments[0]} needs the package {name}: {extras}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader has enough: ponder generate ... | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at the exit
        return 141
    except sqlite3.DatabaseError as error:
        sentence = f"a store of samples is damaged ({error}); sqlite3's .recover saves the rest"
        print(f"ponder: {sentence}", file=sys.stderr)
        return 2
    except MemoryError as error:
        print(f"ponder: there is not enough memory: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in REFUSALS:
            raise
        print(f"ponder: {error.filename or 'a file'}: {error.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        kept = "; what was finished is kept" * (arguments[0] not in ("generate", "plan", "info"))
        print(f"ponder: interrupted{kept}", file=sys.stderr)
        return 130
    return 0
