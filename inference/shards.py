"""One sweep in several processes: each takes every n-th problem and keeps its samples in a store of
its own; the first process merges them.

The processes meet three times: at the start, so that all know what the first one decided, and at
the end, before and after it merges. Between those they share nothing, so none waits for another.
They meet in the launcher's key-value store: a process group would do it too, but leaves threads
behind that now and then abort a process at its exit (PyTorch 2.13, gloo).
"""

import itertools
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from .store import Store

T = TypeVar("T")
LOOK_EVERY_SECONDS = 0.1
sweeps = itertools.count()  # of this process: what one of them shared is not the next one's
FAREWELL_SECONDS = 20.0  # that the first process, which may host what they share, waits for others


@dataclass
class Shard:
    """This process's part: number `rank` of `count`. What is exchanged is JSON."""

    rank: int
    count: int
    shared: Any = None  # torch.distributed's key-value store
    meetings: int = field(default=0, init=False)

    @property
    def first(self) -> bool:
        return self.rank == 0

    def problems(self, total: int) -> range:
        return range(self.rank, total, self.count)

    def store(self, folder: Path) -> Path:
        """Where this process keeps its samples."""
        return folder / ("samples.sqlite" if self.count == 1 else f"samples-{self.rank}.sqlite")

    def agreed(
        self, decide: Callable[[], T], tell: Callable[[T], Any] = lambda value: value
    ) -> Any:
        """What `decide` returns in the first process, and in the others what `tell` makes of it;
        its ValueError ends them all."""
        self.meetings += 1
        if not self.first:
            decided, value = self._read(0)
            if not decided:
                raise SystemExit(2)  # the first process tells why
            return value
        try:
            value = decide()
        except ValueError:
            self._write([False, None])
            raise
        self._write([True, tell(value)])
        return value

    def gathered(self, value: Any) -> list[Any]:
        """The value of every process, by rank."""
        self.meetings += 1
        self._write(value)
        return [value if r == self.rank else self._read(r) for r in range(self.count)]

    def _write(self, value: Any) -> None:
        if self.shared is not None:
            self.shared.set(f"{self.meetings}/{self.rank}", json.dumps(value))

    def _read(self, rank: int) -> Any:
        """What the process of that rank wrote for this meeting, once it did."""
        key = f"{self.meetings}/{rank}"
        while not self._has(key):
            if self._has(f"left/{rank}") and not self._has(key):
                raise ValueError(
                    f"process {rank} of this sweep has ended; what was finished is kept: say "
                    "--resume"
                )
            time.sleep(LOOK_EVERY_SECONDS)
        return json.loads(self.shared.get(key))

    def _has(self, key: str) -> bool:
        try:
            return self.shared.check([key])
        except RuntimeError:  # the connection is closed
            raise ValueError(
                "the first process of this sweep has ended; what was finished is kept: say --resume"
            ) from None

    def leave(self, patience: float = FAREWELL_SECONDS) -> None:
        """Tell the others; the first process goes last, after so many seconds at most."""
        if self.shared is None:
            return
        try:
            self.shared.set(f"left/{self.rank}", "")
            deadline = time.monotonic() + patience * self.first
            others = [f"left/{rank}" for rank in range(1, self.count)]
            while time.monotonic() < deadline and not self.shared.check(others):
                time.sleep(LOOK_EVERY_SECONDS)
        except RuntimeError:  # nobody is there
            pass


@contextmanager
def joined() -> Iterator[Shard]:
    """This process's shard, as torchrun and accelerate launch tell it in the environment."""
    size = os.environ.get("WORLD_SIZE", "1")
    count = int(size) if size.isdecimal() else 0
    if count < 1:
        raise ValueError(f"WORLD_SIZE is {size!r}; a launcher sets it to the number of processes")
    if count == 1:
        yield Shard(0, 1)
        return
    # A process may be late by the loading of a model, or by a slow machine.
    shared, rank, count = next(iter(rendezvous("env://", timeout=timedelta(minutes=10))))
    prefixed = dist.PrefixStore(f"ponder/sweep {next(sweeps)}", shared)  # type: ignore
    shard = Shard(rank, count, prefixed)
    patience = FAREWELL_SECONDS
    try:
        yield shard
    except KeyboardInterrupt:
        patience = 0.0  # the others were told to end as well, or one is dead
        raise
    finally:
        shard.leave(patience)


def merge(folder: Path, store: Store) -> None:
    """Move the samples of every shard's store in the folder into `store`.

    A shard's file goes when its samples are safely in; those of a run that was killed, by however
    many processes, are merged when it goes on. Other files, as a user's copy, are left alone.
    """
    for path in sorted(folder.glob("samples-*.sqlite")):
        if not path.stem.removeprefix("samples-").isdecimal():
            continue
        store.merge(path)
        for name in (path.name, f"{path.name}-wal", f"{path.name}-shm"):
            (folder / name).unlink(missing_ok=True)
