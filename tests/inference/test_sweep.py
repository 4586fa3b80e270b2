import csv
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import tyro
from tokenizers import Tokenizer, models

from ponder import tasks
from ponder.inference.config import SweepConfig
from ponder.inference.sweep import redraw, sweep
from ponder.models import hub


@pytest.fixture
def config(model, tmp_path) -> SweepConfig:
    return SweepConfig(
        model=str(model),
        out=tmp_path / "out",
        samples=(1, 3),
        budgets=(0, 2),
        problems=6,
        slots=8,
        precision="fp32",
    )


def samples(out: Path) -> list[tuple]:
    with sqlite3.connect(out / "sweep" / "samples.sqlite") as db:
        return db.execute(
            "SELECT problem, budget, params, seed, sample, text, answer, correct, sampled_tokens, "
            "forced_tokens, think_tokens, logprob FROM sample ORDER BY 3, 1, 2, 5"
        ).fetchall()


@pytest.mark.parametrize(
    ("asker", "message"),
    [
        ("engine", "drawing 8 samples at a time of up to .* needs .* fewer slots"),
        ("speaker", r"the model .* needs .*\(weights .*\) and there are 0.00; take a smaller one"),
    ],
)
def test_what_cannot_fit_is_refused_before_the_folder_is_there(config, asker, message, monkeypatch):
    monkeypatch.setattr(f"ponder.inference.{asker}.available", lambda device: 1000)
    with pytest.raises(ValueError, match=message):
        sweep(config)
    assert not config.out.exists()


def test_a_sweep_fills_its_grid_and_enforces_its_budgets(config):
    page = sweep(config)
    found = samples(config.out)
    assert len(found) == 6 * 3 * (1 + 3)  # problems × budgets (one unlimited) × (greedy + samples)
    for _, budget, _, _, _, text, _, _, sampled, forced, think, _ in found:
        assert text.startswith("<think>")
        if budget is not None:
            assert think <= budget and forced in (0, 1)
            assert "</think>" in text
        else:
            assert forced == 0
        assert sampled + forced <= 64
    zero = [row for row in found if row[1] == 0]
    assert all(row[10] == 0 and row[9] == 1 for row in zero)
    rows = list(csv.DictReader((config.out / "report" / "results.csv").open()))
    assert {row["strategy"] for row in rows} >= {"greedy", "sampling", "self-consistency"}
    assert {row["think_budget"] for row in rows} == {"0", "2", "inf"}
    assert all(row["problems"] == "6" and row["model"] == config.model for row in rows)
    assert page.read_text().count("<html") == 1
    run = json.loads((config.out / "run.json").read_text())["sweep"]
    assert run["configuration"]["problems"] == 6


def test_what_is_stored_agrees_with_the_verifier(config):
    sweep(config)
    task = tasks.get("last_digit")
    problems = task.problems("test", 6, 0)
    for row in samples(config.out):
        assert bool(row[7]) == task.verify(problems[row[0]], row[5])
        assert row[6] == task.answer(row[5])


def test_a_killed_sweep_goes_on_and_ends_with_the_same_samples(config, model, tmp_path):
    config = replace(config, problems=24, samples=(8,), slots=16)
    sweep(config)
    words = (
        f"sweep --model {model} --out {tmp_path / 'killed'} --samples 8 --budgets 0 2 "
        "--problems 24 --slots 16 --precision fp32"
    ).split()
    code = (
        "import sys, ponder.inference.sweep as s; s.KEEP_EVERY_SECONDS = 0.05\n"
        "from ponder.cli import run; sys.exit(run(sys.argv[1:]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, *words],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    path = tmp_path / "killed" / "sweep" / "samples.sqlite"
    deadline = time.monotonic() + 120
    count = 0
    while count < 20:
        assert process.poll() is None and time.monotonic() < deadline
        try:
            count = len(samples(tmp_path / "killed"))
        except sqlite3.OperationalError:
            time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert path.exists()
    before = len(samples(tmp_path / "killed"))
    assert 20 <= before < len(samples(config.out)), "it was to be killed half-way"
    with pytest.raises(ValueError, match="say --resume"):
        sweep(replace(config, out=tmp_path / "killed"))
    sweep(replace(config, out=tmp_path / "killed", resume=True))
    assert samples(tmp_path / "killed") == samples(config.out)


def test_a_resumed_sweep_keeps_the_precision_that_was_measured(config, monkeypatch):
    config = replace(config, precision="auto")
    measured = iter((True, False))
    monkeypatch.setattr("ponder.inference.speaker.bf16_pays", lambda *_: next(measured))
    sweep(config)
    before = samples(config.out)
    sweep(replace(config, resume=True))
    run = json.loads((config.out / "run.json").read_text())["sweep"]
    assert run["configuration"]["precision"] == "bf16"
    assert samples(config.out) == before
    sweep(replace(config, out=config.out / "other"))  # the next measurement counts for a new one
    assert samples(config.out / "other") != before
    with pytest.raises(ValueError, match="precision 'bf16' .now 'fp32'."):
        sweep(replace(config, precision="fp32", resume=True))


def test_another_model_or_task_is_refused_and_nothing_is_lost(config, model, tmp_path):
    sweep(config)
    before = samples(config.out)
    other = tmp_path / "other"
    shutil.copytree(model, other)
    gpt = hub.load(other)
    with torch.no_grad():
        gpt.norm.weight += 1
    hub.save(gpt, other, tokenizer=hub.load_tokenizer(other))
    for changed in (
        replace(config, model=str(other), resume=True),
        replace(config, seed=1, resume=True),
    ):
        with pytest.raises(ValueError, match="holds another sweep run"):
            sweep(changed)
    with pytest.raises(ValueError, match="permute|tokenizer|does not know"):
        sweep(replace(config, task="permute", out=tmp_path / "permute"))
    assert samples(config.out) == before


def test_redraw_writes_the_same_results(config):
    page = sweep(config)
    before = (config.out / "report" / "results.csv").read_text()
    shutil.rmtree(config.out / "report")
    assert redraw(config.out) == page
    assert (config.out / "report" / "results.csv").read_text() == before
    with pytest.raises(ValueError, match="holds no run.json"):
        redraw(config.out / "report")


def test_a_budget_beyond_the_context_names_what_fits(config):
    with pytest.raises(ValueError, match=r"a budget of 90 does not fit: .* room for \d+"):
        sweep(replace(config, budgets=(90,)))


def test_budgets_with_no_number_leave_unlimited_thinking_alone(config):
    words = ["--model", config.model, "--budgets"]
    assert tyro.cli(SweepConfig, args=words).budgets == ()
    sweep(replace(config, budgets=(), samples=(1,), problems=2))
    assert [row[1] for row in samples(config.out)] == [None] * 4


def test_a_model_without_think_tokens_is_named(model, config, tmp_path):
    folder = tmp_path / "plain"
    shutil.copytree(model, folder)
    plain = Tokenizer(models.BPE({"<unk>": 0, "a": 1}, [], unk_token="<unk>"))
    plain.save(str(folder / "tokenizer.json"))
    with pytest.raises(ValueError, match="has no <think> token"):
        sweep(replace(config, model=str(folder)))
