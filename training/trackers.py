"""TensorBoard, Weights & Biases and trackio, through accelerate; train/metrics.jsonl is always."""

import importlib.util
import uuid
from collections.abc import Sequence
from pathlib import Path

from accelerate import Accelerator

from ..models.hub import first_line
from .config import TrainConfig


def check_trackers(names: Sequence[str]) -> None:
    """ValueError for a tracker whose package is not there (accelerate would leave it out)."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ValueError(
                f"trackers has {name}, which is not installed; say pip install {name}, or leave "
                "it out: train/metrics.jsonl is written in any case"
            )


def start_trackers(accelerator: Accelerator, config: TrainConfig, step: int) -> None:
    """Tell each tracker of the run, which goes on after `step`; ValueError where one refuses."""
    if not config.trackers:
        return
    plain = (bool, int, float, str)
    fields = {k: v if isinstance(v, plain) else str(v) for k, v in config.identity().items()}
    name, folder = config.out.resolve().name, config.out / "train"
    key = _key(folder) if accelerator.is_main_process else ""
    settings = {
        "tensorboard": {"purge_step": step + 1},  # what a resumed run earns again
        "wandb": {"name": name, "id": key, "resume": "allow", "dir": str(folder)},
        "trackio": {"name": f"{name}-{key}", "resume": "allow"},  # it knows runs by name alone
    }
    try:
        accelerator.init_trackers("ponder", config=fields, init_kwargs=settings)
    except Exception as error:  # of kinds of their own: no login, no network, no disk
        names = " or ".join(config.trackers)
        raise ValueError(f"{names} cannot start: {first_line(error)}") from None


def _key(folder: Path) -> str:
    """What tells this run from all others, also those of a folder of the same name: kept in it."""
    file = folder / "tracker_id"
    if not file.exists():
        file.write_text(uuid.uuid4().hex[:8])
    return file.read_text()
