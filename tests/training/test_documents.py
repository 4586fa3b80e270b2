"""Data sets of documents, from their files to batches: GSM8K, Parquet, folders, streams."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import processors
from transformers import AutoTokenizer

import ponder
from ponder import tasks
from ponder.models import GPT, hub
from ponder.training import preset
from ponder.training.data import IGNORE, load_data
from ponder.training.journal import read_rows
from ponder.training.loop import model_config, train
from ponder.training.sources import open_rows
from ponder.training.tokenizer import byte_tokenizer
from ponder.training.tokens import hold_out

GSM8K = Path(ponder.__file__).parent.parent / "shared/data/gsm8k_train.jsonl"


def write(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def sums(count: int) -> list[dict]:
    return [{"prompt": f"{n}+{n + 1}=", "completion": str(2 * n + 1)} for n in range(count)]


def load(path, kind="jsonl", **changes):
    return load_data(preset("tiny", **dict(data=f"{kind}:{path}", full_traces=1.0) | changes))


def documents(data, batches) -> list[tuple[str, str]]:
    """The documents of batches: what they say, and what of it is learned."""
    found = []
    for batch in batches:
        for tokens, targets, ids in zip(*batch, strict=True):
            for segment in range(int(ids.max()) + 1):
                here = ids == segment
                learned = targets[here & (targets != IGNORE)].tolist()
                if learned:
                    both = tokens[here].tolist() + learned[-1:], learned
                    found.append(
                        tuple(data.tokenizer.decode(x, skip_special_tokens=False) for x in both)
                    )
    return found


def epoch(data, number: int) -> list:
    """The rows of one epoch, each as a batch."""
    source = data.sources[0]
    rows = len(source.train)
    return [source.rows(0, number * rows + i, 1) for i in range(rows)]


@pytest.fixture(scope="module")
def gsm8k(tmp_path_factory):
    if not GSM8K.exists():
        pytest.skip("GSM8K's training split is not there")
    lines = GSM8K.read_text().splitlines()[:300]
    return write(tmp_path_factory.mktemp("gsm8k") / "train.jsonl", map(json.loads, lines))


def test_gsm8k_is_learned_as_the_task_asks_it(gsm8k):
    """To the character; and what the task holds out for sweeps is not learned."""
    data = load(gsm8k, context=1024, tokenizer="bpe:400", batch_size=4)
    task, rows = tasks.get(f"gsm8k:{gsm8k}"), map(json.loads, gsm8k.read_text().splitlines())
    said = {row["question"].strip(): row["answer"].rpartition("#### ")[2] for row in rows}
    learned = dict(documents(data, epoch(data, 0)))
    held_out = dict(documents(data, data.validation()))
    count = 0
    for split, texts in (("train", learned), ("val", held_out), ("test", held_out)):
        for problem in tasks.at_most(task, split, 300, 0):
            answer = said[problem.prompt.strip()]
            assert answer.replace(",", "") == problem.answer
            completion = f"{task.trace(problem)}</think>{answer}<eos>"
            assert texts[f"{problem.prompt}<think>{completion}"] == completion
            count += split != "train"
    assert len(held_out) == count > 10
    assert len(learned) + len(held_out) == len(said)
    assert not held_out.keys() & {text for text, _ in documents(data, epoch(data, 1))}


def test_no_question_of_a_sweep_is_learned_where_they_are_more_than_validate(tmp_path, monkeypatch):
    monkeypatch.setattr("ponder.training.tokens.VALIDATION_TOKENS", 100)
    rows = [dict(question=f"{n} + {n}?", answer=f"#### {2 * n}") for n in range(300)]
    path = write(tmp_path / "a.jsonl", rows)
    data, task = load(path), tasks.get(f"gsm8k:{path}")
    learned = {text.partition("<think>")[0] for text, _ in documents(data, epoch(data, 0))}
    assert learned == {p.prompt for p in task.problems("train", 300, 0)}
    held_out = [text for text, _ in documents(data, data.validation())]
    assert 3 < len(held_out) < 10


def test_gsm8k_chains_are_cut_in_training_alone(gsm8k):
    whole = load(gsm8k, context=1024, tokenizer="bpe:400", batch_size=4)
    data = load(gsm8k, context=1024, tokenizer="bpe:400", batch_size=4, full_traces=0.5)
    say = [learned for _, learned in documents(whole, epoch(whole, 0))]
    cut = [learned for _, learned in documents(data, epoch(data, 0))]
    assert len(say) == len(cut)
    unchanged = sum(a == b for a, b in zip(say, cut, strict=True))
    assert 0.35 < unchanged / len(say) < 0.65
    for a, b in zip(say, cut, strict=True):
        if a != b:
            answer = a.partition("</think>")[2]
            assert "</think>" not in b and b.endswith(answer)
            assert a.startswith(b.removesuffix(answer).rstrip("\ufffd"))
    for one, two in zip(whole.validation(), data.validation(), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_what_learned_conversations_is_asked_as_it_learned(tmp_path):
    """The saved folder's chat template writes the prompts that stood in the rows."""
    said = [dict(role="user", content=f"{n}+1?") for n in range(99)]
    rows = [dict(messages=[turn, dict(role="assistant", content="a")]) for turn in said]
    path = write(tmp_path / "a.jsonl", rows)
    changes = dict(steps=1, eval_every=0, tokenizer="byte", precision="fp32")
    folder = train(preset("tiny", data=f"jsonl:{path}", out=tmp_path / "run", **changes))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    asked = tokenizer.apply_chat_template(said[:1], add_generation_prompt=True, tokenize=False)
    assert asked == "user: 0+1?\nassistant:"
    data = load(path, tokenizer="byte")
    texts = [whole for whole, _ in documents(data, [*epoch(data, 0), *data.validation()])]
    assert sum(text.startswith(asked) for text in texts) == 1
    assert load(write(path, sums(99))).template is None


