import json
import os
import random
import resource
import shutil
import signal
from dataclasses import replace
from importlib.metadata import version
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ponder.models import GPT, hub
from ponder.models.memory import training_memory
from ponder.provenance import alone_in, read_run
from ponder.training import TrainConfig, preset
from ponder.training.checkpoint import MANIFEST, STATE, Checkpoints
from ponder.training.journal import read_rows
from ponder.training.loop import Diverged, model_config, train
from ponder.training.processes import process_state


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    torch.set_num_threads(1)
    return preset(
        "tiny", steps=6, log_every=1, save_every=2, eval_every=3, precision="fp32"
    ), tmp_path_factory


def metrics(out):
    return read_rows(out / "train" / "metrics.jsonl")


def newest(out):
    """The state in the newest checkpoint."""
    checkpoints = Checkpoints(out / "train" / "checkpoints")
    return checkpoints.load(checkpoints.newest())


def losses(out):
    return [(row["step"], row["train_loss"], row["val_loss"]) for row in metrics(out)]


@pytest.fixture(scope="module")
def whole(config):
    config, folder = config
    out = folder.mktemp("whole")
    train(replace(config, out=out))
    return out


def test_what_cannot_fit_is_refused_before_the_folder_is_there(config, monkeypatch):
    config, folder = config
    config = replace(config, out=folder.mktemp("large") / "out")
    whole = training_memory(model_config(config, 24), rows=8, precision="fp32", triton=False)
    free = 0.7 * sum(whole.values())
    monkeypatch.setattr("ponder.training.memory.available", lambda device: free)
    with pytest.raises(ValueError, match=r"a training step needs .*; --accumulation \d+ would fit"):
        train(config)
    monkeypatch.setattr("ponder.training.memory.available", lambda device: 1000)
    with pytest.raises(ValueError, match="and there are 0.00; take a smaller model"):
        train(config)
    assert not config.out.exists()


def test_a_run_leaves_model_metrics_and_provenance(whole):
    rows = metrics(whole)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    columns = "step tokens seconds train_loss val_loss lr grad_norm tokens_per_second mfu"
    assert list(rows[0]) == columns.split()
    assert max(row["lr"] for row in rows) == preset("tiny").lr
    assert [row["val_loss"] is not None for row in rows] == [False, False, True] * 2
    samples = read_rows(whole / "train" / "samples.jsonl")
    assert [row["step"] for row in samples] == [3] * 4 + [6] * 4  # at each evaluation
    run = json.loads((whole / "run.json").read_text())["train"]
    assert run["configuration"]["steps"] == 6 and run["seed"] == 0
    assert run["versions"]["torch"] == version("torch")
    model = hub.load(whole)
    assert isinstance(model, GPT)
    saved = newest(whole)["model"]
    for name, value in model.state_dict().items():
        assert torch.equal(value, saved[name]), name


def test_a_step_draws_no_random_number(config, monkeypatch):
    # So that a checkpoint needs no random states.
    from ponder.training import loop

    config, folder = config
    states = []
    update = loop._Run._update

    def watched(self, batch):
        states.append((torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()))
        states[-1] += (random.getstate(),)
        return update(self, batch)

    monkeypatch.setattr(loop._Run, "_update", watched)
    train(replace(config, out=folder.mktemp("still")))
    assert len(states) == 6 and all(state == states[0] for state in states)


def test_a_parameter_without_a_gradient_is_named(config, monkeypatch):
    config, folder = config
    forward = GPT.forward

    def detached(self, *words, **options):
        self.layers[1].self_attn.q_norm.requires_grad_(False)
        return forward(self, *words, **options)

    monkeypatch.setattr(GPT, "forward", detached)
    with pytest.raises(AssertionError, match=r"no gradient reaches layers\.1\.self_attn\.q_norm"):
        train(replace(config, out=folder.mktemp("detached")))


def test_recomputing_changes_nothing(config, whole):
    config, folder = config
    out = folder.mktemp("recomputed")
    train(replace(config, out=out, recompute=True))
    assert losses(out) == losses(whole)


