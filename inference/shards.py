"""One sweep in several processes: each takes every n-th problem and keeps its samples in a store of
its own; the first process merges them.

The processes meet three times: at the start, so that all know what the first one decided, and at
the end, before and after it merges. Between those they share nothing, so none waits for another.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from .chat import first_line
from .store import Store

PATIENCE = timedelta(days=7)  # a shard may take longer than another; one that died is noticed


@dataclass(frozen=True)
class Shard:
    """This process's part: number `rank` of `count`."""

    rank: int
    count: int

    @property
    def first(self) -> bool:
        return self.rank == 0

    def problems(self, total: int) -> range:
        return range(self.rank, total, self.count)

    def store(self, folder: Path) -> Path:
        """Where this process keeps its samples."""
        return folder / ("samples.sqlite" if self.count == 1 else f"samples-{self.rank}.sqlite")

    def agreed(self, decide: Callable[[], Any]) -> Any:
        """What `decide` returns, in the first process; its ValueError ends them all."""
        if self.count == 1:
            return decide()
        outcome: list[Any] = [None, None]
        if self.first:
            try:
                outcome[0] = decide()
            except ValueError as error:
                outcome[1] = error
        self._met(lambda: dist.broadcast_object_list(outcome, src=0))
        if outcome[1] is not None:
            raise outcome[1] if self.first else SystemExit(2)  # one process tells it
        return outcome[0]

    def gathered(self, value: Any) -> list[Any]:
        """The value of every process, by rank."""
        values = [value] * self.count
        if self.count > 1:
            self._met(lambda: dist.all_gather_object(values, value))
        return values

    def _met(self, meet: Callable[[], None]) -> None:
        try:
            meet()
        except RuntimeError as error:  # what gloo says of a connection that was closed
            raise ValueError(
                f"another process of this sweep has ended ({first_line(error)}); what was finished "
                "is kept: say --resume"
            ) from None


@contextmanager
def joined() -> Iterator[Shard]:
    """This process's shard, as torchrun and accelerate launch tell it in the environment."""
    count = int(os.environ.get("WORLD_SIZE", 1))
    if count == 1:
        yield Shard(0, 1)
        return
    rank = int(os.environ["RANK"])
    ours = not dist.is_initialized()  # the training before it, in one command, may have
    if ours:
        dist.init_process_group("gloo", timeout=PATIENCE, rank=rank, world_size=count)
    try:
        yield Shard(rank, count)
    finally:
        if ours:
            dist.destroy_process_group()


def merge(folder: Path, store: Store) -> None:
    """Move the samples of every shard's store in the folder into `store`.

    A shard's file goes when its samples are safely in; those of a run that was killed, by however
    many processes, are merged when it goes on.
    """
    for path in sorted(folder.glob("samples-*.sqlite")):
        store.merge(path)
        for name in (path.name, f"{path.name}-wal", f"{path.name}-shm"):
            (folder / name).unlink(missing_ok=True)
