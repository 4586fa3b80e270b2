"""Batches as functions of the step: from a text, from tasks, and mixed."""

import hashlib
import json
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from ponder import tasks
from ponder.training import TrainConfig, preset
from ponder.training.batch import Batch, join
from ponder.training.data import IGNORE, Data, load_data
from ponder.training.tokenizer import SPECIAL, Vocabulary, character_tokenizer

TEXT = "To be, or not to be: that is the question.\n" * 40


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "hamlet.txt"
    path.write_text(TEXT)
    return f"text:{path}"


@pytest.fixture(scope="module")
def text_data(text):
    def load(**changes) -> Data:
        return load_data(TrainConfig(data=text, context=8, batch_size=4, **changes))

    return load


def test_batches_depend_on_seed_and_step_alone(text_data):
    one, two = text_data(), text_data()
    for step in (3, 0, 3):
        for name in ("tokens", "targets"):
            assert torch.equal(getattr(one.batch(step), name), getattr(two.batch(step), name))
    assert not torch.equal(one.batch(0)[0], one.batch(1)[0])
    assert not torch.equal(one.batch(0)[0], text_data(seed=1).batch(0)[0])


def test_text_targets_are_the_next_tokens(text_data):
    data = text_data()
    tokens, targets, _ = data.batch(0)
    assert torch.equal(tokens[:, 1:], targets[:, :-1])
    for row, target in zip(tokens, targets, strict=True):
        assert data.tokenizer.decode([*row.tolist(), int(target[-1])]) in TEXT


def test_validation_predicts_every_token_once(text_data):
    data = text_data()
    seen = [y[y != IGNORE] for _, y, _ in data.validation()]
    assert torch.equal(
        torch.cat(seen), torch.from_numpy(data.sources[0].held_out[1:].astype(np.int64))
    )


def test_task_rows_read_as_prompt_thought_answer():
    config = preset("tiny", data="task:last_digit", batch_size=64)
    data = load_data(config)
    tokens, targets, _ = data.batch(0)
    cut = 0
    for row, target in zip(tokens, targets, strict=True):
        learned = target[target != IGNORE]
        text = data.tokenizer.decode(row.tolist(), skip_special_tokens=False).rstrip("<eos>")
        prompt, _, completion = text.partition("<think>")
        trace, _, answer = completion.partition("</think>")
        # Worked out here again: left to right, last digit kept.
        value, expected = int(prompt[0]), ""
        for operator, digit in zip(prompt[1:-1:2], prompt[2:-1:2], strict=True):
            value = eval(f"value {operator} {digit}") % 10
            expected += str(value)
        assert answer == expected[-1]
        assert expected.startswith(trace)
        cut += trace != expected
        # The loss is on the completion and its end, on nothing of the prompt, and on a </think>
        # only where the trace is whole: a cut is forced, never the model's own choice.
        decoded = data.tokenizer.decode(learned.tolist(), skip_special_tokens=False)
        assert decoded == f"{trace}{'</think>' if trace == expected else ''}{answer}<eos>"
    assert 0.2 < cut / 64 < 0.7  # half are cut at random, some of those at their full length


def test_task_example_beyond_the_context_is_named():
    with pytest.raises(
        ValueError,
        match=r"100% of the examples of last_digit .* context, which is 8; .* longest has \d+",
    ):
        load_data(preset("tiny", data="task:last_digit", context=8))


def test_problems_beyond_the_context_are_left_out_and_told(capsys):
    config = preset("tiny", data="task:last_digit", batch_size=64)
    whole = load_data(config).batch(3).tokens
    widths = (whole != load_data(config).vocabulary.id("<eos>")).sum(1)
    context = int(widths.sort().values[50])
    capsys.readouterr()
    data = load_data(preset("tiny", data="task:last_digit", batch_size=64, context=context))
    assert "are longer than the context" in capsys.readouterr().out
    fits = widths <= context
    for step in (3, 0, 3):
        tokens = data.batch(step).tokens
        assert tokens.shape[0] == 64 and tokens.shape[1] <= context
        assert (tokens != data.vocabulary.id("<eos>")).sum(1).max() <= context
    assert torch.equal(tokens[: fits.sum(), :context], whole[fits][:, :context])
    assert next(data.validation()).tokens.shape[0] > 100


def test_a_file_of_problems_is_known_by_its_content(tmp_path):
    rows = [{"question": f"{i} + 1?", "answer": f"one more\n#### {i + 1}"} for i in range(200)]
    found = []
    for order in (1, -1, 1):
        file = tmp_path / "sums.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows[::order]))
        config = preset("tiny", data=f"task:gsm8k:{file}", context=64)
        found.append(load_data(config).fingerprint)
    assert found[0] == found[2] != found[1]