def test_more_processes_than_rows_is_told(config, monkeypatch, tmp_path):
    config, _ = config
    monkeypatch.setattr(process_state(), "num_processes", 16)
    with pytest.raises(ValueError, match="gives 8 rows, which 16 processes cannot share evenly"):
        train(replace(config, out=tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_folder_that_cannot_be_is_told(config, tmp_path):
    config, _ = config
    (tmp_path / "file").write_text("")
    with pytest.raises(
        ValueError, match="file cannot be written to: Not a directory; take another"
    ):
        train(replace(config, out=tmp_path / "file"))


def test_a_model_that_no_run_left_is_not_written_over(config, checkpoint, tmp_path):
    config, _ = config
    out = shutil.copytree(checkpoint, tmp_path / "out")
    before = (out / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="out holds a model that no run of ponder left; take"):
        train(replace(config, out=out, init=str(out)))
    assert (out / "model.safetensors").read_bytes() == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="of CPUs alone")
def test_half_precision_on_a_cpu_is_told(config, tmp_path):
    config, _ = config
    with pytest.raises(ValueError, match="precision is fp16, which needs a GPU; say bf16"):
        train(replace(config, out=tmp_path / "run", precision="fp16"))
    assert not (tmp_path / "run").exists()


def test_a_shape_that_cannot_be_is_told_before_data_are_read(config, tmp_path):
    config, _ = config
    config = replace(config, data="jsonl:nowhere", out=tmp_path / "run", n_head=3, n_kv_head=2)
    with pytest.raises(ValueError, match="n_head 3 is not a multiple of n_kv_head 2"):
        train(config)


def test_training_learns(config):
    config, folder = config
    out = folder.mktemp("learns")
    train(replace(config, out=out, steps=120, batch_size=16, save_every=0, eval_every=0))
    rows = metrics(out)
    assert rows[-1]["val_loss"] < 2.0 < rows[0]["train_loss"]


class Killed(Exception):
    pass


def train_up_to_five(config, monkeypatch):
    """A run that dies in its sixth step."""
    from ponder.training import loop

    update = loop._Run._update

    def dies_at_five(self, batch):
        if self.step == 5:
            raise Killed
        return update(self, batch)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(loop._Run, "_update", dies_at_five)
        train(config)


def test_a_gradient_scaler_goes_on_where_it_was(config, monkeypatch):
    # accelerate has one on GPUs alone; here it is given one that doubles after every second step.
    from ponder.training import loop

    config, folder = config
    build = loop.build_accelerator

    def scaled(*words, **options):
        accelerator = build(*words, **options)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)
        return accelerator

    monkeypatch.setattr(loop, "build_accelerator", scaled)
    straight = replace(config, out=folder.mktemp("scaled"), optimizer="sgd")
    train(straight)
    torn = replace(straight, out=folder.mktemp("torn"))
    train_up_to_five(torn, monkeypatch)
    assert newest(torn.out)["scaler"]["scale"] == 32
    train(replace(torn, resume=True))
    norms = [[row["grad_norm"] for row in metrics(c.out)] for c in (straight, torn)]
    assert norms[0] == norms[1] and losses(torn.out) == losses(straight.out)
    assert newest(torn.out)["scaler"] == newest(straight.out)["scaler"]


