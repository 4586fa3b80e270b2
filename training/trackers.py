"""TensorBoard, Weights & Biases and trackio, through accelerate; train/metrics.jsonl is always."""

import importlib.util
from collections.abc import Sequence

from accelerate import Accelerator

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
    """Tell each tracker of the run, which goes on after `step`."""
    if not config.trackers:
        return
    plain = (bool, int, float, str)
    fields = {k: v if isinstance(v, plain) else str(v) for k, v in config.identity().items()}
    name = config.out.resolve().name
    settings = {
        "tensorboard": {"purge_step": step + 1},  # what a resumed run earns again
        "wandb": {"name": name, "dir": str(config.out / "train")},
        "trackio": {"name": name, "resume": "allow"},
    }
    accelerator.init_trackers("ponder", config=fields, init_kwargs=settings)
