"""Runs that are killed, at random and in the midst of a save, and go on as if nothing had been."""

import json
import os
import random
import re
import signal
import time

import pytest
import torch

from ponder.models import hub
from ponder.training.checkpoint import Checkpoints
from ponder.training.journal import read_rows

from . import children

TIMES = ("seconds", "tokens_per_second", "mfu")

# A text mixed with documents, and documents alone, several times through: plain, and accumulated,
# averaged and saved at other steps than logged.
RUNS = {
    "plain": "--log-every 1 --save-every 2 --eval-every 0 --data text:{poem} jsonl:{sums}",
    "accumulated": "--log-every 2 --save-every 3 --eval-every 4 --accumulation 2 "
    "--optimizer adamw --ema 0.9 --weight-decay 0.1 --data jsonl:{sums}",
}


def words(name, out):
    # A wide MLP: writing its checkpoint takes long enough to be killed in.
    command = f"train tiny {RUNS[name]} --steps 8 --n-inner 3072 --precision fp32 --resume"
    files = {"poem": poem(out.parent), "sums": sums(out.parent)}
    return f"{command.format(**files)} --out {out}".split()


def sums(folder):
    """Questions with worked answers, in 12 packed rows or so: half a batch is new in each epoch."""
    file = folder / "sums.jsonl"
    lines = []
    for i in range(30):
        solution = f"{i} and {i} are <<{i}+{i}={2 * i}>>{2 * i}\n#### {2 * i}"
        lines.append(json.dumps({"question": f"{i}+{i}?", "answer": solution}) + "\n")
    file.write_text("".join(lines))
    return file


def poem(folder):
    file = folder / "poem.txt"
    draw = random.Random(0)
    file.write_text("".join(draw.choice("abcdefgh \n") for _ in range(700)))
    return file


def rows(out):
    found = read_rows(out / "train" / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k not in TIMES} for row in found]


@pytest.fixture(scope="module", params=RUNS)
def whole(request, tmp_path_factory):
    """A run that nobody stopped: its name and folder."""
    folder = tmp_path_factory.mktemp(request.param)
    process = children.start(words(request.param, folder / "whole"), log=folder / "whole.log")
    process.join(120)
    said = (folder / "whole.log").read_text()
    assert process.exitcode == 0, said
    rows = int(re.search(r"sums.jsonl: .* (\d+) rows", said)[1])
    assert rows <= 8 * 8 / 2 / 2, "not twice through the documents"
    return request.param, folder


def die_when(process, condition, log, late=0.0):
    """SIGKILL as soon as the condition holds, or `late` seconds after; whether it still ran."""
    deadline = time.monotonic() + 60
    while process.is_alive() and not condition():
        assert time.monotonic() < deadline, log.read_text()
    time.sleep(late)
    alive = process.is_alive()
    process.kill()
    process.join()
    return alive


def test_a_run_killed_at_any_moment_ends_as_one_that_was_not(whole):
    name, folder = whole
    out, log = folder / "killed", folder / "killed.log"
    saves, draw = out / "train" / "checkpoints", random.Random(name)

    def unfinished_save():
        return any(saves.glob(".saving-*"))

    killed = torn = 0
    for moment in ("row", "save", "save", "save", "row", "end"):
        if moment == "save" and torn:
            continue
        seen = len(rows(out))
        process = children.start(words(name, out), log=log)
        if moment == "row":  # after a row or more, or some time later
            more, late = draw.randint(1, 2), draw.random() * 0.1
            killed += die_when(process, lambda n=seen + more: len(rows(out)) >= n, log, late)
        elif moment == "end":
            process.join(60)
        else:
            killed += die_when(process, unfinished_save, log)
        torn += unfinished_save()
    assert process.exitcode == 0, log.read_text()
    assert killed >= 2 and torn >= 1, (killed, torn, log.read_text())
    assert rows(out) == rows(folder / "whole")
    for file in ("model.safetensors", "train/samples.jsonl"):
        assert (out / file).read_bytes() == (folder / "whole" / file).read_bytes(), file
    states = []
    for path in (saves, folder / "whole" / "train" / "checkpoints"):
        checkpoints = Checkpoints(path)
        assert len(checkpoints.steps()) == 2 and not list(path.glob(".*"))
        states.append(checkpoints.load(checkpoints.newest()))
    compare(*states)


def compare(a, b, path="state"):
    """Equal to the bit, but for the seconds."""
    a, b = (list(x) if isinstance(x, tuple) else x for x in (a, b))  # loading makes lists
    assert type(a) is type(b), path
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a.keys() - {"seconds"}:
            compare(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    elif isinstance(a, list):
        for i, pair in enumerate(zip(a, b, strict=True)):
            compare(*pair, f"{path}.{i}")
    else:
        assert a == b, path


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_ends_cleanly(tmp_path, number):
    log, out = tmp_path / "log", tmp_path / "run"
    command = f"train tiny --steps 40 --log-every 4 --eval-every 0 --save-every 0 --out {out} "
    command += f"--precision fp32 --resume --data text:{poem(tmp_path)}"
    process = children.start(command.split(), log=log)
    deadline = time.monotonic() + 60
    while not rows(out):
        assert process.is_alive() and time.monotonic() < deadline, log.read_text()
    os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode == 0, log.read_text()
    assert "stopped after step" in log.read_text()
    checkpoints = Checkpoints(out / "train" / "checkpoints")
    assert 4 <= checkpoints.load(checkpoints.newest())["step"] < 40
    assert hub.load(out).config.n_layer == 2
    # Stopped between two rows, it still gives the rows of a run that went through.
    process = children.start(command.split(), command.replace(str(out), f"{out}2").split(), log=log)
    process.join(60)
    assert process.exitcode == 0, log.read_text()
    assert rows(out) == rows(tmp_path / "run2")
