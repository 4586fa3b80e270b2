"""Files that are computed once and kept: a folder is there as a whole or it is not there."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

VERSION = 3  # of what the folders hold: another number, and everything is built anew
MANIFEST = "manifest.json"


def cache_root() -> Path:
    """$PONDER_CACHE, or `ponder` in the user's cache folder. It can be deleted at any time."""
    if folder := os.environ.get("PONDER_CACHE"):
        return Path(folder)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ponder"
    except RuntimeError:  # in a container, say, whose user has no name
        raise ValueError(
            "there is no home to keep a cache in; PONDER_CACHE can name a folder"
        ) from None


def digest(value: Any) -> str:
    """A hash of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:20]


def cached(
    kind: str, identity: Any, build: Callable[[Path], dict[str, Any]]
) -> tuple[Path, dict[str, Any]]:
    """The folder that `build` filled, and the facts that it returned; both JSON, both kept.

    identity: what the content depends on. Where the cache holds no whole folder for it, `build` is
    given an empty one, which takes its place only when it is complete. Of several processes one
    builds and the others wait. ValueError where the cache cannot be written.
    """
    folder = cache_root() / f"{kind}-{digest([VERSION, identity])}"
    facts = _facts(folder)
    if facts is not None:
        return folder, facts
    from filelock import FileLock  # comes with torch

    try:
        locks = folder.parent / "locks"
        locks.mkdir(parents=True, exist_ok=True)
        with FileLock(locks / folder.name):
            facts = _facts(folder)
            if facts is None:
                facts = _build(folder, identity, build)
    except OSError as error:
        raise ValueError(
            f"the cache {folder} cannot be written: {error.strerror or error}; "
            "PONDER_CACHE can name another folder"
        ) from None
    return folder, facts


def _build(folder: Path, identity: Any, build: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    aside = folder.with_name(f"{folder.name}.building")
    shutil.rmtree(aside, ignore_errors=True)  # of a build that was killed
    aside.mkdir()
    try:
        facts = build(aside)
        sizes = {path.name: path.stat().st_size for path in aside.iterdir()}
        manifest = {"identity": identity, "facts": facts, "sizes": sizes}
        (aside / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        for path in aside.iterdir():
            with path.open("rb+") as file:
                os.fsync(file.fileno())
        shutil.rmtree(folder, ignore_errors=True)  # one that is not whole
        aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return json.loads(json.dumps(facts))


def _facts(folder: Path) -> dict[str, Any] | None:
    """What `build` returned; None where any file is missing or has another size than it had."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        whole = all((folder / n).stat().st_size == size for n, size in manifest["sizes"].items())
    except (OSError, ValueError, KeyError):
        return None
    return manifest["facts"] if whole else None