def test_resume_gives_the_same_losses_and_weights(config, whole, monkeypatch):
    config, folder = config
    out = folder.mktemp("resumed")
    train_up_to_five(replace(config, out=out), monkeypatch)
    with pytest.raises(ValueError, match="say --resume"):
        train(replace(config, out=out))
    with pytest.raises(ValueError, match="another train run, with seed 0"):
        train(replace(config, out=out, seed=1, resume=True))
    train(replace(config, out=out, resume=True))
    assert losses(out) == losses(whole)
    ours = newest(out)["model"]
    theirs = newest(whole)["model"]
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_row_tells_of_the_steps_since_the_one_before(config, whole, monkeypatch):
    """Mean loss, tokens and seconds of training, not of evaluating or saving; resumed, too."""
    from ponder.training import loop

    config, folder = config
    now, batches = [0.0], {}
    update, slow = loop._Run._update, {"_evaluate": 100, "_save": 1000}

    def a_second(self, batch):
        batches[self.step] = batch.targets
        now[0] += 1
        return update(self, batch)

    def slower(real, seconds):
        def run(self, *words):
            now[0] += seconds
            return real(self, *words)

        return run

    monkeypatch.setattr(loop.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(loop._Run, "_update", a_second)
    for name, seconds in slow.items():
        monkeypatch.setattr(loop._Run, name, slower(getattr(loop._Run, name), seconds))
    config = replace(config, out=folder.mktemp("rows"), log_every=4, eval_every=5)
    train_up_to_five(config, monkeypatch)
    assert newest(config.out)["seconds"] == 4
    train(replace(config, resume=True))
    rows = metrics(config.out)
    # A step is logged, too, where it is evaluated or saved.
    assert [row["step"] for row in rows] == [2, 4, 5, 6]
    single = [loss for _, loss, _ in losses(whole)]
    expected = [sum(single[:2]) / 2, sum(single[2:4]) / 2, single[4], single[5]]
    assert [row["train_loss"] for row in rows] == pytest.approx(expected, rel=1e-6)
    # A row's tokens end with its last target.
    filled = [sum(max(r.nonzero()) + 1 for r in batches[i] != loop.IGNORE).item() for i in range(6)]
    assert filled[0] < batches[0].numel()
    assert [row["tokens"] for row in rows] == [sum(filled[:n]) for n in (2, 4, 5, 6)]
    assert [row["seconds"] for row in rows] == [2, 4, 5, 6]
    speeds = [sum(filled[a:b]) / (b - a) for a, b in ((0, 2), (2, 4), (4, 5), (5, 6))]
    assert [row["tokens_per_second"] for row in rows] == pytest.approx(speeds, abs=0.06)
    assert [row["lr"] for row in rows] == [config.lr * config.rate(step) for step in (1, 3, 4, 5)]


def test_averaged_weights_are_what_is_evaluated_and_saved(config, monkeypatch):
    """By the definition, from the weights after each step; a resumed run goes on averaging."""
    from ponder.training import loop

    config, folder = config
    config = replace(config, out=folder.mktemp("averaged"), ema=0.2, samples=1)
    update, run = loop._Run._update, []
    write, writers = loop.write_samples, []
    weights: dict[int, dict[str, torch.Tensor]] = {}

    def watched(self, batch):
        run[:] = [self]
        if not self.step:
            weights[0] = {name: w.clone() for name, w in self.raw.state_dict().items()}
        found = update(self, batch)
        weights[self.step + 1] = {name: w.clone() for name, w in self.raw.state_dict().items()}
        return found

    def written(model, *words):
        writers.append({name: w.clone() for name, w in model.state_dict().items()})
        return write(model, *words)

    monkeypatch.setattr(loop, "write_samples", written)
    monkeypatch.setattr(loop._Run, "_update", watched)
    train_up_to_five(config, monkeypatch)
    train(replace(config, resume=True))
    average = {name: w.double() for name, w in weights[0].items()}
    for step in range(6):
        decay = min(0.2, (1 + step) / (10 + step))  # the second from step 1 on
        for name, w in weights[step + 1].items():
            average[name] = decay * average[name] + (1 - decay) * w.double()
    model, state = hub.load(config.out), newest(config.out)
    for name, w in model.state_dict().items():
        torch.testing.assert_close(w.double(), average[name], rtol=1e-5, atol=1e-7)
        assert torch.equal(state["average"][name], w) and torch.equal(writers[-1][name], w)
        assert torch.equal(state["model"][name], weights[6][name])
    sums = torch.zeros(2, dtype=torch.float64)
    with torch.no_grad():
        for tokens, targets, ids in run[0].data.validation():
            there = (targets != loop.IGNORE).sum()
            sums += torch.tensor([model(tokens, targets, ids, reduction="sum").item(), there])
    assert metrics(config.out)[-1]["val_loss"] == pytest.approx((sums[0] / sums[1]).item())


def test_how_often_a_run_logs_evaluates_and_saves_may_change(config, whole, monkeypatch):
    config, folder = config
    out = folder.mktemp("rhythm")
    train_up_to_five(replace(config, out=out), monkeypatch)
    train(replace(config, out=out, log_every=4, eval_every=1, save_every=5, resume=True))
    assert losses(out)[-1][0] == 6 and losses(out)[-1][2] == losses(whole)[-1][2]
    ours, theirs = newest(out)["model"], newest(whole)["model"]
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    # The rates depend on the number of steps.
    with pytest.raises(ValueError) as error:
        train(replace(config, out=out, steps=9, resume=True))
    assert str(error.value) == (
        f"{out} holds another train run, with steps 6 (now 9); take another --out; "
        f"--init {out} with another --out goes on from its weights"
    )


def test_a_model_that_ends_worse_than_guessing_is_told(config, capsys):
    config, folder = config
    train(replace(config, out=folder.mktemp("wild"), lr=1000, samples=0, steps=8, clip=0))
    [line] = [x for x in capsys.readouterr().out.splitlines() if x.startswith("warning")]
    assert "is not below that of guessing, ln 18 = 2.89: the training diverged" in line
    # Weights that overflow give logits of 0, whose loss is ln 18 as it was rounded.
    dead = dict(optimizer="sgd", lr=1e6, precision="fp32")
    train(replace(config, out=folder.mktemp("dead"), **dead, samples=0, steps=8))
    assert "is not below that of guessing" in capsys.readouterr().out
    train(replace(config, out=folder.mktemp("tame"), samples=0, steps=8))
    assert "warning" not in capsys.readouterr().out


def test_a_finished_run_whose_model_is_gone_gives_it_again(config, copied):
    config, _ = config
    file = copied / "model.safetensors"
    before = file.read_bytes()
    file.unlink()
    train(replace(config, out=copied, resume=True))
    assert file.read_bytes() == before


def test_a_batch_without_a_target_is_no_divergence(config, tmp_path):
    config, _ = config
    short = dict(data="task:countdown", verifier="process", context=24, batch_size=2)
    with pytest.raises(ValueError, match="nothing in the batch of step 1 is to be learned"):
        train(replace(config, out=tmp_path / "out", **short))


def test_what_launchers_repeat_does_not_interrupt(monkeypatch):
    # torchrun passes on to processes the SIGTERM of Slurm and the Ctrl-C that they have had too.
    from ponder.training import loop

    now = 100.0
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: now))
    with loop.Stop() as stop:
        assert not stop.asked
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            signal.raise_signal(number)
            assert stop.asked
        now += 10
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):  # a person who does not want to wait
            signal.raise_signal(signal.SIGINT)


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


