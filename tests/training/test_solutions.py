import json
import sqlite3
from dataclasses import replace

import numpy as np
import pytest
import torch

from ponder import tasks
from ponder.inference.verifier import open_verifier
from ponder.models import hub
from ponder.training import preset
from ponder.training.calibration import auc
from ponder.training.checkpoint import STATE, Checkpoints
from ponder.training.config import TrainConfig
from ponder.training.data import IGNORE, load_data
from ponder.training.journal import read_rows
from ponder.training.loop import train

from .stores import solutions, write_store


def opened(path, **changes):
    """The data of a small run that learns from the store."""
    return load_data(preset("tiny", data=f"samples:{path}", **changes))


def labels(data, row):
    """[(token, label)] of a row, where there is a label."""
    tokens, targets, _ = row
    text = data.tokenizer.decode_batch([[i] for i in tokens.tolist()], skip_special_tokens=False)
    return [(t, y) for t, y in zip(text, targets.tolist(), strict=True) if y != IGNORE]


def rows_of(batches):
    for batch in batches:
        for tokens, targets in zip(batch.tokens, batch.targets, strict=True):
            yield tokens, targets, None


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    return write_store(folder / "s.sqlite", "last_digit", "train", solutions("train", 40, 3))


def test_outcomes_are_told_at_the_last_token_and_values_at_every_one(store):
    data = opened(store, verifier="outcome")
    for row in rows_of(data.validation()):
        [(token, label)] = labels(data, row)
        text = data.tokenizer.decode(row[0].tolist(), skip_special_tokens=False)
        cut = "</think>" not in text
        assert label == 0 if cut else token == "<eos>"
        # What follows a cut sample is padding, and padding is no label.
        end = int((row[1] != IGNORE).nonzero())
        assert text.count("<eos>") == (len(row[0]) - end - 1 if cut else len(row[0]) - end)
    data = opened(store, verifier="value")
    for row in rows_of(data.validation()):
        found = labels(data, row)
        assert found[0][0] == "<think>" and len({label for _, label in found}) == 1
        if found[0][1]:
            assert [t for t, _ in found][-3] == "</think>" and found[-1][0] == "<eos>"


def test_steps_are_labelled_where_they_end(tmp_path):
    task = tasks.get("countdown")
    problems = task.problems("train", 4, 0)
    traces = [task.trace(p) for p in problems]
    made = [
        [
            (f"<think>{trace}</think>{p.answer}", True, True),
            (f"<think>{trace}1+1=3:4;:::</think>1;2", True, False),
            (f"<think>{trace[:-1]}", False, False),
        ]
        for p, trace in zip(problems, traces, strict=True)
    ]
    path = write_store(tmp_path / "s.sqlite", "countdown", "train", made)
    data = opened(path, verifier="process", context=1600)
    for row in rows_of(data.validation()):
        text = data.tokenizer.decode(row[0].tolist(), skip_special_tokens=False)
        prompt, _, rest = text.partition("<think>")
        trace, close, _ = rest.partition("</think>")
        told = task.step_labels(task.read(prompt), trace.removesuffix("<eos>"))
        found = labels(data, row)
        right = bool(close) and ":::" not in text
        *steps, (end, verdict) = found
        assert [label for _, label in steps] == told and {t for t, _ in steps} <= {";"}
        assert verdict == right and (end == "<eos>") == bool(close)
        assert not close or told[-1] == right


def test_what_is_held_out_is_no_problem_to_learn_from(store):
    data = opened(store, verifier="outcome", batch_size=30)

    def prompts(rows):
        texts = (data.tokenizer.decode(t.tolist(), skip_special_tokens=False) for t, _, _ in rows)
        return {text.partition("<think>")[0] for text in texts}

    held_out = [prompts(rows_of([batch])) for batch in data.validation()]
    every = set().union(*held_out)
    assert len(held_out) >= 2 and sum(map(len, held_out)) == len(every) == 4  # a problem once
    epoch = [prompts(rows_of([data.batch(step)])) for step in range(4)]
    assert len(set().union(*epoch) | every) >= 39 and not set().union(*epoch) & every
    again = opened(store, verifier="outcome", batch_size=30)
    assert again.fingerprint == data.fingerprint
    for one, other in zip(data.batch(5)[:2], again.batch(5)[:2], strict=True):
        assert torch.equal(one, other)
    # 36 problems with 3 samples: an epoch of 108 rows holds each of them once.
    rows = [t.tolist() for step in range(18) for t, _, _ in rows_of([data.batch(step)])]
    width = max(map(len, rows))
    counts = np.unique([r + [0] * (width - len(r)) for r in rows], axis=0, return_counts=True)[1]
    assert len(rows) == 540 and (counts % 5 == 0).all()


