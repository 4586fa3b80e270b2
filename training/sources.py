"""Rows of data sets: from files of JSON lines, Parquet or text, and from the Hub."""

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from glob import glob
from pathlib import Path
from typing import Any, Protocol

from ..models.hub import first_line
from .render import Row

HELD_OUT = ("validation", "valid", "dev")  # names of a data set's own validation split


class Rows(Protocol):
    """A data set, row by row: nothing of it is held in memory."""

    identity: Any
    """changes where the content does; JSON"""

    def train(self) -> Iterable[Row]: ...

    def validation(self) -> Iterable[Row]:
        """The data set's own validation split; nothing where it has none."""
        ...

    def total(self) -> int | None:
        """The number of training rows, where it is known."""
        ...


def open_rows(kind: str, place: str, stream: bool) -> tuple[Rows, str | None]:
    """The rows of `place`, and the column that it names: PATH[:COLUMN] or NAME[:COLUMN].

    kind: hub, or a key of READERS. stream: rows of the Hub come as they are read, instead of from
    a whole download.
    """
    column = None
    if not Path(place).exists() and not glob(place, recursive=True) and ":" in place:
        place, _, column = place.rpartition(":")
    return Hub(place, stream) if kind == "hub" else Files(kind, place), column


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """ValueError where the system does not let the file be read in here."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from None


class Files:
    """One file, or those of a pattern such as books/*.jsonl in the order of their names."""

    def __init__(self, kind: str, place: str):
        self.kind, self.read = kind, READERS[kind]
        path = Path(place)
        if path.is_dir():
            # All of its files would be the test split too, if there is one.
            raise ValueError(
                f"{kind}:{place} is a folder; say hub:{place}, which knows its splits by their "
                f"names, or give a pattern such as {kind}:{place}/train*"
            )
        found = [path] if path.is_file() else sorted(map(Path, glob(place, recursive=True)))
        self.paths = [path for path in found if path.is_file()]  # ** finds folders, too
        if not self.paths:
            raise ValueError(f"there is no file {place}")

    @cached_property
    def identity(self) -> Any:
        stats = []
        for path in self.paths:
            with _reading(path):
                stats.append((path, path.stat()))
        return [self.kind, [[str(p.resolve()), s.st_size, s.st_mtime_ns] for p, s in stats]]

    def train(self) -> Iterator[Row]:
        for path in self.paths:
            with _reading(path):
                yield from self.read(path)

    def validation(self) -> Iterator[Row]:
        return iter(())

    def total(self) -> int | None:
        if self.kind == "text":
            return len(self.paths)
        try:
            return sum(map(_lines, self.paths)) if self.kind == "jsonl" else None
        except OSError:
            return None  # reading the rows will say it


def _lines(path: Path) -> int:
    with open(path, "rb") as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))


def _read_jsonl(path: Path) -> Iterator[Row]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path} line {number}"
            try:
                values = json.loads(line.decode("utf-8-sig"))  # a byte-order mark may come first
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{where} is not UTF-8: byte {error.start} of it cannot be read"
                ) from None
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{where} is not JSON: {error.msg} at character {error.colno}"
                ) from None
            except (ValueError, RecursionError) as error:  # a number too long, lists too deep
                raise ValueError(f"{where} cannot be read: {error}") from None
            if not isinstance(values, dict):
                raise ValueError(f"{where} is a {type(values).__name__}, not an object of columns")
            yield Row(where, values)


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow  # comes with datasets
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(1024):
                for values in batch.to_pylist():
                    number += 1
                    yield Row(f"{path} row {number}", values)
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        raise ValueError(
            f"{path} cannot be read as Parquet after row {number}: {first_line(error)}"
        ) from None


def _read_text(path: Path) -> Iterator[Row]:
    yield Row(str(path), {"text": read_text(path)})


def read_text(path: Path) -> str:
    """The text of a UTF-8 file; ValueError where there is none."""
    if not path.is_file():
        raise ValueError(f"there is no text file {path}")
    try:
        with _reading(path):
            text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: byte {error.start} cannot be read") from None
    if not text.strip():
        raise ValueError(f"{path} is empty; there is nothing to train on")
    return text


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    "jsonl": _read_jsonl,
    "parquet": _read_parquet,
    "text": _read_text,
}


class Hub:
    """A data set that `datasets` opens: OWNER/NAME of the Hub, OWNER/NAME/CONFIG, or a folder."""

    def __init__(self, place: str, stream: bool):
        import datasets

        self.place, self.stream = place, stream
        path, config = place, None
        if not Path(place).exists() and place.count("/") == 2:
            path, _, config = place.rpartition("/")
        self.builder = self._try(lambda: datasets.load_dataset_builder(path, config))

    def _try(self, load: Callable[[], Any]) -> Any:
        try:
            return load()
        except Exception as error:  # of dozens of kinds, from every library below
            why = first_line(error.__cause__ or error)
            raise ValueError(f"datasets cannot load {self.place!r}: {why}") from None

    @cached_property
    def identity(self) -> Any:
        # The files with their revision, ETag or time, as `datasets` keys its own cache.
        files = self.builder.config.data_files or {}
        origins = {str(k): [list(v), getattr(v, "origin_metadata", "")] for k, v in files.items()}
        name = self.builder.config.name
        return json.loads(json.dumps(["hub", self.place, name, self.builder.hash, origins]))

    @cached_property
    def splits(self) -> dict[str, Any]:
        if self.stream:
            splits = self._try(self.builder.as_streaming_dataset)
        else:
            self._try(self.builder.download_and_prepare)
            splits = self._try(self.builder.as_dataset)
        if "train" not in splits:
            raise ValueError(
                f"{self.place} has no train split; it has {', '.join(map(str, splits))}"
            )
        return dict(splits)

    def train(self) -> Iterator[Row]:
        return self._rows("train")

    def validation(self) -> Iterator[Row]:
        name = next((name for name in HELD_OUT if name in self.splits), None)
        return self._rows(name) if name else iter(())

    def _rows(self, split: str) -> Iterator[Row]:
        rows, number = iter(self.splits[split]), 0
        while (values := self._try(lambda: next(rows, None))) is not None:
            number += 1
            yield Row(f"{self.place} {split} row {number}", values)

    def total(self) -> int | None:
        return None if self.stream else len(self.splits["train"])
