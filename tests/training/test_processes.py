"""Several processes, sharded or not, train the run that one process trains."""

import random
import shutil
from dataclasses import replace

import pytest
from safetensors.torch import load_file

from ponder.training import preset
from ponder.training.checkpoint import Checkpoints
from ponder.training.journal import read_rows
from ponder.training.loop import train

from . import children

# SGD with momentum, as its update is linear in the gradient. (Muon's is computed in bf16 and Adam's
# first one is a sign: a rounding of the sum over processes would not stay one.)
SETTINGS = dict(precision="fp32", steps=6, log_every=1, eval_every=3, save_every=3, samples=2)
# One row to validate on: not one a process.
SETTINGS |= dict(optimizer="momentum", lr=0.05, data="text:{folder}/text.txt")
RUNS = {
    "plain": {},
    "averaged": dict(ema=0.5, accumulation=2),
    "padded": dict(data="task:last_digit", accumulation=2, eval_every=0),
    "muon": dict(optimizer="muon"),
}


def metrics(out) -> list[dict]:
    return read_rows(out / "train" / "metrics.jsonl")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    draw = random.Random(0)
    (folder / "text.txt").write_text("".join(draw.choice("abcde ") for _ in range(650)))
    return folder


def settings(name, folder):
    found = SETTINGS | RUNS[name]
    return found | dict(data=found["data"].format(folder=folder))


def words(name, folder, out, **more):
    found = settings(name, folder) | dict(out=out) | more
    flags = []
    for key, value in found.items():
        key = key.replace("_", "-")
        flags.append(f"--{key}" if value is True else f"--{key}={value}")
    return ["train", "tiny", *flags]


@pytest.fixture(scope="module")
def one(folder):
    """Each run on one process."""
    for name in RUNS:
        train(preset("tiny", out=folder / f"one_{name}", **settings(name, folder)))
    return folder


def at_step_three(source, target):
    """A copy of a run as it was before its second half."""
    shutil.copytree(source, target)
    checkpoints = Checkpoints(target / "train" / "checkpoints")
    assert checkpoints.steps() == [3, 6]
    shutil.rmtree(checkpoints.path(6))
    return target


@pytest.fixture(scope="module")
def two(one):
    """Runs on two processes, in one start of them."""
    at_step_three(one / "one_averaged", one / "one_to_two")
    unsharded = [words(name, one, one / f"two_{name}") for name in ("plain", "padded")]
    sharded = [words(name, one, one / f"two_{name}_sharded", shard=True) for name in RUNS]
    sharded[0].append("--recompute")
    sharded.append(words("padded", one, one / "two_bf16", shard=True, precision="bf16"))
    printed = children.run(
        *unsharded,
        *sharded,
        words("averaged", one, one / "one_to_two", shard=True, resume=True),
        ranks=2,
        folder=one,
    )
    assert printed[0].count("2 process(es), sharded") == len(RUNS) + 2
    assert printed[0].count("2 process(es)") == len(RUNS) + 4
    assert "process(es)" not in printed[1]
    return one


def compare(a, b, rel=1e-5, weights=True):
    """The same rows and, at the end, the same weights."""
    ours, theirs = metrics(a), metrics(b)
    assert [row["step"] for row in ours] == [1, 2, 3, 4, 5, 6]
    # Rows of a task differ in their number of targets: a mean of processes' means would not agree.
    for x, y in zip(ours, theirs, strict=True):
        assert x["tokens"] == y["tokens"] and x["lr"] == y["lr"]
        assert x["train_loss"] == pytest.approx(y["train_loss"], rel=rel)
        assert x["grad_norm"] == pytest.approx(y["grad_norm"], rel=10 * rel)
        assert (x["val_loss"] is None) == (y["val_loss"] is None)
        if x["val_loss"] is not None:
            assert x["val_loss"] == pytest.approx(y["val_loss"], rel=rel)
    if not weights:
        return
    weights = [load_file(out / "model.safetensors") for out in (a, b)]
    assert weights[0].keys() == weights[1].keys()
    for name, weight in weights[0].items():
        worst = (weights[1][name] - weight).abs().max()
        assert worst <= 1e-6 + 10 * rel * weight.abs().max(), name


RUN_BY_TWO = ["plain", "padded", "plain_sharded", "padded_sharded", "averaged_sharded"]


@pytest.mark.parametrize("name", RUN_BY_TWO)
def test_two_processes_train_what_one_trains(two, name):
    compare(two / f"two_{name}", two / f"one_{name.removesuffix('_sharded')}")


def test_muon_on_shards_is_muon(two):
    # Its products are in bf16, 8 bits, and each step starts from the last one's roundings.
    compare(two / "two_muon_sharded", two / "one_muon", rel=2e-3, weights=False)


def test_shards_in_bf16_are_near(two):
    compare(two / "two_bf16", two / "one_padded", rel=1e-2, weights=False)


def test_a_run_goes_on_with_more_processes_and_with_fewer(two):
    compare(two / "one_to_two", two / "one_averaged")
    back = at_step_three(two / "two_averaged_sharded", two / "two_to_one")
    config = preset("tiny", out=back, **settings("averaged", two))
    train(replace(config, resume=True))
    compare(back, two / "one_averaged")


def test_four_processes_go_on_from_shards_of_two(two):
    source = two / "two_averaged_sharded"
    sharded = at_step_three(source, two / "two_to_four_sharded")
    unsharded = at_step_three(source, two / "two_to_four")
    # What `accelerate launch` sets for a configuration file with FSDP in it.
    file = ["ACCELERATE_USE_FSDP=true", "FSDP_VERSION=2", "FSDP_ACTIVATION_CHECKPOINTING=true"]
    printed = children.run(
        words("padded", two, two / "four_padded"),
        words("averaged", two, unsharded, resume=True),
        file + words("averaged", two, sharded, resume=True),
        ranks=4,
        folder=two,
    )
    assert printed[0].count(", sharded") == 1
    compare(two / "four_padded", two / "one_padded")
    compare(unsharded, two / "one_averaged")
    compare(sharded, two / "one_averaged")


def test_accumulation_in_the_environment_changes_nothing(one, monkeypatch, tmp_path):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    out = tmp_path / "run"
    train(preset("tiny", out=str(out), **settings("plain", one)))  # a path in words will do
    compare(out, one / "one_plain")


def test_the_first_fsdp_is_refused(one, monkeypatch, tmp_path):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "1")
    with pytest.raises(ValueError, match="has fsdp_version 1; .* so set fsdp_version to 2"):
        train(preset("tiny", out=tmp_path / "run", **settings("plain", one)))
    assert not (tmp_path / "run").exists()