def test_a_solver_judges_its_own_traces():
    config = preset("tiny", data="task:countdown", verifier="process", context=196)
    data = load_data(config)
    task = tasks.get("countdown")
    [batch] = [data.batch(0)]
    for row in rows_of([batch]):
        text = data.tokenizer.decode(row[0].tolist(), skip_special_tokens=False)
        prompt, _, rest = text.partition("<think>")
        told = task.step_labels(task.read(prompt), rest.partition("</think>")[0])
        assert [label for _, label in labels(data, row)] == told and told  # none at the end
    assert batch.tokens.shape[1] == 196  # where traces of 1,500 tokens are cut


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (dict(data="samples:x"), "samples need --verifier"),
        (dict(data="task:countdown", verifier="outcome"), "outcome learns from samples:FOLDER$"),
        (dict(data="text:x", verifier="process"), "learns from samples:FOLDER or task:NAME"),
    ],
)
def test_what_a_verifier_cannot_learn_from_is_said(fields, said):
    with pytest.raises(ValueError, match=said):
        TrainConfig(**fields).check()


def test_data_that_teach_nothing_are_refused(tmp_path, store):
    def refused(said, path, **fields):
        with pytest.raises(ValueError, match=said):
            opened(path, **({"verifier": "value"} | fields))

    made = solutions("test", 6, 2)
    refused("samples of the test split", write_store(tmp_path / "t", "last_digit", "test", made))
    own = write_store(tmp_path / "own", "last_digit", "train", made)
    (tmp_path / "evil.py").write_text("raise SystemExit('it was run')")
    with sqlite3.connect(own) as db:
        name = json.dumps(f"{tmp_path / 'evil.py'}:Task")
        db.execute("UPDATE identity SET value = ? WHERE name = 'task'", (name,))
    refused("whose file would be run as a store names it", own, verifier="process")
    right = [[s for s in row if s[2]] or [("<think>1</think>1", True, True)] for row in made]
    refused("could learn from is right", write_store(tmp_path / "r", "last_digit", "val", right))
    two = write_store(tmp_path / "two", "last_digit", "train", made[:2])
    refused("samples of 2 problems; a verifier needs 3", two)
    refused("holds no samples", write_store(tmp_path / "e", "last_digit", "train", []))
    refused("process, and last_digit cannot judge steps", store, verifier="process")
    refused("set it to at least", store, context=8)
    refused("there is no sample store .*nowhere", tmp_path / "nowhere")
    (tmp_path / "text").write_text("not a data base, only a text of some length" * 10)
    refused("is not a sample store", tmp_path / "text")
    with pytest.raises(ValueError, match="cannot judge steps"):
        load_data(preset("tiny", data="task:permute", verifier="process"))


@pytest.mark.parametrize("kind", ["outcome", "value"])
def test_samples_of_a_task_of_one_s_own_teach_without_its_file(tmp_path, store, kind):
    own = tmp_path / "own.sqlite"
    with sqlite3.connect(store) as db, sqlite3.connect(own) as copy:
        db.backup(copy)
        copy.execute("""UPDATE identity SET value = '"nowhere.py:Task"' WHERE name = 'task'""")
    data, known = (opened(path, verifier=kind, batch_size=9) for path in (own, store))
    # Its characters are those of the texts, <think> and </think> tokens as ever.
    words = set(data.tokenizer.get_vocab())
    assert words <= set(known.tokenizer.get_vocab()) and not words & set("thinkd<>/")
    for row, other in zip(rows_of([data.batch(0)]), rows_of([known.batch(0)]), strict=True):
        texts = [d.tokenizer.decode(r[0].tolist()) for d, r in ((data, row), (known, other))]
        assert texts[0] == texts[1]
        assert torch.equal(row[1], other[1])