def test_a_long_gradient_is_shortened_to_clip(config, monkeypatch):
    """SGD without decay moves the weights by lr times the gradient."""
    from ponder.training import loop

    config, folder = config
    update, moved = loop._Run._update, []

    def watched(self, batch):
        before = [p.detach().clone() for p in self.raw.parameters()]
        found = update(self, batch)
        change = [p.detach() - b for p, b in zip(self.raw.parameters(), before, strict=True)]
        moved.append(torch.cat([c.flatten() for c in change]).norm().item())
        return found

    monkeypatch.setattr(loop._Run, "_update", watched)
    fields = dict(optimizer="sgd", lr=0.5, warmup=0, schedule="wsd", weight_decay=0, steps=2)
    quiet = dict(eval_every=0, save_every=0, samples=0, decay=0.0)
    for clip in (0.25, 0):
        out = folder.mktemp(f"clip{clip}")
        train(replace(config, out=out, clip=clip, **fields, **quiet))
        norms = [row["grad_norm"] for row in metrics(out)]  # as they were
        assert min(norms) > 0.25
        expected = [0.5 * (clip or norm) for norm in norms]
        assert moved[-2:] == pytest.approx(expected, rel=1e-4)


def test_the_first_step_that_went_wrong_is_named(config, monkeypatch):
    """Where none is logged between it and the end."""
    from ponder.training import loop

    config, folder = config
    update = loop._Run._update

    def poisoned(self, batch):
        if self.step >= 2:
            with torch.no_grad():
                self.raw.norm.weight.fill_(float("nan"))
        return update(self, batch)

    monkeypatch.setattr(loop._Run, "_update", poisoned)
    rare = dict(log_every=0, eval_every=0, save_every=0)
    with pytest.raises(Diverged, match="at step 3 is not finite; nothing was saved yet"):
        train(replace(config, out=folder.mktemp("first"), **rare))