def test_a_template_for_what_was_learned_without_one_is_told(tmp_path, capsys):
    turns = [dict(role="user", content="1+1?"), dict(role="assistant", content="2")]
    chats = write(tmp_path / "chats.jsonl", [dict(messages=turns)] * 99)
    both = (f"jsonl:{chats}", f"jsonl:{write(tmp_path / 'a.jsonl', sums(200))}", "task:last_digit")
    for data, told in ((both, 1), (both[:1], 0), (both[1:], 0)):
        load_data(preset("tiny", data=data, batch_size=6))
        assert capsys.readouterr().out.count("a.jsonl and task:last_digit teaches without") == told


def test_a_thought_that_inference_opens_and_no_row_has_is_told(tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", sums(200))
    for thinks in (True, False):
        byte_tokenizer(thinks=thinks).save(str(tmp_path / "tokenizer.json"))
        load(path, tokenizer=str(tmp_path))
        assert ("open a thought behind each prompt" in capsys.readouterr().out) == thinks


@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("writes", [False, True])
@pytest.mark.parametrize("end", ["<end>\n", ""])
def test_a_conversation_begins_and_ends_as_its_template_says(tmp_path, adds, writes, end):
    """Whether tokenizer or template begins a text with <s>, and whatever ends the texts."""
    tokenizer = byte_tokenizer(thinks=False)
    tokenizer.add_special_tokens(["<s>", "<end>"])
    begin = "<s>" if adds else ""
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A".strip(), special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    template = "{{ bos_token }}" * writes + "{% for m in messages %}{{ m.role[0] + m.content }}"
    template += end + "{% endfor %}{% if add_generation_prompt %}a{% endif %}"
    settings = dict(bos_token="<s>", eos_token="<eos>", chat_template=template)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    said = dict(role="user", content="1+1?")
    turns = [said, dict(role="assistant", content="2")] * 2
    path = write(tmp_path / "a.jsonl", [dict(messages=turns)] * 200)
    changes = dict(data=f"jsonl:{path}", tokenizer=str(tmp_path), precision="fp32", samples=0)
    folder = train(preset("tiny", out=tmp_path / "run", steps=1, eval_every=0, **changes))
    asks = AutoTokenizer.from_pretrained(folder)
    asked = asks.apply_chat_template([said], add_generation_prompt=True, tokenize=False)
    asked = asks.encode(asked, add_special_tokens=False)
    stop = "<end>" if end else "<eos>"
    assert hub.load_ends(folder, asks.backend_tokenizer) == (asks.convert_tokens_to_ids(stop),)
    data = load_data(preset("tiny", **changes))
    batch = next(data.validation())
    tokens, targets, ids = (x[0] for x in batch)
    assert tokens[: len(asked)].tolist() == asked
    for segment in ids.unique()[:-1]:
        here = (ids == segment) & (targets != IGNORE)
        learned = data.tokenizer.decode(targets[here].tolist(), skip_special_tokens=False)
        assert learned.count(f"2{stop}") == learned.count("2") > 0


@pytest.mark.parametrize("thinks", [False, True])
def test_conversations_have_tokens_for_thoughts_where_they_hold_any(tmp_path, thinks):
    thought = "<think>one more</think>" if thinks else ""
    turns = [
        [dict(role="user", content=f"{n}+1?"), dict(role="assistant", content=f"{thought}{n + 1}")]
        for n in range(99)
    ]
    path = write(tmp_path / "a.jsonl", [dict(messages=said) for said in turns])
    data = load(path, tokenizer="char")
    assert (data.tokenizer.token_to_id("<think>") is not None) == thinks
    texts = [whole for whole, _ in documents(data, [*epoch(data, 0), *data.validation()])]
    assert len(texts) == 99 and all(text.count("<think>") == thinks for text in texts)
    (tmp_path / "a.txt").write_text(f"{thought}and more. " * 99)
    text = load(tmp_path / "a.txt", "text", context=16)
    assert (text.tokenizer.token_to_id("<think>") is not None) == thinks


def test_gsm8k_trains(gsm8k, tmp_path):
    changes = dict(context=256, tokenizer="bpe:400", steps=40, log_every=5, eval_every=0)
    config = preset("tiny", data=f"jsonl:{gsm8k}", out=tmp_path, precision="fp32", **changes)
    train(config)
    rows = read_rows(tmp_path / "train/metrics.jsonl")
    assert rows[0]["train_loss"] > 5 and rows[-1]["train_loss"] < rows[0]["train_loss"] - 1
    assert rows[-1]["val_loss"] < rows[0]["train_loss"] - 1


def test_every_row_once_an_epoch_each_in_an_order_of_its_own(tmp_path):
    data = load(write(tmp_path / "a.jsonl", sums(200)), context=16, batch_size=7)
    rows = len(data.sources[0].train)
    flat = torch.cat([data.batch(step).tokens for step in range(3 * rows // 7 + 1)])
    epochs = [flat[i * rows : (i + 1) * rows].tolist() for i in range(3)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])
    assert epochs[0] != epochs[1] != epochs[2]
    other = load(tmp_path / "a.jsonl", context=16, batch_size=7, seed=1)
    assert not torch.equal(other.batch(0).tokens, data.batch(0).tokens)


def test_batches_are_the_same_with_the_cache_and_without(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", sums(100))
    fresh = load(path, context=16)
    from ponder.training import documents

    def never(*_):
        raise AssertionError("tokenized again")

    with monkeypatch.context() as patch:
        patch.setattr(documents, "tokenize", never)
        patch.setattr(documents, "pack", never)
        again = load(path, context=16)
    monkeypatch.setenv("PONDER_CACHE", str(tmp_path / "another"))
    anew = load(path, context=16)
    assert fresh.fingerprint == again.fingerprint == anew.fingerprint
    for step in (0, 9, 3):
        batches = [data.batch(step) for data in (fresh, again, anew)]
        for other in batches[1:]:
            assert all(torch.equal(a, b) for a, b in zip(batches[0], other, strict=True))
    packed = again.sources[0].train
    for array in (packed.tokens, packed.loss, packed.start, packed.length, packed.ends):
        assert isinstance(array, np.memmap)  # on disk until it is asked for


def test_a_changed_file_is_tokenized_anew(tmp_path):
    path = write(tmp_path / "a.jsonl", sums(50))
    before = load(path, context=16).fingerprint
    write(path, sums(51))
    data = load(path, context=16)
    assert data.fingerprint != before and "50+51=" in str(
        documents(data, epoch(data, 0)) + documents(data, data.validation())
    )


def test_packed_documents_are_as_if_alone(tmp_path):
    data = load(write(tmp_path / "a.jsonl", sums(60)), context=32, batch_size=2)
    torch.manual_seed(0)
    model = GPT(model_config(data.sources[0].config, data.vocabulary.size)).eval()
    for p in model.parameters():  # outputs start at zero, and would attend to nothing
        torch.nn.init.normal_(p, std=0.2)
    batch = data.batch(0)
    assert int(batch.segment_ids[0].max()) > 2
    packed = model(*batch, reduction="sum")
    alone = torch.zeros(())
    for tokens, targets, ids in zip(*batch, strict=True):
        for segment in ids.unique():  # padding too, which has no targets
            here = ids == segment
            alone += model(tokens[here][None], targets[here][None], reduction="sum")
    torch.testing.assert_close(packed, alone)
    assert not torch.allclose(packed, model(*batch[:2], reduction="sum"), rtol=1e-3)


def test_an_answer_is_learned_where_its_prompt_is_seen(tmp_path, capsys):
    """What a context cuts off a masked document would be learned without its question."""
    answers = ["!" * 4, "!" * 40, "!" * 8]
    rows = [
        {"prompt": "?" * n, "completion": a} for n, a in zip((100, 4, 12), answers, strict=True)
    ]
    path = write(tmp_path / "a.jsonl", rows * 4 + sums(40))
    data = load(path, context=16)
    batches = [*epoch(data, 0), *data.validation()]
    for batch in batches:
        assert (batch.targets != IGNORE).any()
    long = [said for said in documents(data, batches) if "!" in said[1]]
    assert set(long) == {("?" * 12 + "!" * 5, "!" * 5), ("?" * 4 + "!" * 13, "!" * 13)}
    assert len(long) == 8
    assert "12 documents are longer than the context of 16 and cut: what is beyond it is not " in (
        capsys.readouterr().out
    )
    far = write(tmp_path / "far.jsonl", rows[:1] * 40)
    with pytest.raises(ValueError, match="to train on hold nothing to learn in their first 16 tok"):
        load(far, context=16)
    texts = write(tmp_path / "b.jsonl", [{"text": "abcd" * 10}] * 40)
    whole = load(texts, context=16, batch_size=4)  # of plain texts every piece is learned
    assert len(documents(whole, epoch(whole, 0))) == 3 * 38
    assert "and cut (the longest has 40 tokens)" in capsys.readouterr().out


def test_held_out_documents_are_few_and_no_ones_twins():
    keys = np.random.default_rng(0).integers(2**63, size=2000).astype(np.uint64)
    keys[1000:] = keys[:1000]
    held_out = hold_out(keys, np.full(2000, 10))
    assert 80 <= held_out.sum() <= 102
    assert not set(keys[held_out].tolist()) & set(keys[~held_out].tolist())
    # One key alone cannot keep its documents together.
    assert hold_out(np.zeros(100, dtype=np.uint64), np.full(100, 10)).sum() == 5
    assert hold_out(keys[:3], np.array([5, 5, 5])).sum() == 1
    # One long document is no validation set, whatever its hash.
    lengths = np.full(200, 10)
    lengths[keys[:200].argmin()] = 10_000
    assert 200 < lengths[hold_out(keys[:200], lengths)].sum() <= 600
    assert np.flatnonzero(hold_out(keys[:2], np.array([9, 7]))).tolist() == [1]
    assert hold_out(keys[:1000], np.full(1000, 10**6)).sum() == 1  # a million tokens are enough
    # Nor does it hold out all the others, of which no share of the tokens is as much.
    lengths[:] = 10
    lengths[7] = 10**6
    assert hold_out(keys[:200], lengths).sum() == 50


def test_parquet_gives_what_json_lines_give(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    import pyarrow

    rows = sums(80)
    parquet.write_table(pyarrow.Table.from_pylist(rows[:50]), tmp_path / "a.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(rows[50:]), tmp_path / "b.parquet")
    one = load(tmp_path / "*.parquet", "parquet", context=16)
    two = load(write(tmp_path / "rows.jsonl", rows), context=16)
    assert one.fingerprint == two.fingerprint
    assert torch.equal(one.batch(3).tokens, two.batch(3).tokens)
    (tmp_path / "b.parquet").write_bytes((tmp_path / "b.parquet").read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"b\.parquet cannot be read as Parquet after row 0"):
        load(tmp_path / "*.parquet", "parquet", context=16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    pytest.importorskip("datasets", reason="datasets is not installed")
    folder = tmp_path_factory.mktemp("hub")
    texts = [{"text": f"Now is the winter of our discontent number {i}"} for i in range(40)]
    write(folder / "train.jsonl", texts)
    write(folder / "validation.jsonl", [{"text": "Made glorious summer"}] * 2)
    return folder


@pytest.mark.parametrize("bound", [0, 10**6])
def test_hub_data_from_a_local_folder(folder, bound):
    data = load(folder, "hub", data_tokens=bound)
    say = documents(data, epoch(data, 0))
    assert sorted(text for text, _ in say) == sorted(
        f"Now is the winter of our discontent number {i}<eos>" for i in range(40)
    )
    assert [text for text, _ in documents(data, data.validation())] == [
        "Made glorious summer<eos>"
    ] * 2
    with pytest.raises(ValueError, match="train row 1 has no column 'story'; it has text"):
        load(f"{folder}:story", "hub", data_tokens=bound)


def test_held_out_documents_with_nothing_to_learn_are_told(tmp_path):
    pytest.importorskip("datasets", reason="datasets is not installed")
    write(tmp_path / "train.jsonl", sums(40))
    write(tmp_path / "validation.jsonl", [{"prompt": "", "completion": ""}])
    with pytest.raises(ValueError, match="held out hold nothing to learn in their first 16 tokens"):
        load(tmp_path, "hub", context=16)


def test_a_stream_ends_when_there_are_tokens_enough(folder):
    data = load(folder, "hub", data_tokens=200, batch_size=1)
    say = documents(data, epoch(data, 0))
    # 45 characters each, and <eos>: the fifth one passes the bound, in the order of the data.
    assert sorted(text[-6:] for text, _ in say) == [f"{i}<eos>" for i in range(5)]


def test_a_colon_in_a_pattern_is_no_column(tmp_path):
    (tmp_path / "c:1").mkdir()
    write(tmp_path / "c:1" / "a.jsonl", [{"text": f"Poem {i}", "story": f"{i}"} for i in range(40)])
    for column, longest in (("", 12), (":story", 7)):
        data = load(f"{tmp_path}/c:1/*.jsonl{column}", batch_size=1)
        assert max(len(text) for text, _ in documents(data, epoch(data, 0))) == longest


def test_a_pattern_of_text_files_is_documents(tmp_path):
    for i in range(4):
        (tmp_path / f"{i}.txt").write_text(f"Poem {i}")
    data = load(tmp_path / "*.txt", "text", batch_size=1)
    say = documents(data, epoch(data, 0)) + documents(data, data.validation())
    assert sorted(text for text, _ in say) == [f"Poem {i}<eos>" for i in range(4)]


def test_a_pattern_of_files_in_folders(tmp_path):
    """In the order of their paths; a folder that it finds is no file."""
    for name in ("b/2", "b/c/3", "1"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"book {name}")
    rows, _ = open_rows("text", f"{tmp_path}/**", stream=False)
    assert [row.values["text"] for row in rows.train()] == ["book 1", "book b/2", "book b/c/3"]
    assert rows.total() == 3


def test_documents_are_mixed_with_a_task(tmp_path):
    path = write(tmp_path / "a.jsonl", sums(200))
    config = preset("tiny", data=(f"jsonl:{path}", "task:last_digit"), batch_size=8, context=64)
    batch = load_data(config).batch(2)
    assert batch.segment_ids.shape == (8, 64)
    assert (batch.segment_ids[:4].max(1).values > 0).all()  # packed
    assert (batch.segment_ids[4:, :8] == 0).all()  # a row of a task is one document
    assert (batch.targets[batch.segment_ids == -1] == IGNORE).all()


def lines(*rows) -> bytes:
    return b"\n".join(row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows)


BAD = [
    (lines({"text": "a"}, b'{"text": '), "a.jsonl line 2 is not JSON"),
    (lines({"text": "a"}, b'{"text": "caf\xe9"}'), "a.jsonl line 2 is not UTF-8: byte 13 of it"),
    (lines({"text": "a"}, b'{"text": ' + b"9" * 5000 + b"}"), "a.jsonl line 2 cannot be read: Exc"),
    (lines({"text": "a"}, b"[" * 100_000), "a.jsonl line 2 cannot be read: maximum recursion"),
    (lines({"text": "a"}, ["a"]), "a.jsonl line 2 is a list, not an object of columns"),
    (lines({"text": "a"}, {"prompt": "a"}), "line 2 has no column 'text', which the first row has"),
    (lines({"text": "a"}, {"text": float("nan")}), "a.jsonl line 2: text is nan, which is not a"),
    (lines({"title": "a"}), "a.jsonl line 1 has the columns title; it needs messages, or prompt"),
    (b"", "holds no row; there is nothing to train on"),
    (lines({"text": ""}, {"text": ""}), "holds 0 documents; at least one to train on and one to"),
    (lines({"text": "a"}), "holds 1 documents; at least one to train on and one to validate"),
    (lines({"text": "a"}, {"text": "b"}), "fills 1 rows of 64 tokens, and a batch takes 8 of them"),
]


@pytest.mark.parametrize(("content", "message"), BAD, ids=[message for _, message in BAD])
def test_data_that_cannot_be_trained_on(tmp_path, content, message):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(ValueError) as error:
        load(tmp_path / "a.jsonl")
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("kind", "place", "message"),
    [
        ("jsonl", "missing.jsonl", "there is no file .*missing.jsonl"),
        ("parquet", "no/*.parquet", "there is no file .*no/"),
        ("jsonl", "", "is a folder; say hub:.*, which knows its splits"),
    ],
)
def test_files_that_are_not_there(tmp_path, kind, place, message):
    with pytest.raises(ValueError, match=message):
        load(tmp_path / place, kind)


def test_a_hub_data_set_that_cannot_be_fetched_is_named(monkeypatch):
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")

    def fails(*_):
        raise ConnectionError("no network\nand a long story")

    monkeypatch.setattr(datasets, "load_dataset_builder", fails)
    with pytest.raises(ValueError, match="datasets cannot load 'nobody/nothing': no network$"):
        load("nobody/nothing", "hub")
