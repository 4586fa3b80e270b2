"""Processes that share a sweep leave what one process leaves."""

import os
import socket
import sqlite3
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from ponder.inference.config import SweepConfig
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
module.write_report = lambda folder, *_, **__: folder / "index.html"  # tested elsewhere
for port, words in zip(sys.argv[1].split(), sys.argv[2:]):
    os.environ["MASTER_PORT"] = port
    if words == sys.argv[-1] and os.environ["RANK"] == "1":
        module.Store = Killed
    try:
        status = run(words.split())
    except SystemExit as error:
        status = error.code
    print("status", status, flush=True)
"""


def free_ports(count: int) -> str:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [str(s.getsockname()[1]) for s in sockets]
    for s in sockets:
        s.close()
    return " ".join(ports)


def two(*commands: str) -> list[tuple[int, str, str]]:
    """Exit status, stdout and stderr of the two processes that run the commands together."""
    ports = free_ports(len(commands))
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, ports, *commands],
            env=os.environ
            | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
            | {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=200) for process in processes]
    return [(p.returncode, *output) for p, output in zip(processes, outputs, strict=True)]


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
    first, second = two(words, words, command(alone, killed))
    page = str(shared / "report" / "index.html")
    assert first[1].split() == ["report:", page, "status", "0", "status", "2", "status", "2"]
    assert second[1].split() == ["status", "0", "status", "2"] and second[0] == 9

    # What two processes leave is what one leaves, to the last bit.
    assert samples(shared) == samples(alone.out)
    assert not shards(shared)
    # One of them says what was wrong with the second command.
    assert first[2].count("holds this sweep run already; say --resume") == 1
    assert "ponder: " not in second[2]

    assert "another process of this sweep has ended" in first[2]
    kept = {}
    for rank in range(2):
        with sqlite3.connect(killed / "sweep" / f"samples-{rank}.sqlite") as db:
            kept[rank] = db.execute("SELECT problem FROM sample").fetchall()
    assert len(kept[0]) == 4 * 3 * 4 and 10 <= len(kept[1]) < 3 * 3 * 4
    assert all(problem % 2 == rank for rank, rows in kept.items() for (problem,) in rows)
    sweep(replace(alone, out=killed, resume=True))  # by one process now
    assert samples(killed) == samples(alone.out)
    assert not shards(killed)