OWN = """
from pathlib import Path

from ponder.tasks.countdown import Countdown


class Mine(Countdown):
    def problems(self, split, count, seed):
        return super().problems(split, count, int(Path({seed!r}).read_text()))
{more}"""


@pytest.mark.parametrize("fields", [dict(), dict(verifier="process")])
def test_a_task_of_one_s_own_is_known_by_its_code_and_what_it_reads(tmp_path, fields):
    seed = tmp_path / "seed"

    def fingerprint(read: str, more=""):
        seed.write_text(read)
        (tmp_path / "own.py").write_text(OWN.format(seed=str(seed), more=more))
        data = f"task:{tmp_path / 'own.py'}:Mine:traces=path"
        return load_data(preset("tiny", data=data, context=96, **fields)).fingerprint

    first, says = fingerprint("1"), f"    content = Path({str(seed)!r}).read_text()[:1]\n"
    assert first == fingerprint("1") and first not in (fingerprint("2"), fingerprint("1", "# more"))
    said = fingerprint("1", says)  # by the task, which knows better than a few problems do
    assert said == fingerprint("12", says) and said != fingerprint("2", says)
    assert said != fingerprint("1", f"{says}# more")


def test_the_largest_part_of_a_mixture_is_there(tmp_path):
    few, many = tmp_path / "few.jsonl", tmp_path / "many.txt"
    few.write_text("".join(json.dumps({"text": "to be or not " * 3}) + "\n" for _ in range(3)))
    many.write_text(TEXT)
    config = preset("tiny", data=(f"jsonl:{few}", f"text:{many}"), context=48, batch_size=8)
    load_data(replace(config, weights=(0.25, 0.75)))
    with pytest.raises(ValueError, match=r"fills 2 rows of 48 tokens, and a batch takes 3"):
        load_data(replace(config, weights=(0.3, 0.7)))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, "there is no text file"),
        ("empty.txt", b"", "is empty"),
        ("latin.txt", b"caf\xe9", "is not UTF-8: byte 3"),
        ("short.txt", b"to be", "a context of 64 needs at least 65"),
    ],
)
def test_text_that_cannot_be_trained_on(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_data(preset("tiny", data=f"text:{path}"))


def test_unknown_task_names_the_known_ones():
    with pytest.raises(ValueError, match="last_digit"):
        load_data(preset("tiny", data="task:chess"))


# What 0.1.0 gave: a run of then is the same run now.
GOLDEN = [
    (dict(data="task:last_digit"), "355a3f68258bc372", "15ffa39402a0dc9f"),
    (dict(data="task:permute", context=160), "d1ef08a5aa1b7057", "e7251c844a710291"),
    (dict(), "c0725c3b30e3e103", "cafb80169ddf8dbb"),
    (dict(tokenizer="bpe:300", context=32), "3039fefdd96dc5f5", "b8aef36072f8ccb7"),
]


def hashed(batch: Batch) -> str:
    arrays = (x.contiguous().numpy().tobytes() for x in (batch.tokens, batch.targets))
    return hashlib.sha256(b"".join(arrays)).hexdigest()[:16]


@pytest.mark.parametrize(("fields", "first", "last"), GOLDEN)
def test_the_same_seed_gives_the_same_batches_from_version_to_version(fields, first, last, text):
    data = load_data(preset("tiny", **{"data": text} | fields))
    assert hashed(data.batch(0)) == first
    assert hashed(join([*data.validation()], pad=0)) == last


class Counting:
    """A source that tells what it was asked for."""

    fingerprint = "counting"

    def __init__(self):
        self.asked = []

    def rows(self, step, start, count):
        self.asked.append((start, count))
        return Batch(torch.zeros(count, 4), torch.zeros(count, 4))


weights = st.lists(st.floats(0.01, 100), min_size=1, max_size=5)


@given(weights, st.integers(1, 40), st.lists(st.integers(0, 10**9), min_size=1, max_size=5))
@settings(max_examples=100, deadline=None)
def test_a_mixture_takes_every_source_in_order_and_by_weight(shares, batch_size, steps):
    sources = [Counting() for _ in shares]
    config = TrainConfig(batch_size=batch_size)
    data = Data(config, Vocabulary(character_tokenizer("a")), sources, shares)
    for step in steps:
        before, after = (data.given((step + i) * batch_size) for i in (0, 1))
        assert len(data.batch(step).tokens) == batch_size
        for source, start, end in zip(sources, before, after, strict=True):
            if end > start:  # exactly what comes behind the step before
                assert source.asked.pop() == (start, end - start)
            assert not source.asked
        for share, count in zip(shares, after, strict=True):
            rows = (step + 1) * batch_size
            rounding = len(shares) + rows * len(shares) / 2**20
            assert abs(count - rows * share / sum(shares)) <= rounding


def test_a_text_and_a_task_share_batches_and_a_vocabulary(text):
    config = preset("tiny", data=(text, "task:last_digit"), weights=(3, 1), batch_size=8)
    data = load_data(config)
    batch = data.batch(5)
    assert batch.segment_ids is None and batch.tokens.shape == (8, 64)
    rows = [data.tokenizer.decode(row, skip_special_tokens=False) for row in batch.tokens.tolist()]
    assert all(row in TEXT for row in rows[:6])
    assert all("<think>" in row and row[0].isdigit() for row in rows[6:])
    assert (batch.targets[6:, -8:] == IGNORE).all()  # a task's rows are the shorter ones
    assert hashed(batch) == hashed(load_data(config).batch(5))
    counts = [int((part.targets != IGNORE).sum()) for part in data.validation()]
    assert sum(counts) > len(data.sources[0].held_out) - 1  # both validate


def test_fingerprints_tell_data_apart(text, tmp_path):
    copy = tmp_path / "copy.txt"
    copy.write_text(TEXT)
    prints = [
        load_data(preset("tiny", data=data, context=32, **changes)).fingerprint
        for data, changes in [
            (text, {}),
            (f"text:{copy}", {}),
            (text, dict(tokenizer="byte")),
            ((text, "task:last_digit"), {}),
        ]
    ]
    assert prints[0] == prints[1] and len(set(prints)) == 3


@pytest.mark.parametrize("name", ["last_digit", "permute", "multiply", "countdown"])
def test_retries_show_attempts_and_teach_the_right_ones(name):
    config = preset("tiny", data=f"task:{name}", batch_size=96, context=4096, retries=0.5)
    data, task = load_data(config), tasks.get(name)
    tokens, targets, _ = data.batch(0)
    plain = kinds = noticed = 0
    for row, target in zip(tokens.tolist(), targets.tolist(), strict=True):
        text = data.tokenizer.decode(row, skip_special_tokens=False)
        prompt, _, completion = text.partition("<think>")
        thought, _, answer = completion.partition("</think>")
        *attempts, last = thought.split(task.cue)
        if not attempts:
            plain += 1
            continue
        wanted = ""
        for attempt in attempts:
            wrong = attempt != last
            kinds += wrong
            noticed += not wrong
            wanted += task.cue if wrong else attempt
        wanted += f"{last}</think>{answer.split('<eos>')[0]}<eos>"
        learned = [t for t in target if t != IGNORE]
        assert data.tokenizer.decode(learned, skip_special_tokens=False) == wanted
        # Every target is the token behind its own.
        assert all(t in (IGNORE, after) for t, after in zip(target, row[1:], strict=False))
    assert 30 < plain < 66 and kinds > 20 and noticed > 20


def test_retries_keep_to_the_context_and_to_tasks_that_know_some(tmp_path, monkeypatch):
    longest = max(
        len(p.prompt) + p.difficulty for p in tasks.get("last_digit").problems("train", 999, 0)
    )
    data = load_data(preset("tiny", data="task:last_digit", context=longest + 12, retries=1.0))
    several = 0
    for step in range(20):
        tokens = data.batch(step).tokens
        assert tokens.shape[1] <= longest + 12
        thoughts = data.tokenizer.decode(tokens.flatten().tolist(), skip_special_tokens=False)
        several += len(re.findall("<think>[0-9]*=", thoughts))
    assert several
    ids = {token: i for i, token in enumerate([*"0123456789+-*=", "=1", *SPECIAL])}
    joined = Tokenizer(models.BPE(ids, [("=", "1")], unk_token="<unk>"))
    joined.add_special_tokens(list(SPECIAL))
    joined.save(str(tmp_path / "tokenizer.json"))
    config = preset("tiny", data="task:last_digit", tokenizer=str(tmp_path), retries=1.0)
    with pytest.raises(
        ValueError, match="joins the cue with its neighbours: take --tokenizer char"
    ):
        load_data(config).batch(0)
    outside = SimpleNamespace(name="outside", alphabet="ab")
    monkeypatch.setattr("ponder.training.problems.tasks.get", lambda name, **_: outside)
    with pytest.raises(ValueError, match="retries is 1.0; outside has no wrong attempts to show"):
        load_data(preset("tiny", data="task:outside", tokenizer="byte", retries=1.0))
    with pytest.raises(ValueError, match="retries is 2.0; it must be from 0 to 1"):
        preset("tiny", retries=2.0).check()


def test_a_task_that_holds_out_few_problems_is_validated_on_them(tmp_path, monkeypatch):
    """369 of two digits: it used to end, after the last step, for want of 1,024."""
    config = preset("tiny", data="task:multiply:digits=2-2", out=tmp_path)
    monkeypatch.setattr("ponder.tasks.task.PATIENCE", 200)
    batches = [*load_data(config).validation()]
    assert sum(len(batch.tokens) for batch in batches) == 369
    assert all((batch.targets != IGNORE).any(1).all() for batch in batches)


def test_a_task_is_validated_in_batches_that_fit_as_a_text_s_do():
    data = load_data(preset("tiny", data="task:multiply", context=512))
    batches = [*data.validation()]
    assert sum(len(batch.tokens) for batch in batches) == 1024
    assert max(batch.tokens.numel() for batch in batches) <= 8192


def test_rows_are_no_wider_than_the_context():
    data = load_data(preset("tiny", data="task:countdown", context=100))
    widths = [data.batch(step).tokens.shape[1] for step in range(5)]
    assert max(widths) == 100
    assert max(batch.tokens.shape[1] for batch in data.validation()) == 100


def test_a_row_s_tokens_are_those_of_its_text_alone(tmp_path):
    """Whatever a tokenizer puts before a text, or before its first word alone."""
    ids = {token: i for i, token in enumerate([*SPECIAL, "<s>", "▁", *"0123456789+-*="])}
    tokenizer = Tokenizer(models.BPE(ids, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A <eos>", special_tokens=[("<s>", ids["<s>"]), ("<eos>", ids["<eos>"])]
    )
    tokenizer.add_special_tokens([*SPECIAL, "<s>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    data = load_data(preset("tiny", data="task:last_digit", tokenizer=str(tmp_path)))
    for row in data.batch(0).tokens.tolist():
        assert row[:2] == [ids["<s>"], ids["▁"]] and row.count(ids["▁"]) == 1


def test_what_a_tokenizer_does_not_know_is_told(text, tmp_path, capsys):
    path = str(tmp_path / "tokenizer.json")
    character_tokenizer(set(TEXT + "0123456789+-") - {"q", "."}).save(path)
    load_data(preset("tiny", data=text, tokenizer=path))
    assert "; 80 tokens are <unk>" in capsys.readouterr().out
    with pytest.raises(ValueError, match="does not know the characters '[*]=' of last_digit"):
        load_data(preset("tiny", data="task:last_digit", tokenizer=path))


def test_data_that_a_tokenizer_hardly_knows_are_refused(text, tmp_path):
    path = str(tmp_path / "tokenizer.json")
    character_tokenizer("Tobe .").save(path)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"xyz {i}"}) + "\n" for i in range(90)))
    for name, share in ((text, 49), (f"jsonl:{rows}", 71)):
        with pytest.raises(ValueError) as error:
            load_data(preset("tiny", data=name, tokenizer=path))
        assert str(error.value) == (
            f"{share}% of the tokens of {name} are <unk>: the tokenizer {path} does not know its "
            "characters; take another, such as --tokenizer byte, which knows any text"
        )
    with pytest.raises(ValueError, match="runs/x cannot learn this text: train a new model"):
        load_data(preset("tiny", data=text, tokenizer=path, init="runs/x"))


def test_how_often_data_are_seen_is_told(text, tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(40 * (json.dumps({"text": "to be " * 10}) + "\n"))
    names = (text, f"jsonl:{rows}", "task:last_digit")
    data = load_data(preset("tiny", data=names, weights=(2, 1, 1), steps=50, batch_size=4))
    assert data.passes(50) == [100 * 64 / int(0.9 * len(TEXT)), 50 / 38, None]
    said = capsys.readouterr().out.splitlines()
    assert said[0].endswith("; 50 steps make 4.1 passes over it")
    assert said[1].endswith("; 50 steps make 1.3 passes over it")
    assert said[2].endswith("new problems at every step")


def test_a_text_that_happens_to_hold_a_thought_is_told(tmp_path, capsys):
    poem, worked = tmp_path / "poem.txt", tmp_path / "worked.jsonl"
    poem.write_text(TEXT + "Models write <think> first." + TEXT)
    worked.write_text(90 * (json.dumps({"question": "1?", "answer": "one\n#### 1"}) + "\n"))
    load_data(preset("tiny", data=(f"text:{poem}", f"jsonl:{worked}")))
    said = capsys.readouterr().out
    assert f"text:{poem} holds <think>, which becomes a token of its own" in said
    assert said.count("holds <think>") == 1
