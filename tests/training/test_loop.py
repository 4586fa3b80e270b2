import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

from ponder.models import GPT, hub
from ponder.training import preset
from ponder.training.checkpoint import load_checkpoint
from ponder.training.loop import Diverged, train
from ponder.training.optimizer import build_optimizer


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    torch.set_num_threads(1)
    return preset(
        "tiny", steps=6, log_every=1, save_every=2, eval_every=3, precision="fp32"
    ), tmp_path_factory


def metrics(out):
    lines = (out / "train" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def losses(out):
    return [(row["step"], row["train_loss"], row["val_loss"]) for row in metrics(out)]


@pytest.fixture(scope="module")
def whole(config):
    config, folder = config
    out = folder.mktemp("whole")
    train(replace(config, out=out))
    return out


def test_a_run_leaves_model_metrics_and_provenance(whole):
    rows = metrics(whole)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    columns = "step tokens seconds train_loss val_loss lr grad_norm tokens_per_second mfu"
    assert list(rows[0]) == columns.split()
    assert [row["val_loss"] is not None for row in rows] == [False, False, True] * 2
    run = json.loads((whole / "run.json").read_text())["train"]
    assert run["configuration"]["steps"] == 6 and run["seed"] == 0
    assert run["versions"]["torch"] == torch.__version__
    model = hub.load(whole)
    assert isinstance(model, GPT)
    saved = load_checkpoint(whole / "train" / "checkpoint.pt")["model"]
    for name, value in model.state_dict().items():
        assert torch.equal(value, saved[name]), name


def test_training_learns(config):
    config, folder = config
    out = folder.mktemp("learns")
    train(replace(config, out=out, steps=120, batch_size=16, save_every=0, eval_every=0))
    rows = metrics(out)
    assert rows[-1]["val_loss"] < 2.0 < rows[0]["train_loss"]


class Killed(Exception):
    pass


def test_resume_gives_the_same_losses_and_weights(config, whole, monkeypatch):
    config, folder = config
    out = folder.mktemp("resumed")
    from ponder.training import loop

    update = loop._Run._update

    def dies_at_five(self, batch):
        if self.step == 5:
            raise Killed
        return update(self, batch)

    monkeypatch.setattr(loop._Run, "_update", dies_at_five)
    with pytest.raises(Killed):
        train(replace(config, out=out))
    monkeypatch.setattr(loop._Run, "_update", update)
    with pytest.raises(ValueError, match="say --resume"):
        train(replace(config, out=out))
    with pytest.raises(ValueError, match="another train run, with seed 0"):
        train(replace(config, out=out, seed=1, resume=True))
    train(replace(config, out=out, resume=True))
    assert losses(out) == losses(whole)
    ours = load_checkpoint(out / "train" / "checkpoint.pt")["model"]
    theirs = load_checkpoint(whole / "train" / "checkpoint.pt")["model"]
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_accumulation_gives_the_same_update(config):
    # SGD, as Muon's bf16 iteration and Adam's division both amplify roundings.
    config, folder = config
    runs = []
    for parts in (1, 4):
        out = folder.mktemp(f"accumulated{parts}")
        train(replace(config, out=out, accumulation=parts, optimizer="sgd", lr=0.05))
        runs.append(losses(out))
    for (_, a, _), (_, b, _) in zip(*runs, strict=True):
        assert a == pytest.approx(b, rel=1e-5)


def test_a_loss_that_is_not_finite_names_its_step_and_keeps_the_checkpoint(config, monkeypatch):
    config, folder = config
    out = folder.mktemp("diverged")
    from ponder.training import loop

    update = loop._Run._update

    def poisoned(self, batch):
        if self.step == 4:
            with torch.no_grad():
                self.raw.norm.weight.fill_(float("nan"))
        return update(self, batch)

    monkeypatch.setattr(loop._Run, "_update", poisoned)
    with pytest.raises(Diverged, match="step 5 is not finite; the last good checkpoint is kept"):
        train(replace(config, out=out))
    state = load_checkpoint(out / "train" / "checkpoint.pt")
    assert state["step"] == 4
    assert all(torch.isfinite(value).all() for value in state["model"].values())


def test_a_truncated_checkpoint_is_named(config, whole, tmp_path):
    config, _ = config
    import shutil

    shutil.copytree(whole, tmp_path / "run")
    path = tmp_path / "run" / "train" / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"checkpoint\.pt cannot be read"):
        train(replace(config, out=tmp_path / "run", resume=True))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_ends_cleanly(tmp_path, number):
    words = f"train tiny --steps 100000 --log-every 1 --out {tmp_path} --precision fp32"
    process = subprocess.Popen(
        [sys.executable, "-m", "ponder", *words.split()],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    log = tmp_path / "train" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and log.read_text().count("\n") > 2):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1]
        time.sleep(0.1)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "stopped after step" in out
    state = load_checkpoint(tmp_path / "train" / "checkpoint.pt")
    assert 2 < state["step"] < 100000
    assert hub.load(tmp_path).config.n_layer == 2


@pytest.mark.parametrize("name", ["muon", "adamw", "sgd"])
def test_optimizers_hold_and_move_every_parameter(name):
    config = preset("tiny", optimizer=name, weight_decay=0.1)
    from ponder.training.loop import model_config

    torch.manual_seed(0)
    model = GPT(model_config(config, 16))
    optimizer = build_optimizer(model, config)
    for _ in range(2):  # output projections start at zero: the first step reaches only them
        tokens = torch.randint(16, (2, 9))
        model(tokens[:, :-1], tokens[:, 1:]).backward()
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        optimizer.step()
        optimizer.zero_grad()
    still = [n for n, p in model.named_parameters() if torch.equal(p, before[n])]
    assert not still


def test_two_optimizers_under_one_scaler_unscale_once():
    # A gradient scaler that stepped Muon and AdamW one by one would unscale the second twice.
    config = preset("tiny")
    from ponder.training.loop import model_config

    def step(scale):
        torch.manual_seed(0)
        model = GPT(model_config(config, 16))
        optimizer = build_optimizer(model, config)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        tokens = torch.randint(16, (2, 9))
        scaler.scale(model(tokens[:, :-1], tokens[:, 1:])).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        return model

    for (name, a), b in zip(step(1.0).named_parameters(), step(1024.0).parameters(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


def test_compiling_without_a_compiler_is_told_at_once(config, monkeypatch):
    config, folder = config
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match="compile needs a C.. compiler and .* say --no-compile"):
        train(replace(config, out=folder.mktemp("compiled"), compile=True))


def test_a_resumed_run_keeps_the_precision_that_was_measured(config, monkeypatch):
    config, folder = config
    out = folder.mktemp("measured")
    measured = iter(["bf16", "fp32"])
    monkeypatch.setattr("ponder.training.loop.choose_precision", lambda *_: next(measured))
    config = replace(config, out=out, precision="auto")
    train(config)
    checkpoint = out / "train" / "checkpoint.pt"
    assert load_checkpoint(checkpoint)["precision"] == "bf16"
    train(replace(config, resume=True))
    assert load_checkpoint(checkpoint)["precision"] == "bf16"
    assert next(measured) == "fp32"  # nobody asked again
