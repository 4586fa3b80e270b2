"""The report of a training run, its terminal view, and its trackers."""

import base64
import html
import json
import re
import sqlite3
from contextlib import closing

import pytest
from matplotlib.axes import Axes

from ponder import cli
from ponder.training import preset
from ponder.training.journal import read_rows
from ponder.training.report import human, summary, write_training_report
from ponder.training.view import View, sparkline

from . import children


def row(step, **changes):
    return (
        dict(
            step=step,
            tokens=1000 * step,
            seconds=step / 2,
            train_loss=4.0 / step,
            val_loss=None,
            lr=0.02,
            grad_norm=1.0,
            tokens_per_second=2000.0,
            mfu=0.3,
        )
        | changes
    )


@pytest.fixture
def run(tmp_path):
    (tmp_path / "train").mkdir()
    rows = [row(s, val_loss=1.0 if s == 10 else 1.5 if s == 20 else None) for s in range(1, 21)]
    text = "".join(json.dumps(r) + "\n" for r in rows)
    (tmp_path / "train" / "metrics.jsonl").write_text(text + '{"step": 21, "tok')  # as written now
    samples = [
        {"step": 10, "prompt": "old", "text": "old", "right": False},
        {"step": 20, "prompt": "1+2=", "text": "<think>3</think>3", "right": True},
        {"step": 20, "prompt": "2+2=", "text": "<b>5", "right": False},
        {"step": 20, "prompt": "2+?", "text": "7", "right": None, "expected": "<b>8"},
    ]
    (tmp_path / "train" / "samples.jsonl").write_text(
        "".join(json.dumps(s) + "\n" for s in samples)
    )
    run = {"command": "ponder train", "versions": {}, "machine": {}, "configuration": {"steps": 40}}
    (tmp_path / "run.json").write_text(json.dumps({"train": run}))
    return tmp_path, rows


