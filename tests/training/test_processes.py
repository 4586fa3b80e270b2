"""Several processes train the run that one process trains: the same rows, the same losses."""

import json
import subprocess
import sys

import pytest
from safetensors.torch import load_file

from ponder.training import preset
from ponder.training.loop import train


def metrics(out) -> list[dict]:
    return [json.loads(s) for s in (out / "train" / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_two_processes_train_what_one_trains(tmp_path, accumulation):
    # SGD, as its update is linear in the gradient. (Muon's is computed in bf16 and Adam's first one
    # is a sign: a rounding of the sum over processes would not stay one.)
    settings = dict(precision="fp32", steps=6, log_every=1, eval_every=3, optimizer="sgd", lr=0.3)
    settings["accumulation"] = accumulation
    train(preset("tiny", out=tmp_path / "one", **settings))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "ponder", "train", "tiny", "--out", str(tmp_path / "two")]
    command += [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.count("2 process(es)") == 1
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert [row["step"] for row in two] == [1, 2, 3, 4, 5, 6]
    # Rows differ in their number of targets, so a mean of the processes' means would not agree.
    for a, b in zip(one, two, strict=True):
        assert b["tokens"] == a["tokens"]
        assert b["train_loss"] == pytest.approx(a["train_loss"], rel=1e-5)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-4)
        assert (b["val_loss"] is None) == (a["val_loss"] is None)
        if a["val_loss"] is not None:
            assert b["val_loss"] == pytest.approx(a["val_loss"], rel=1e-5)
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("one", "two")]
    for name, weight in weights[0].items():
        assert (weights[1][name] - weight).abs().max() <= 1e-6 + 1e-4 * weight.abs().max(), name