@pytest.fixture(scope="module")
def trained(store, tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("trained")
    made = solutions("train", 120, 4)
    path = write_store(folder / "s.sqlite", "last_digit", "train", made)
    config = preset(
        "tiny",
        data=f"samples:{path}",
        verifier="outcome",
        steps=60,
        batch_size=32,
        eval_every=30,
        save_every=30,
        precision="fp32",
        out=folder / "verifier",
    )
    train(config)
    return config


def test_a_verifier_ranks_solutions_of_problems_that_it_never_saw(trained):
    """400 problems: of 50 the best of four gained 2 to 18 points, by the seed of the training."""
    verifier = open_verifier(trained.out, on="cpu")
    n = 400
    problems = tasks.get("last_digit").problems("test", n, 0)
    made = solutions("test", n, 4)
    asked = [
        (p.prompt, text, whole)
        for p, row in zip(problems, made, strict=True)
        for text, whole, _ in row
    ]
    values = np.array([score.end for score in verifier.score(asked)])
    right = np.array([right for row in made for *_, right in row])
    assert ((values > 0) & (values < 1)).all()
    assert auc(values, right) > 0.7  # five seeds: 0.73 to 0.76; chance: 0.5 ± 0.015
    best = values.reshape(n, 4).argmax(1)
    gain = right.reshape(n, 4)[np.arange(n), best].mean() - right.mean()
    assert gain > 0.05  # five seeds: 0.07 to 0.13; chance: 0 ± 0.022


def test_a_run_tells_how_good_its_verifier_is(trained):
    rows = read_rows(trained.out / "train" / "metrics.jsonl")
    rows = [row for row in rows if row["val_loss"] is not None]
    told = json.loads((trained.out / "run.json").read_text())["train"]["verifier"]
    assert [row["step"] for row in rows] == [30, 60] and told["step"] == 60
    assert rows[-1]["auc"] == told["auc"] > 0.5
    assert rows[-1]["calibration_error"] == told["calibration_error"] < 0.5
    assert not (trained.out / "train" / "samples.jsonl").exists()


def test_a_verifier_goes_on_from_its_checkpoint_and_from_a_generator(trained, tmp_path):
    shorter = replace(trained, out=tmp_path / "resumed", steps=4, eval_every=2, save_every=2)
    train(shorter)
    before = (tmp_path / "resumed" / "model.safetensors").read_bytes()
    newest = Checkpoints(tmp_path / "resumed" / "train" / "checkpoints").path(4)
    (newest / STATE).unlink()  # the checkpoint before it is then taken
    train(replace(shorter, resume=True))
    assert (tmp_path / "resumed" / "model.safetensors").read_bytes() == before
    told = (tmp_path / "resumed" / "run.json").read_text()
    train(replace(shorter, resume=True))  # nothing is left to do, and what was found out stays
    assert json.loads(told)["train"]["verifier"]["step"] == 4
    assert (tmp_path / "resumed" / "run.json").read_text() == told

    writer = preset("tiny", steps=1, out=tmp_path / "writer", precision="fp32", samples=0)
    train(writer)
    out = tmp_path / "begun"
    train(replace(shorter, init=str(writer.out), steps=1, lr=1e-9, matrix_lr=1e-9, out=out))
    body, given = open_verifier(out, on="cpu"), hub.load(writer.out)
    for name, weight in given.state_dict().items():
        if name != "lm_head.weight":
            torch.testing.assert_close(
                body.verifier.model.state_dict()[name], weight, atol=1e-6, rtol=0
            )
    assert body.tokenizer.get_vocab() == hub.load_tokenizer(writer.out).get_vocab()
    with pytest.raises(ValueError, match="holds 2 tensors .*score"):
        hub.load(trained.out)
