"""The state of a training run on disk: one file, written aside and then renamed."""

import os
from pathlib import Path
from typing import Any

import torch


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Replace the checkpoint as a whole: at every moment the old one or the new one is there."""
    aside = path.with_name(path.name + ".tmp")
    with open(aside, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Tensors and plain values alone (no pickled code); ValueError where it cannot be read."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"there is no checkpoint {path} to resume from") from None
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"the checkpoint {path} cannot be read: {reason}") from None
