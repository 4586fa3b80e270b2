"""Any causal model of Transformers, against ponder's own engine and against plain forward calls."""

import json
import shutil
import sqlite3
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models

from ponder.inference.config import SweepConfig
from ponder.inference.engine import SamplingParams
from ponder.inference.local import LocalSpeaker
from ponder.inference.machine import model_hash
from ponder.inference.speaker import Ask
from ponder.inference.sweep import sweep
from ponder.inference.transformers_engine import TransformersSpeaker
from ponder.models.auto import CACHE
from ponder.training.tokenizer import character_tokenizer

from .conftest import save_random
from .test_sweep import samples


@pytest.fixture(scope="module")
def theirs(model) -> TransformersSpeaker:
    return TransformersSpeaker(str(model), slots=4, precision="fp32", budgets=True, cue="=-")


def asks(prompts=("3+8=", "4*2-1="), n: int = 6) -> list[Ask]:
    """Samples that differ in everything that a row may differ in."""
    kinds = [
        SamplingParams(temperature=0.0, max_tokens=20),
        SamplingParams(temperature=1.0, max_tokens=20, budget=0),
        SamplingParams(temperature=0.7, top_k=5, max_tokens=30, budget=3),
        SamplingParams(temperature=1.3, top_p=0.9, max_tokens=9),
        SamplingParams(temperature=1.0, min_p=0.05, max_tokens=20, budget=3),
        SamplingParams(temperature=1.0, max_tokens=40, extend=2),
    ]
    return [Ask(p, kinds[i], 7, i, key=(p, i)) for p in prompts for i in range(n)]


def by_key(completions) -> dict:
    return {c.ask.key: c for c in completions}


def test_the_samples_are_those_of_ponders_engine(model, theirs):
    ours = LocalSpeaker(str(model), slots=8, precision="fp32", cue="=-")
    mine, other = by_key(ours.generate(asks())), by_key(theirs.generate(asks()))
    assert mine.keys() == other.keys() and len(mine) == 12
    assert {mine[p, 5].forced_tokens for p, _ in mine} & {2, 4}  # a cue, or two
    for key, a in mine.items():
        b = other[key]
        assert b.logprob == pytest.approx(a.logprob, abs=1e-3)
        assert replace(b, logprob=a.logprob, seconds=a.seconds) == a
    assert theirs.shape == ours.shape and theirs.identity["model"] == ours.identity["model"]


def test_a_model_that_only_ponder_has_is_sampled_alike(tmp_path):
    words = character_tokenizer("0123456789+-*=", thinks=False)
    save_random(tmp_path, words, gated=False, activation="relu2")
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "ponder"
    theirs = TransformersSpeaker(str(tmp_path), slots=4, precision="fp32")
    ours = LocalSpeaker(str(tmp_path), slots=8, precision="fp32")
    params = SamplingParams(temperature=0.7, max_tokens=20)
    drawn = [Ask("3+8=", params, 7, i, key=i) for i in range(6)]
    mine, other = by_key(ours.generate(drawn)), by_key(theirs.generate(drawn))
    assert {k: c.text for k, c in mine.items()} == {k: c.text for k, c in other.items()}
    assert len({c.text for c in mine.values()}) > 1

    forward = theirs.model.forward
    theirs.model.forward = lambda *args, **options: replace(
        forward(*args, **options), **{CACHE: None}
    )
    with pytest.raises(ValueError, match="keeps no cache; samples of it cannot be drawn"):
        list(theirs.generate(drawn))


def test_a_sample_does_not_depend_on_its_neighbours(theirs):
    together = by_key(theirs.generate(asks()))
    for ask in (asks()[7], asks()[2]):
        (alone,) = theirs.generate([ask])
        assert replace(alone, seconds=0) == replace(together[ask.key], seconds=0)  # to the bit


def test_running_out_of_memory_ends_in_smaller_batches_or_a_sentence(model, theirs, capsys):
    expected = by_key(theirs.generate(asks()))
    small = TransformersSpeaker(str(model), slots=4, precision="fp32", budgets=True, cue="=-")
    forward = small.model.forward
    most = 2

    def forgetful(input_ids, **kwargs):
        if len(input_ids) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(input_ids=input_ids, **kwargs)

    small.model.forward = forgetful
    found = by_key(small.generate(asks()))
    assert {k: c.text for k, c in found.items()} == {k: c.text for k, c in expected.items()}
    assert "out of memory; 2 slots instead of 4" in capsys.readouterr().err
    most = 0
    with pytest.raises(ValueError, match="does not hold even one sample at once"):
        list(small.generate(asks()))