@pytest.mark.parametrize("what", ["loss", "gradient", "weight"])
def test_what_is_not_finite_is_named_and_the_checkpoint_kept(config, monkeypatch, what):
    config, folder = config
    out = folder.mktemp("diverged")
    from ponder.training import loop

    update, clip = loop._Run._update, loop._Run._clip

    def poisoned(self, batch):
        if self.step == 3 and what == "loss":
            with torch.no_grad():
                self.raw.norm.weight.fill_(float("nan"))
        done = update(self, batch)
        if self.step == 3 and what == "weight":  # of a step that is saved, before any loss knows
            with torch.no_grad():
                self.raw.norm.weight[0] = float("inf")
        return done

    def poisoned_gradient(self):
        # The loss of this step is fine, and it is one that is saved.
        if self.step == 3 and what == "gradient":
            self.raw.norm.weight.grad.fill_(float("nan"))
        return clip(self)

    monkeypatch.setattr(loop._Run, "_update", poisoned)
    monkeypatch.setattr(loop._Run, "_clip", poisoned_gradient)
    with pytest.raises(Diverged, match="at step 4 is not finite; the last good checkpoint is kept"):
        train(replace(config, out=out))
    state = newest(out)
    assert state["step"] == 2
    assert all(torch.isfinite(value).all() for value in state["model"].values())
    model = hub.load(out)
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.fixture
def copied(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    return tmp_path / "run"


def test_the_newest_checkpoints_are_kept(whole):
    assert Checkpoints(whole / "train" / "checkpoints").steps() == [4, 6]


def damage(state, kind):
    if kind == "truncated":
        state.write_bytes(state.read_bytes()[:1000])
    elif kind == "flipped":
        content = bytearray(state.read_bytes())
        content[len(content) // 2] ^= 1
        state.write_bytes(content)
    else:
        state.unlink()


@pytest.mark.parametrize("kind", ["truncated", "flipped", "missing"])
def test_a_damaged_checkpoint_is_said_and_the_one_before_taken(config, whole, copied, capsys, kind):
    config, _ = config
    checkpoints = Checkpoints(copied / "train" / "checkpoints")
    damage(checkpoints.path(6) / STATE, kind)
    train(replace(config, out=copied, resume=True))
    said = capsys.readouterr().out
    assert "step-000006 is damaged (state.pt" in said and "the one before is taken" in said
    assert losses(copied) == losses(whole)
    assert checkpoints.newest() == 6
    model, theirs = newest(copied)["model"], newest(whole)["model"]
    assert all(torch.equal(model[name], theirs[name]) for name in theirs)


def test_when_every_checkpoint_is_damaged_nothing_is_trained(config, copied):
    config, _ = config
    checkpoints = Checkpoints(copied / "train" / "checkpoints")
    (checkpoints.path(4) / MANIFEST).write_text("{")
    (checkpoints.path(6) / MANIFEST).unlink()
    with pytest.raises(ValueError, match="no checkpoint in .* can be read"):
        train(replace(config, out=copied, resume=True))


class Payload:
    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_pickled_code_in_a_checkpoint_is_refused(config, copied, tmp_path):
    config, _ = config
    checkpoints = Checkpoints(copied / "train" / "checkpoints")
    payload = Payload()
    payload.folder = str(tmp_path / "executed")
    checkpoints.save(7, {"model": payload})  # with a checksum that is right
    with pytest.raises(ValueError, match=r"state\.pt cannot be read: Weights only load failed"):
        train(replace(config, out=copied, resume=True))
    assert not (tmp_path / "executed").exists()


@pytest.fixture
def room():
    """Sets how large a file can grow, as on a disk that is full; by default as before."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size=soft):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))

    yield limit
    limit()


@pytest.mark.parametrize("file", ["model.safetensors", "train/checkpoints/step-000006/state.pt"])
def test_a_full_disk_keeps_what_was_saved(config, whole, room, monkeypatch, file):
    config, folder = config
    out = folder.mktemp("full")
    checkpoints = Checkpoints(out / "train" / "checkpoints")
    save = hub.save

    def fills_the_disk(*words, **options):
        if checkpoints.steps() == [2]:
            room((whole / file).stat().st_size - 1)
        return save(*words, **options)

    monkeypatch.setattr(hub, "save", fills_the_disk)
    with pytest.raises(ValueError) as error:
        train(replace(config, out=out))
    monkeypatch.undo()
    assert str(error.value).startswith(f"{out} cannot be written to after step 4: ")
    assert "too large" in str(error.value)  # what a limit says; a full disk: No space left
    assert "the checkpoint of step 2 is kept, make room and say --resume" in str(error.value)
    assert checkpoints.newest() == 2
    assert not [p for p in out.rglob("*") if p.name.startswith(".") or "tmp" in p.name]
    room()
    train(replace(config, out=out, resume=True))
    assert losses(out) == losses(whole)


def test_a_disk_that_is_full_before_anything_was_saved(config, room):
    config, folder = config
    out = folder.mktemp("full from the start")
    room(2000)  # run.json and rows of metrics, but no model
    with pytest.raises(ValueError, match="after step 2: .* too large.*; nothing was saved yet$"):
        train(replace(config, out=out, samples=0))
    assert Checkpoints(out / "train" / "checkpoints").newest() is None


def test_one_run_at_a_time_has_a_folder(config, whole):
    config, _ = config
    before = (whole / "run.json").read_bytes()
    with (
        alone_in(whole / "train"),
        pytest.raises(ValueError, match="another process is at work in .*train; wait for its end"),
    ):
        train(replace(config, out=whole, resume=True))
    assert (whole / "run.json").read_bytes() == before
    train(replace(config, out=whole, resume=True))


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
    assert newest(out)["precision"] == "bf16"
    assert read_run(out)["train"]["precision"] == "bf16"
    train(replace(config, resume=True))
    assert newest(out)["precision"] == "bf16"
    assert next(measured) == "fp32"  # nobody asked again


@pytest.fixture(scope="module")
def checkpoint(config, whole):
    """A Llama of Transformers' own, with the tokenizer of the finished run."""
    from transformers import LlamaConfig, LlamaForCausalLM

    _, folder = config
    path = folder.mktemp("checkpoint")
    tokenizer = hub.load_tokenizer(whole)
    torch.manual_seed(7)
    shape = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size() + 3,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=72,
    )
    LlamaForCausalLM(shape).save_pretrained(path)
    tokenizer.save(str(path / "tokenizer.json"))
    return path


def test_a_gradient_that_overflows_its_scale_is_left_out(config, monkeypatch):
    """It is no divergence: the scale shrinks, and training goes on."""
    from ponder.training import loop

    config, folder = config
    build, seen = loop.build_accelerator, []

    def scaled(*words, **options):
        accelerator = build(*words, **options)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=9)
        return accelerator

    note = loop._Run._note_if_bad
    monkeypatch.setattr(loop, "build_accelerator", scaled)
    monkeypatch.setattr(
        loop._Run, "_note_if_bad", lambda self, *x: (seen.append(x[1].isfinite()), note(self, *x))
    )
    config = replace(config, out=folder.mktemp("overflow"), optimizer="sgd", save_every=0)
    train(replace(config, eval_every=0))
    assert not seen[0] and metrics(config.out)[-1]["step"] == 6


