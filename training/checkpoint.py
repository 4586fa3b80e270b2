"""The states of a training run on disk: the newest few, each with the checksum of what it holds."""

import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch

STATE, MANIFEST = "state.pt", "manifest.json"


class Checkpoints:
    """Folders `step-000250/`, each with state.pt and manifest.json (step, sha256).

    A folder is written aside, flushed to the disk and then renamed: at every moment the old ones
    or the old ones and the new one are there. One more than `keep` exist while a new one is
    written.
    """

    def __init__(self, folder: Path, keep: int = 2):
        self.folder, self.keep = folder, keep

    def steps(self) -> list[int]:
        """The steps that there is a checkpoint of, in order."""
        names = [path.name.removeprefix("step-") for path in self.folder.glob("step-*")]
        return sorted(int(name) for name in names if name.isdecimal())

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:06}"

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Add the state after a step and remove what is too old; OSError leaves what there was."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._sweep()
        aside = self.folder / f".saving-{step:06}"
        aside.mkdir()
        try:
            digest = _write(aside / STATE, lambda file: _save(state, file))
            manifest = json.dumps({"step": step, "sha256": digest}) + "\n"
            _write(aside / MANIFEST, lambda file: file.write(manifest.encode()))
            self._remove(step)  # a damaged one of the same step
            os.rename(aside, self.path(step))
            _flush(self.folder)
        finally:
            self._sweep()
        earned = [s for s in self.steps() if s <= step]
        for other in self.steps():
            # A later one is damaged: the run went on from before it.
            if other not in earned[-self.keep :]:
                self._remove(other)

    def newest(self, say: Callable[[str], None] = print) -> int | None:
        """The step of the newest checkpoint that is whole, or None where there never was one.

        Damaged ones are named through `say`; ValueError where all are.
        """
        steps = self.steps()
        for step in reversed(steps):
            fault = self._fault(step)
            if not fault:
                return step
            say(f"the checkpoint {self.path(step)} is damaged ({fault}); the one before is taken")
        if steps:
            raise ValueError(
                f"no checkpoint in {self.folder} can be read; take another --out, or delete them "
                "to start from the beginning"
            )
        return None

    def load(self, step: int) -> dict[str, Any]:
        """Tensors and plain values, on the CPU; ValueError for pickled code, which is not run."""
        path = self.path(step) / STATE
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            reason = str(error).partition(". ")[0]
            raise ValueError(f"the checkpoint {path} cannot be read: {reason}") from None

    def _fault(self, step: int) -> str:
        """What is wrong with a checkpoint, in a few words."""
        try:
            manifest = json.loads((self.path(step) / MANIFEST).read_text())
            with open(self.path(step) / STATE, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            if digest != manifest["sha256"]:
                return f"{STATE} is not what its checksum says"
        except OSError as error:
            return f"{Path(error.filename or STATE).name}: {error.strerror}"
        except (ValueError, KeyError, TypeError):
            return f"{MANIFEST} cannot be read"
        return ""

    def _remove(self, step: int) -> None:
        """Renamed first: a removal that is killed half-way leaves no half of a checkpoint."""
        if self.path(step).exists():
            aside = self.folder / f".removed-{step:06}"
            os.rename(self.path(step), aside)
            shutil.rmtree(aside, ignore_errors=True)

    def _sweep(self) -> None:
        """Remove what a save or a removal left that was killed."""
        for pattern in (".saving-*", ".removed-*"):
            for path in self.folder.glob(pattern):
                shutil.rmtree(path, ignore_errors=True)


def _save(state: dict[str, Any], file: IO[bytes]) -> None:
    try:
        torch.save(state, file)
    except RuntimeError as error:
        # A full disk: torch raises an error about positions over the one that says why.
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def _write(path: Path, write: Callable[[IO[bytes]], Any]) -> str:
    """Write a file down to the disk; the checksum of what it then holds."""
    with open(path, "w+b") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
        file.seek(0)
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(folder: Path) -> None:
    """Make a rename in a folder last through a power failure."""
    if os.name == "nt":  # Windows opens no folders
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
