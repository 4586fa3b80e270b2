"""Real processes that run `ponder`, forked from a server that has imported torch once.

Started anew, each would spend four seconds on imports. They can be killed like any other.
"""

import multiprocessing
import random
import socket
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["ponder.training.loop"])

SOURCE = """
import os, sys, torch
os.environ.update(environment)
with open(log, "a", buffering=1) as out:
    os.dup2(out.fileno(), 1)
    os.dup2(out.fileno(), 2)
sys.stdout.reconfigure(line_buffering=True)
torch.set_num_threads(1)
from ponder import cli
for words in commands:
    while "=" in words[0]:  # as in a shell: NAME=value before the command
        name, _, value = words.pop(0).partition("=")
        os.environ[name] = value
    code = cli.run(words)
    if code:
        sys.exit(code)
"""


def start(
    *commands: list[str], log: Path, environment: dict[str, str] | None = None
) -> BaseProcess:
    """A process that runs `ponder` with each of these words, one after another, until one fails.

    Words NAME=value in front set the environment from then on.
    What it prints goes to the file `log`.
    """
    names = dict(commands=commands, log=str(log), environment=environment or {})
    process = CONTEXT.Process(target=exec, args=(SOURCE, names))
    process.start()
    return process


def _free_port() -> int:
    """A port that nobody has, below those that systems hand out (from 32768 on): one of those
    could go to another test's server before our processes come to it."""
    while True:
        port = random.SystemRandom().randrange(20_000, 30_000)
        with socket.socket() as free:
            if free.connect_ex(("127.0.0.1", port)):
                return port


def run(*commands: list[str], ranks: int, folder: Path, timeout: float = 200.0) -> list[str]:
    """The commands on `ranks` processes that know each other; what each of them printed."""
    port = _free_port()
    processes, logs = [], [folder / f"{ranks}_{rank}.log" for rank in range(ranks)]
    for rank, log in enumerate(logs):
        environment = dict(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(ranks),
            LOCAL_WORLD_SIZE=str(ranks),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
            OMP_NUM_THREADS="1",
        )
        processes.append(start(*commands, log=log, environment=environment))
    deadline = time.monotonic() + timeout
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    printed = [log.read_text() for log in logs]
    late = [process for process in processes if process.exitcode is None]
    for process in late:
        process.kill()
    assert not late, printed
    failed = {process.exitcode for process in processes} - {0}
    assert not failed, "\n".join(printed)
    return printed
