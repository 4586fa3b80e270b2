"""Any causal model of Transformers, against ponder's own engine and against plain forward calls."""

from dataclasses import replace

import pytest
import torch

from ponder.inference.engine import SamplingParams
from ponder.inference.speaker import Ask, LocalSpeaker
from ponder.inference.transformers_engine import TransformersSpeaker


@pytest.fixture(scope="module")
def theirs(model) -> TransformersSpeaker:
    return TransformersSpeaker(str(model), slots=4, precision="fp32", budgets=True)


def asks(prompts=("3+8=", "4*2-1="), n: int = 5) -> list[Ask]:
    """Samples that differ in everything that a row may differ in."""
    kinds = [
        SamplingParams(temperature=0.0, max_tokens=20),
        SamplingParams(temperature=1.0, max_tokens=20, budget=0),
        SamplingParams(temperature=0.7, top_k=5, max_tokens=30, budget=3),
        SamplingParams(temperature=1.3, top_p=0.9, max_tokens=9),
        SamplingParams(temperature=1.0, min_p=0.05, max_tokens=20, budget=3),
    ]
    return [Ask(p, kinds[i], 7, i, key=(p, i)) for p in prompts for i in range(n)]


def by_key(completions) -> dict:
    return {c.ask.key: c for c in completions}


def test_the_samples_are_those_of_ponders_engine(model, theirs):
    ours = LocalSpeaker(str(model), slots=8, precision="fp32")
    mine, other = by_key(ours.generate(asks())), by_key(theirs.generate(asks()))
    assert mine.keys() == other.keys() and len(mine) == 10
    for key, a in mine.items():
        b = other[key]
        assert b.logprob == pytest.approx(a.logprob, abs=1e-3)
        assert replace(b, logprob=a.logprob, seconds=a.seconds) == a
    assert theirs.shape == ours.shape and theirs.identity["model"] == ours.identity["model"]


def test_a_sample_does_not_depend_on_its_neighbours(theirs):
    together = by_key(theirs.generate(asks()))
    for ask in (asks()[7], asks()[2]):
        (alone,) = theirs.generate([ask])
        assert replace(alone, seconds=0) == replace(together[ask.key], seconds=0)  # to the bit


def test_running_out_of_memory_ends_in_smaller_batches_or_a_sentence(model, theirs, capsys):
    expected = by_key(theirs.generate(asks()))
    small = TransformersSpeaker(str(model), slots=4, precision="fp32", budgets=True)
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
    with pytest.raises(ValueError, match="does not hold even 1 samples at once"):
        list(small.generate(asks()))


def test_a_watched_sample_is_shown_as_it_grows(theirs):
    pieces: list[str] = []
    ask = asks()[2]
    (whole,) = theirs.generate([ask], watch=lambda _, text: pieces.append(text))
    assert "".join(pieces) == whole.text
    assert len(pieces) == whole.sampled_tokens + whole.forced_tokens