def test_a_training_run_is_reported(run, capsys):
    folder, rows = run
    assert cli.run(["report", str(folder)]) == 0
    page = folder / "report" / "training.html"
    assert capsys.readouterr().out == f"training: {page}\n"
    text = page.read_text()
    assert summary(rows, 40) in html.unescape(text)
    picture = (folder / "report" / "training.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and base64.b64encode(picture).decode() in text
    # The last evaluation's samples, none of an older one, and nothing of them as HTML.
    assert "&lt;think&gt;3&lt;/think&gt;3" in text and "&lt;b&gt;5" in text and ">old<" not in text
    assert "expected: &lt;b&gt;8" in text and text.count("expected: ") == 1
    assert re.findall(r'class="(right|wrong)"', text) == ["right", "wrong"]


@pytest.mark.parametrize(
    ("optimizer", "said"), [("muon", " (the matrices': 40 times it)"), ("adamw", "")]
)
def test_the_learning_rate_of_matrices_is_said_to_be_another(run, optimizer, said, monkeypatch):
    folder, _ = run
    about = json.loads((folder / "run.json").read_text())
    about["train"]["configuration"] |= dict(optimizer=optimizer, lr=5e-4, matrix_lr=0.02)
    (folder / "run.json").write_text(json.dumps(about))
    titles = []
    monkeypatch.setattr(Axes, "set_title", lambda axes, title: titles.append(title))
    write_training_report(folder)
    assert f"Learning rate{said}" in titles


def test_a_summary_names_the_lowest_validation_loss(run):
    _, rows = run
    assert summary(rows, 40) == (
        "20 of 40 steps, 20k tokens in 10 s; median 2k tokens/s at 30.0% of the machine's peak. "
        "Training loss 0.2000, validation loss 1.5000 (lowest 1.0000, at step 10)."
    )
    assert "validation" not in summary(rows[:5], 40)


def test_a_run_with_no_row_yet_is_told(run):
    folder, _ = run
    (folder / "train" / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="holds no row yet"):
        write_training_report(folder)


@pytest.mark.parametrize(("x", "text"), [(0.5, "0.5"), (999, "999"), (1234, "1.23k"), (5e6, "5M")])
def test_figures_are_short(x, text):
    assert human(x) == text


def test_a_sparkline_spans_its_values():
    assert sparkline([7, 0, 3.5, 1]) == "█▁▅▂"
    assert sparkline([2, 2]) == "▁▁" and sparkline([]) == ""


def test_without_a_terminal_lines_are_plain(capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("ponder.training.view.time.monotonic", lambda: now[0])
    with View(20, 0) as view:
        for step in range(1, 21):
            now[0] += 4  # a line every ten seconds at most
            view.row(row(step, val_loss=1.0 if step == 20 else None))
        view.samples([{"prompt": "1+2=", "text": "<think>\n" + "9" * 80, "right": True}] * 3)
        view.samples([{"prompt": "2?", "text": "4", "right": None, "expected": "5"}])
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert err == "" and "\r" not in out
    assert lines[0] == ("step 3/20 loss 1.3333 █▃▁ · 2,000 tokens/s · MFU 30.0% · 01:08 left")
    assert [
        line.split()[1] for line in lines if "/20" in line
    ] == "3/20 6/20 9/20 12/20 15/20 18/20".split()
    assert "step 20: val loss 1.0000, 10 s" in lines
    assert lines[-3:-1] == ["  1+2= → <think> " + "9" * 51 + "… ✓"] * 2
    assert lines[-1] == "  2? → 4 (expected 5)"


def test_a_tracker_that_is_not_installed_is_told_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr("ponder.training.trackers.importlib.util.find_spec", lambda name: None)
    from ponder.training.loop import train

    with pytest.raises(ValueError, match="trackers has wandb, which is not installed; say pip"):
        train(preset("tiny", out=tmp_path / "run", trackers=("wandb",)))
    assert not (tmp_path / "run").exists()


def test_trackers_get_the_configuration_and_every_row(tmp_path, monkeypatch):
    from accelerate import tracking
    from accelerate.utils import LoggerType

    from ponder.training.loop import train

    told = []

    class Recorder(tracking.GeneralTracker):
        name, requires_logging_directory, tracker = "trackio", False, None

        def __init__(self, project, **settings):
            super().__init__()
            told.append(("start", project, settings))

        def start(self):
            pass

        def store_init_configuration(self, values):
            told.append(("configuration", values))

        def log(self, values, step=None, **_):
            told.append(("row", step, values))

        def finish(self):
            told.append(("finish",))

    (tmp_path / "trackio.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "trackio", Recorder)
    monkeypatch.setattr(tracking, "_available_trackers", [LoggerType.TRACKIO])
    config = preset("tiny", out=tmp_path / "run", steps=4, log_every=2, samples=0, precision="fp32")
    train(config.__class__(**{**vars(config), "trackers": ("trackio",)}))
    rows = read_rows(tmp_path / "run" / "train" / "metrics.jsonl")
    name = "run-" + (tmp_path / "run" / "train" / "tracker_id").read_text()
    assert told[0] == ("start", "ponder", {"name": name, "resume": "allow"})
    assert told[1][1]["steps"] == 4 and told[1][1]["optimizer"] == "muon"
    assert [event[1] for event in told if event[0] == "row"] == [2, 4]
    assert told[3][2] == rows[1]
    assert told[2][2] == {k: v for k, v in rows[0].items() if v is not None}
    assert told[-1] == ("finish",)


def test_a_tracker_that_refuses_is_told(tmp_path, monkeypatch):
    from accelerate import Accelerator

    from ponder.training.trackers import start_trackers

    class UsageError(Exception):  # what wandb raises without a login
        pass

    def refuse(*_, **__):
        raise UsageError("No API key configured. Use `wandb login` to log in.")

    monkeypatch.setattr(Accelerator, "init_trackers", refuse)
    (tmp_path / "train").mkdir()
    config = preset("tiny", out=tmp_path, trackers=("wandb",))
    with pytest.raises(ValueError, match="wandb cannot start: No API key configured. Use `wandb"):
        start_trackers(Accelerator(cpu=True), config, 0)


def wandb_rows(out, folder):
    [file] = (out / "train" / "wandb").glob("offline-run-*/run-*.wandb")
    assert (out / "train" / "tracker_id").read_text() in file.name
    content = file.read_bytes()  # their own format; keys stand in it as they are
    return [content.count(b"train_loss") > 0, content.count(b"n_embd") > 0]


def trackio_rows(out, folder):
    [file] = folder.glob("ponder*.db")
    with closing(sqlite3.connect(file)) as base:
        found = base.execute("SELECT run_name, step, metrics FROM metrics ORDER BY step").fetchall()
        [[fields]] = base.execute("SELECT config FROM configs").fetchall()
    assert {name for name, *_ in found} == {f"out-{(out / 'train' / 'tracker_id').read_text()}"}
    losses = [json.loads(values)["train_loss"] for _, _, values in found]
    rows = read_rows(out / "train" / "metrics.jsonl")
    assert losses == pytest.approx([r["train_loss"] for r in rows])
    return [[step for _, step, _ in found] == [2, 4], json.loads(fields)["n_embd"] == 32]


def tensorboard_rows(out, folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    files = (out / "train").glob("**/events.out.tfevents.*")  # the configuration has its own
    every = [EventAccumulator(str(file)).Reload() for file in files]
    [events] = [e for e in every if "train_loss" in e.Tags()["scalars"]]
    return [[event.step for event in events.Scalars("train_loss")] == [2, 4], len(every) > 1]


@pytest.mark.parametrize("name", ["wandb", "trackio", "tensorboard"])
def test_the_trackers_themselves_take_a_run(name, tmp_path):
    pytest.importorskip(name, reason=f"{name} is not installed (the extra `trackers`)")
    out, log, folder = tmp_path / "out", tmp_path / "log", tmp_path / "tracked"
    words = "train tiny --steps 4 --log-every 2 --eval-every 0 --samples 0 --precision fp32 "
    words += f"--out {out} --trackers {name}"
    # What sends nothing away, and trackio's own folder.
    environment = {"WANDB_MODE": "offline", "TRACKIO_DIR": str(folder)}
    process = children.start(words.split(), log=log, environment=environment)
    process.join(100)
    assert process.exitcode == 0, log.read_text()
    found = {"wandb": wandb_rows, "trackio": trackio_rows, "tensorboard": tensorboard_rows}
    assert all(found[name](out, folder))