def test_a_checkpoint_is_trained_further(config, checkpoint):
    from transformers import AutoModelForCausalLM

    config, folder = config
    out = folder.mktemp("further")
    config = replace(config, out=out, init=str(checkpoint), optimizer="sgd", warmup=0)
    train(replace(config, steps=2, lr=1e-9))
    before, after = (AutoModelForCausalLM.from_pretrained(p) for p in (checkpoint, out))
    assert type(after) is type(before)
    recorded = read_run(out)["train"]["configuration"]
    assert recorded["n_inner"] == after.config.intermediate_size != config.n_inner
    assert recorded["context"] == config.context < before.config.max_position_embeddings
    tokens = torch.arange(10)[None]
    torch.testing.assert_close(after(tokens).logits, before(tokens).logits, rtol=1e-5, atol=1e-6)
    train(replace(config, out=folder.mktemp("learned"), steps=60, lr=0.3))
    learned = metrics(folder.getbasetemp() / "learned0")
    assert learned[-1]["val_loss"] < 0.8 * learned[0]["train_loss"]


def test_a_checkpoint_is_told_of_lower_rates_unless_they_were_given(checkpoint, tmp_path, capsys):
    config = TrainConfig(init=str(checkpoint), out=tmp_path / "a", steps=1, batch_size=2, samples=0)
    train(config)
    assert "the learning rates are those of new models" in capsys.readouterr().out
    train(replace(config, out=tmp_path / "b", lr=1e-4))
    assert "of new models" not in capsys.readouterr().out


