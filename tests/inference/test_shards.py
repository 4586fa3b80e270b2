"""Processes that share a sweep leave what one process leaves."""

import os
import shutil
import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch.distributed as dist

from ponder.inference.config import SweepConfig
from ponder.inference.shards import Shard, joined
from ponder.inference.sweep import sweep

from .test_sweep import samples

# Runs its commands one after the other and says the exit status of each. In the last one the second
# process is gone in the middle of its work, as if it had been killed.
SCRIPT = """
import os, sys
from ponder.cli import run
from ponder.inference import sweep as module

class Killed(module.Store):
    def add(self, records):
        super().add(records)
        if len(self) >= 10:
            os._exit(9)

module.KEEP_EVERY_SECONDS = 0
module.write_report = lambda *_, **__: None  # tested elsewhere
rank = os.environ["RANK"]
for words in sys.argv[1:]:
    if words == sys.argv[-1] and rank == "1":
        module.Store = Killed
    try:
        status = run(words.split())
    except SystemExit as error:
        status = error.code
    print("rank", rank, "status", status, flush=True)
"""


def two(*commands: str) -> subprocess.CompletedProcess:
    """What torchrun says that lets two processes run the commands together."""
    script = Path(commands[0].split()[4]).parent / "script.py"
    script.write_text(SCRIPT)
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    return subprocess.run(
        [sys.executable, *words, *commands],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )


@pytest.fixture(scope="module")
def alone(model, tmp_path_factory) -> SweepConfig:
    """A sweep by one process, finished."""
    config = SweepConfig(
        model=str(model),
        out=tmp_path_factory.mktemp("alone"),
        samples=(3,),
        budgets=(0, 2),
        problems=7,
        slots=8,
        precision="fp32",
    )
    sweep(config)
    return config


def command(config: SweepConfig, out: Path) -> str:
    return (
        f"sweep --model {config.model} --out {out} --samples 3 --budgets 0 2 --problems 7 "
        "--slots 8 --precision fp32"
    )


def shards(out: Path) -> list[str]:
    return [path.name for path in (out / "sweep").glob("samples-*")]


def test_processes_share_a_sweep_and_one_that_is_killed_loses_nothing(alone, tmp_path):
    shared, killed = tmp_path / "shared", tmp_path / "killed"
    words = command(alone, shared)
    fewer = words.replace("--samples 3 --budgets 0 2", "--samples 1 --budgets 0")
    said = two(fewer, f"{words} --resume", words, command(alone, killed))
    lines = said.stdout.splitlines()
    assert said.returncode == 1
    for rank in range(2):
        statuses = [line for line in lines if line.startswith(f"rank {rank} ")]
        ends = [0, 0, 2, 130][: 4 - rank]  # torchrun interrupts the first when the second is gone
        assert statuses == [f"rank {rank} status {end}" for end in ends], said.stderr[-3000:]
    assert lines.count(f"report: {shared / 'report' / 'index.html'}") == 2

    # What two processes leave is what one leaves, to the last bit.
    assert samples(shared) == samples(alone.out)
    assert not shards(shared)
    # One of them says what was wrong with the third command.
    assert said.stderr.count("holds this sweep run already; say --resume") == 1

    kept = {}
    for rank in range(2):
        with sqlite3.connect(killed / "sweep" / f"samples-{rank}.sqlite") as db:
            kept[rank] = db.execute("SELECT problem FROM sample").fetchall()
    assert 10 <= len(kept[1]) < 3 * 3 * 4
    assert all(problem % 2 == rank for rank, rows in kept.items() for (problem,) in rows)
    copy = shutil.copy(
        killed / "sweep" / "samples-1.sqlite", killed / "sweep" / "samples-old.sqlite"
    )
    sweep(replace(alone, out=killed, resume=True))  # by one process now
    assert samples(killed) == samples(alone.out)
    assert shards(killed) == [copy.name]


def pair() -> list[Shard]:
    """Two processes' shards, that share a store, in one process."""
    shared = dist.HashStore()
    return [Shard(rank, 2, shared) for rank in range(2)]


def test_a_process_that_left_is_not_waited_for():
    first, second = pair()
    second.leave()
    with pytest.raises(ValueError, match="process 1 of this sweep has ended; .* say --resume"):
        first.gathered({})


def test_what_the_first_decides_holds_for_all():
    first, second = pair()
    assert first.agreed(lambda: {"precision": "fp32"}) == {"precision": "fp32"}
    assert second.agreed(lambda: pytest.fail("it is not asked")) == {"precision": "fp32"}
    with pytest.raises(ValueError, match="no such folder"):
        first.agreed(lambda: int("no such folder"))
    with pytest.raises(SystemExit) as end:
        second.agreed(lambda: pytest.fail("it is not asked"))
    assert end.value.code == 2
    with ThreadPoolExecutor() as pool:
        values = list(pool.map(lambda shard: shard.gathered({"late": shard.rank}), pair()))
    assert values == [[{"late": 0}, {"late": 1}]] * 2


@pytest.mark.parametrize("size", ["x", "0", ""])
def test_a_world_of_no_size_is_named(monkeypatch, size):
    monkeypatch.setenv("WORLD_SIZE", size)
    with pytest.raises(ValueError, match=f"WORLD_SIZE is '{size}'; a launcher sets it"):
        with joined():
            pass


@pytest.mark.parametrize("count", [1, 2, 3, 9])
def test_every_problem_is_one_process_s(count):
    parts = [Shard(rank, count).problems(7) for rank in range(count)]
    assert sorted(i for part in parts for i in part) == list(range(7))
