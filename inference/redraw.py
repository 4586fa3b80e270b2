"""The report of sweeps again, from their stored samples: of one, or of several side by side."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from ..models import GPTConfig
from ..provenance import read_run
from .comparison import write_comparison
from .evaluation import Result, evaluate
from .exchange import training_flops
from .report import summary, unfinished, write_report
from .store import Store


def redraw(folder: Path) -> Path:
    """Write the report of a sweep again from its stored samples, print its summary; returns its
    page. ValueError for a folder that holds no sweep."""
    with _stored(folder) as (run, store, results):
        page = write_report(folder / "report", results, store, run=run)
        print(summary(results, unfinished(run, store)))
    return page


def compare(folders: Sequence[Path], out: Path) -> Path:
    """Write a comparison of several sweeps, each of another model; returns its page.

    A model is called as its sweep's folder is, or by the folder's path where two are called the
    same. ValueError for a folder that holds no sweep.
    """
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    with ExitStack() as stack:
        sweeps = [stack.enter_context(_stored(f, n)) for f, n in zip(folders, names, strict=True)]
        runs, stores, results = zip(*sweeps, strict=True)
        for name, run, store in zip(names, runs, stores, strict=True):
            if lacking := unfinished(run, store):
                print(f"{name} is {lacking}")
        taken = [training_flops(run["configuration"]["model"]) for run in runs]
        training = {name: flops for name, flops in zip(names, taken, strict=True) if flops}
        return write_comparison(
            out, results, stores, training=training if len(training) == len(names) else None
        )


@contextmanager
def _stored(
    folder: Path, name: str | None = None
) -> Iterator[tuple[dict[str, Any], Store, list[Result]]]:
    """A sweep's entry in run.json, its store, and what its samples say; name: its model's, where
    several are compared."""
    runs = read_run(folder)
    if "sweep" not in runs:
        only = "" if name is None else ", and only sweeps are compared"
        raise ValueError(f"{folder} holds no sweep{only}; its run.json knows {', '.join(runs)}")
    configuration = runs["sweep"]["configuration"]
    if lacking := [key for key in ("model", "samples", "seed") if key not in configuration]:
        raise ValueError(
            f"the sweep in {folder / 'run.json'} lacks {', '.join(lacking)} of its configuration; "
            "the same `ponder sweep` again writes it, and samples nothing anew"
        )
    shape = runs["sweep"].get("shape")
    with Store(folder / "sweep" / "samples.sqlite", identity=None) as store:
        results = evaluate(
            store,
            shape=shape and GPTConfig.of(shape),
            samples=configuration["samples"],
            seed=configuration["seed"],
            model=name or configuration["model"],
        )
        yield runs["sweep"], store, results