def test_a_default_context_is_at_most_the_checkpoint_s(checkpoint, tmp_path, capsys):
    config = TrainConfig(
        init=str(checkpoint), out=tmp_path / "out", steps=1, batch_size=2, samples=0
    )
    train(config)
    assert read_run(config.out)["train"]["configuration"]["context"] == 72 < config.context
    assert "parameters, context 72, " in capsys.readouterr().out
    train(replace(config, resume=True))
    # The checkpoint's own shape may be said, and so may less context than it has.
    train(replace(config, out=tmp_path / "said", n_layer=1, n_inner=48, context=48))
    assert read_run(tmp_path / "said")["train"]["configuration"]["context"] == 48


def test_a_checkpoint_of_plain_text_learns_to_think(config, tmp_path):
    """What it has no room for, it is given: <think> and </think> behind its own tokens."""
    config, _ = config
    text = tmp_path / "sums.txt"
    text.write_text("".join(f"{n}+{n + 1}={2 * n + 1}\n" for n in range(400)))
    fields = dict(steps=3, eval_every=0, save_every=0)
    plain = replace(config, data=f"text:{text}", out=tmp_path / "plain", **fields)
    train(plain)
    rows = tmp_path / "rows.jsonl"
    worked = [dict(question=f"{n}+1=", answer=f"{n}+1 #### {n + 1}") for n in range(99)]
    rows.write_text("".join(json.dumps(row) + "\n" for row in worked))
    further = replace(plain, data=f"jsonl:{rows}", out=tmp_path / "more", init=str(plain.out))
    train(further)
    before, after = (hub.load_config(run.out).vocab_size for run in (plain, further))
    assert after == before + 2
    words = hub.load_tokenizer(further.out)
    assert words.encode("1<think>").ids == [*hub.load_tokenizer(plain.out).encode("1").ids, before]
    train(replace(further, resume=True))  # its checkpoint has that shape
    assert newest(further.out)["step"] == 3


def test_a_checkpoint_that_does_not_fit_is_named(config, checkpoint, tmp_path):
    config, _ = config
    config = replace(config, out=tmp_path / "out", init=str(checkpoint))
    with pytest.raises(ValueError, match="context is 73; .* has one of 72"):
        train(replace(config, context=73))
    with pytest.raises(ValueError) as error:
        train(replace(config, n_layer=3, gated=False))
    assert str(error.value) == (
        f"n_layer is 3, where {checkpoint} has 1; gated is False, where {checkpoint} has True: "
        "a checkpoint keeps its shape, so leave that out"
    )
    with pytest.raises(ValueError, match="the tokenizer has ids up to 2.. and .*checkpoint"):
        train(replace(config, tokenizer="byte"))
    with pytest.raises(ValueError, match="there is no folder nowhere"):
        train(replace(config, init="nowhere"))
