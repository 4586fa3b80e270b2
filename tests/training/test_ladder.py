import csv
import io
import json
import math
import random
import shutil
from contextlib import redirect_stdout
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from ponder.training import loop
from ponder.training.journal import read_rows
from ponder.training.ladder import PRESETS, ScaleConfig, _say_passes, preset, rung_config, scale
from ponder.training.report import human
from ponder.training.scaling import Law
from ponder.training.scaling_report import Rung, fit_rungs, optima, report

from . import children

LAW = Law(E=1.1, A=60.0, B=300.0, alpha=0.42, beta=0.45)


@pytest.fixture(scope="module")
def ladder(tmp_path_factory):
    """Nine runs and a tenth, of ten to sixteen steps each."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("ladder")
    draw = random.Random(0)
    (folder / "text.txt").write_text("".join(draw.choices("abcd .", (9, 5, 3, 2, 5, 1), k=6000)))
    config = ScaleConfig(
        out=folder / "out",
        data=f"text:{folder / 'text.txt'}",
        sizes=("1x16", "1x32", "1x48"),
        tokens=(640, 768, 960),
        held_out="2x48",
        held_out_tokens=1024,
        context=32,
        batch_tokens=64,
        resamples=3,
    )
    said = io.StringIO()
    with redirect_stdout(said):
        assert scale(config) == folder / "out" / "scaling"
    (folder / "said").write_text(said.getvalue())
    return config


def test_a_ladder_says_how_often_its_text_is_seen(ladder, tmp_path, capsys):
    said = (ladder.out.parent / "said").read_text()
    assert "the longest run, 2x48_1024, makes 0.19 passes over the text\n" in said
    (tmp_path / "short.txt").write_text("abcd .\n" * 50)
    short = replace(ladder, data=f"text:{tmp_path / 'short.txt'}", held_out="")
    _say_passes(rung_config(short, "1x16", 1920), True)
    said = capsys.readouterr().out
    assert "1x16_1920, makes 6.1 passes over the text: beyond 4, repeated tokens teach less" in said


def test_a_mistake_in_the_data_takes_no_folder(ladder, tmp_path):
    with pytest.raises(ValueError, match="there is no text file none.txt"):
        scale(replace(ladder, data="text:none.txt", out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def table(config):
    return list(csv.DictReader((config.out / "scaling" / "runs.csv").open()))


def test_every_size_meets_every_budget_in_a_folder_of_its_own(ladder):
    rows = table(ladder)
    names = {f"{size}_{count}" for size in ladder.sizes for count in ladder.tokens}
    assert {r["name"] for r in rows if r["held_out"] == "False"} == names
    assert [r["name"] for r in rows if r["held_out"] == "True"] == ["2x48_1024"]
    for row in rows:
        run = ladder.out / "runs" / row["name"]
        last = read_rows(run / "train" / "metrics.jsonl")[-1]
        assert float(row["val_loss"]) == last["val_loss"] and int(row["tokens"]) == last["tokens"]
        assert int(row["tokens"]) == int(row["name"].split("_")[1])
        # 12 C² a layer, twice forward, four times backward, and then the head and attention.
        weights = 12 * int(row["n_layer"]) * int(row["n_embd"]) ** 2
        assert int(row["parameters"]) == weights
        assert float(row["flops"]) > 6 * weights * int(row["tokens"])


def test_the_fit_on_disk_has_no_bare_number(ladder):
    fit = json.loads((ladder.out / "scaling" / "fit.json").read_text())
    assert set(fit["constants"]) == {"E", "A", "B", "alpha", "beta", "size_exponent"}
    for constant in fit["constants"].values():
        assert constant["low"] <= constant["value"] <= constant["high"]
        assert constant["identified"] is ("why" not in constant)
    assert fit["backtest"]["runs"] == 2 and fit["backtest"]["missed by"] > 0
    [held] = fit["held_out"]
    assert held["predicted"]["low"] < held["predicted"]["high"] and held["measured"] > 0
    assert fit["runs"] == 9 and fit["left_out"] == []
    assert not fit["constants"]["alpha"]["identified"] and fit["optimum"] == []
    assert (ladder.out / "scaling" / "scaling.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_finished_is_not_trained_again(ladder, monkeypatch):
    before = table(ladder)
    with pytest.raises(ValueError, match="say --resume"):
        scale(ladder)
    with pytest.raises(ValueError, match="another scale run, with seed 0"):
        scale(replace(ladder, seed=1, resume=True))
    lost = ladder.out / "runs" / "1x32_768" / "train" / "metrics.jsonl"
    text = lost.read_text()
    trained = []
    monkeypatch.setattr(
        loop, "train", lambda c: (trained.append(c.out.name), lost.write_text(text))
    )
    lost.write_text(text.splitlines(keepends=True)[0])
    scale(replace(ladder, resume=True))
    assert trained == ["1x32_768"] and table(ladder) == before
    # As on a disk that was full behind the last row: the model is not there.
    saved = ladder.out / "runs" / "1x32_768" / "config.json"
    monkeypatch.setattr(loop, "train", lambda c: (trained.append(c.out.name), aside.rename(saved)))
    aside = saved.rename(saved.with_suffix(".aside"))
    scale(replace(ladder, resume=True))
    assert trained == ["1x32_768"] * 2 and table(ladder) == before


def test_two_texts_are_not_taken_for_one(ladder, tmp_path):
    out = shutil.copytree(ladder.out, tmp_path / "out")
    shutil.rmtree(out / "runs" / "1x16_640")
    text = Path(ladder.data.removeprefix("text:"))
    before = text.read_text()
    text.write_text(before[::-1])
    with pytest.raises(ValueError, match="1x16_640 and 1x16_768 have seen different ones; take"):
        scale(replace(ladder, out=out, resume=True))
    text.write_text(before)


def test_two_processes_climb_the_ladder_together(ladder, tmp_path):
    """Into a folder that is not there yet."""
    words = ["scale", f"--data={ladder.data}", f"--out={tmp_path}/out", "--held-out="]
    for name in ("sizes", "tokens"):
        words += [f"--{name}", *map(str, getattr(ladder, name))]
    words += ["--context=32", "--batch-tokens=64", "--resamples=3"]
    first, second = children.run(words, ranks=2, folder=tmp_path)
    assert "alpha" in first and "alpha" not in second
    rows = list(csv.DictReader((tmp_path / "out" / "scaling" / "runs.csv").open()))
    assert [row["status"] for row in rows] == ["finished"] * 9
    with pytest.raises(AssertionError, match="holds this scale run already"):
        children.run(words, ranks=2, folder=tmp_path)
    for rank in (0, 1):  # none of them waits for the other
        assert (tmp_path / f"2_{rank}.log").read_text().count("holds this scale run already") == 1


def test_a_run_that_diverges_is_left_out_and_said_to_be(ladder, tmp_path, monkeypatch, capsys):
    import shutil

    shutil.copytree(ladder.out, tmp_path / "out")
    config = replace(ladder, out=tmp_path / "out", resume=True)
    shutil.rmtree(config.out / "runs" / "1x48_640")

    def diverges(run):
        run.out.mkdir()
        raise loop.Diverged("the loss of step 3 is not finite")

    monkeypatch.setattr(loop, "train", diverges)
    scale(config)
    [row] = [r for r in table(config) if r["name"] == "1x48_640"]
    assert row["status"] == "diverged" and row["val_loss"] == ""
    fit = json.loads((config.out / "scaling" / "fit.json").read_text())
    assert fit["left_out"] == ["1x48_640"] and fit["runs"] == 8
    assert "1x48_640 diverged and is left out" in capsys.readouterr().out


def test_a_stopped_run_ends_the_ladder_and_keeps_what_there_is(ladder, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "train", lambda c: c.out)  # as after SIGTERM: not all steps done
    with pytest.raises(KeyboardInterrupt):
        scale(replace(ladder, out=tmp_path / "out"))


def test_too_few_finished_runs_name_the_lost_ones():
    rungs = [Rung(f"r{i}", 1, 16, 3072 * (i + 1), False, "diverged") for i in range(9)]
    with pytest.raises(ValueError, match="0 runs .* cannot tell .*; diverged: r0, r1"):
        fit_rungs(rungs, resamples=1, seed=0)


def test_known_constants_come_back_from_the_default_ladder(tmp_path, capsys):
    """Rates and sizes apart: the default sizes and budgets do identify a law like that of text."""
    config = ScaleConfig(out=tmp_path, resamples=40)
    draw = random.Random(0)
    rungs = []
    for size in config.sizes:
        for count in config.tokens:
            run = rung_config(config, size, count)
            n, d = 12 * run.n_layer * run.n_embd**2, run.steps * config.batch_tokens
            loss = LAW.loss(n, d) * math.exp(draw.gauss(0, 0.002))
            rungs.append(
                Rung(run.out.name, run.n_layer, run.n_embd, n, False, "finished", d, 6.5 * n * d)
            )
            rungs[-1] = replace(rungs[-1], val_loss=loss)
    fit = fit_rungs(rungs, resamples=config.resamples, seed=config.seed)
    report(fit, rungs, tmp_path)
    best, more = optima(fit, rungs)
    assert more.flops == 10 * best.flops and more.loss.value < best.loss.value
    said = f"{best.flops:.2g} FLOPs are best spent on {human(best.parameters.value)} parameters"
    assert best.flops == max(r.flops for r in rungs) and said in capsys.readouterr().out
    assert not fit.unidentified
    for name, value in asdict(LAW).items():
        assert fit.intervals[name].low <= value <= fit.intervals[name].high, name
    truth = LAW.loss(614_400, config.held_out_tokens)
    _, low, high = fit.predict(614_400, config.held_out_tokens)
    assert low <= truth <= high < 1.03 * low


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_ladders_that_can_be(name):
    config = preset(name)
    config.check()
    runs = [rung_config(config, s, t) for s in config.sizes for t in config.tokens]
    for run in runs:
        run.check()
        assert run.n_head * run.head_dim == run.n_embd
    held = rung_config(config, config.held_out, config.held_out_tokens)
    sizes = {loop.model_config(c, 1).layer_weights for c in runs}
    assert loop.model_config(held, 1).layer_weights > max(sizes) and len(sizes) >= 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(sizes=("4x64", "big", "2x32")), "size 'big' is not LAYERSxWIDTH"),
        (
            dict(sizes=("4x64", "2x40", "2x32")),
            "width of 2x40 is not a multiple of its head_dim, 16",
        ),
        (dict(sizes=("2x32", "2x64", "2x32", "2x96")), "sizes name 2x32 more than once"),
        (dict(tokens=(10**5, 10**5, 10**6, 10**7)), "tokens name 100000 more than once"),
        (dict(sizes=("4x64", "2x32")), "sizes are 2; a fit needs at least 3"),
        (dict(tokens=(1000, 500_000, 10**6)), "1000 tokens are fewer than 10 steps of 1024"),
        (dict(batch_tokens=1000), "batch_tokens is 1000; it must be a multiple of the context"),
        (dict(resamples=0), "resamples is 0"),
        (dict(seed=-1), "seed is -1; it must be at least 0"),
        (dict(lr=float("nan")), "lr is nan"),
        (
            dict(tokens=(100_000, 100_001, 100_002)),
            "tokens are 100000, 100001, 100002, of 1 different numbers of steps of 1024",
        ),
        (dict(data="task:last_digit"), "data is task:last_digit; a law counts tokens"),
        (dict(sizes=("2x64", "8x32", "2x128")), "of 2 different numbers of parameters"),
        (dict(held_out="2x64", held_out_tokens=600_100), "held_out is 2x64 .* a run of the ladder"),
    ],
)
def test_ladders_that_cannot_be_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        replace(ScaleConfig(), **change).check()