def test_a_watched_sample_is_shown_as_it_grows(theirs):
    pieces: list[str] = []
    ask = asks()[2]
    (whole,) = theirs.generate([ask], watch=lambda _, text: pieces.append(text))
    assert "".join(pieces) == whole.text
    assert len(pieces) == whole.sampled_tokens + whole.forced_tokens


TEMPLATE = "{% for m in messages %}{{ m.content }}={% endfor %}"


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory) -> str:
    """A GPT-2 with a chat template, two ends of a text, and no <think>."""
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("gpt2")
    vocabulary = {c: i for i, c in enumerate(["<eos>", "<end>", "<unk>", *"0123456789+-*=abcdef"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.add_special_tokens(["<eos>", "<end>", "<unk>"])
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>", chat_template=TEMPLATE
    )
    fast.save_pretrained(folder)
    torch.manual_seed(1)
    config = GPT2Config(
        vocab_size=len(vocabulary),
        n_positions=48,
        n_embd=32,
        n_layer=2,
        n_head=2,
        initializer_range=0.4,
        eos_token_id=0,
        bos_token_id=0,
    )
    net = GPT2LMHeadModel(config)
    net.generation_config.eos_token_id = [0, 1]
    net.save_pretrained(folder)
    return str(folder)


def test_greedy_is_what_transformers_generates(gpt2):
    speaker = TransformersSpeaker(gpt2, slots=3, precision="fp32")
    assert speaker.shape is not None and speaker.shape.n_layer == 2
    prompts = [f"{a}+{b}" for a in range(5) for b in range(4)]
    params = SamplingParams(temperature=0.0, max_tokens=25)
    ends = Counter()
    for completion in speaker.generate([Ask(p, params, 0, 0) for p in prompts]):
        prompt = completion.ask.prompt + "="
        ids = speaker.chat.tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
        with torch.inference_mode():
            (whole,) = speaker.model.generate(
                **ids, do_sample=False, max_new_tokens=25, pad_token_id=0
            )
        new = whole[len(prompt) :].tolist()
        stopped = new[-1] in (0, 1)
        ends[new[-1] if stopped else "length"] += 1
        shown = new[:-1] if stopped else new
        assert completion.text == "".join(speaker.chat.tokenizer.convert_ids_to_tokens(shown))
        assert completion.finish == ("stop" if stopped else "length")
        assert (completion.sampled_tokens, completion.think_tokens) == (len(new), 0)
        assert completion.prompt_tokens == len(prompt)
    assert len(ends) == 3  # both ends and neither were met


def test_ponders_engine_gives_the_same_samples_of_a_chat_model(gpt2):
    theirs = TransformersSpeaker(gpt2, slots=4, precision="fp32", system="0-1")
    ours = LocalSpeaker(gpt2, slots=8, precision="fp32", system="0-1")
    kinds = [
        SamplingParams(temperature=0.0, max_tokens=25),
        SamplingParams(temperature=1.0, max_tokens=25),
        SamplingParams(temperature=1.3, top_p=0.9, max_tokens=25),
    ]
    drawn = [Ask(f"{a}+{b}", kinds[a], 3, b, key=(a, b)) for a in range(3) for b in range(9)]
    mine, other = by_key(ours.generate(drawn)), by_key(theirs.generate(drawn))
    assert ours.ends == (0, 1) and {c.finish for c in mine.values()} == {"stop", "length"}
    for key, a in mine.items():
        b = other[key]
        assert b.logprob == pytest.approx(a.logprob, abs=1e-3)
        assert replace(b, logprob=a.logprob, seconds=a.seconds) == a
        assert a.prompt_tokens == len("0-1=3+2=") and a.think_tokens == 0
        assert "<think>" not in a.text
    with pytest.raises(
        ValueError, match="has no tokens <think> and </think>, which budgets and longer"
    ):
        LocalSpeaker(gpt2, slots=8, budgets=True)
    with pytest.raises(ValueError, match="has no tokens <think> and </think>"):
        LocalSpeaker(gpt2, slots=8, cue="+")
    with pytest.raises(ValueError, match="has no tokens <think> and </think>"):
        TransformersSpeaker(gpt2, slots=8, cue="+")


@pytest.mark.parametrize("budgets", [False, True])
def test_thoughts_of_a_chat_model_are_the_same_in_both_engines(tmp_path, budgets):
    save_random(tmp_path, character_tokenizer("0123456789+-*=\n"), template=TEMPLATE)
    # Its template opens no thought: it does so itself, or is made to.
    options: dict = dict(precision="fp32", budgets=budgets, system="1+2")
    theirs = TransformersSpeaker(str(tmp_path), slots=4, **options)
    ours = LocalSpeaker(str(tmp_path), slots=8, **options)
    assert ours.identity["model"] == theirs.identity["model"] == model_hash(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    assert ours.identity["model"] != model_hash(tmp_path)  # it is another one now
    budget = 4 if budgets else None
    kinds = [SamplingParams(temperature=1.0, max_tokens=40, budget=b) for b in (None, budget)]
    drawn = [Ask("3*8", kinds[i % 2], 3, i, key=i) for i in range(24)]
    mine, other = by_key(ours.generate(drawn)), by_key(theirs.generate(drawn))
    for key, a in mine.items():
        b = other[key]
        assert replace(b, logprob=a.logprob, seconds=a.seconds) == a
        assert a.text.startswith("<think>") or not budgets
        assert a.prompt_tokens == len("1+2=3*8=") + budgets * 2  # <think> and a line's end
    assert len({c.think_tokens for c in mine.values()}) > 2


def test_a_sweep_of_a_transformers_model_resumes_to_the_same_samples(gpt2, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("ponder.inference.sweep.write_report", lambda *a, **_: drawn.append(a[1]))
    # As of a model that no GPT expresses.
    monkeypatch.setattr("ponder.inference.transformers_engine.known_shape", lambda path: None)
    config = SweepConfig(
        model=gpt2,
        out=tmp_path,
        engine="transformers",
        samples=(1, 2),
        budgets=(),
        problems=3,
        max_tokens=8,
        slots=4,
    )
    sweep(config)
    whole = samples(tmp_path)
    assert len(whole) == 3 * 3
    with sqlite3.connect(tmp_path / "sweep" / "samples.sqlite") as db:
        db.execute("DELETE FROM sample WHERE rowid % 2")
    sweep(replace(config, resume=True))
    assert samples(tmp_path) == whole
    configuration = json.loads((tmp_path / "run.json").read_text())["sweep"]["configuration"]
    assert len(drawn) == 2 and all(np.isnan(row.flops_per_problem) for row in drawn[1])
    assert configuration["engine"] == "transformers" and configuration["precision"] == "fp32"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(model="nowhere"), "there is no folder nowhere"),
        (dict(budgets=(2,)), "has no tokens <think> and </think>, which budgets and longer"),
        (dict(max_tokens=60), "max_tokens is 60; after .* the context of 48"),
        (dict(task="permute"), "holds what the tokenizer of .* does not know"),
    ],
)
def test_a_model_that_cannot_be_swept_gets_one_sentence(gpt2, tmp_path, changes, message):
    settings = dict(model=gpt2, out=tmp_path / "out", engine="transformers", budgets=(), problems=3)
    with pytest.raises(ValueError, match=message) as error:
        sweep(SweepConfig(**settings | changes))
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_ponders_engine_names_the_other_one_for_a_model_it_does_not_know(gpt2, tmp_path):
    folder = tmp_path / "other"
    shutil.copytree(gpt2, folder)
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | {"model_type": "mamba"}))
    with pytest.raises(ValueError, match="model_type is 'mamba'; .*; --engine transformers takes"):
        LocalSpeaker(str(folder), slots=1)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="this is not JSON") as error:
        LocalSpeaker(str(folder), slots=1)
    assert "--engine" not in str(error.value)


def test_a_folder_without_safetensors_is_refused(gpt2, tmp_path):
    shutil.copytree(gpt2, tmp_path / "pickled")
    torch.save({}, tmp_path / "pickled" / "pytorch_model.bin")
    (tmp_path / "pickled" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="no model of .*pickled could be loaded"):
        TransformersSpeaker(str(tmp_path / "pickled"), slots=1)


def test_a_tokenizer_larger_than_the_model_is_refused(gpt2, tmp_path):
    folder = tmp_path / "grown"
    shutil.copytree(gpt2, folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens(["99"])
    tokenizer.save(str(folder / "tokenizer.json"))
    speaker = TransformersSpeaker(str(folder), slots=1)
    assert speaker.fit(["9+9"], budgets=[], max_tokens=4) == 4
    with pytest.raises(ValueError, match=r"says token 23; the model knows 0 to 22"):
        speaker.fit(["9+9", "99"], budgets=[], max_tokens=4)
