"""The local speaker, where memory runs out."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from ponder import tasks
from ponder.inference.engine import LocalEngine, SamplingParams
from ponder.inference.local import LocalSpeaker
from ponder.inference.machine import out_of_memory
from ponder.inference.slots import Slots
from ponder.inference.speaker import Ask
from ponder.training.tokenizer import character_tokenizer

from .conftest import save_random


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: not enough memory"),
        MemoryError(),
    ],
)
def test_out_of_memory_ends_in_fewer_slots_and_every_sample_once(model, monkeypatch, capsys, error):
    asks = [Ask(f"{i % 4}+8=", SamplingParams(max_tokens=12), 0, i) for i in range(40)]
    speaker = LocalSpeaker(str(model), slots=32, precision="fp32")
    whole = {c.ask: c.text for c in speaker.generate(asks)}
    generate = LocalEngine.generate
    calls: list[int] = []

    def failing(self, requests, **options):
        calls.append(self.slots)
        for n, sample in enumerate(generate(self, requests, **options)):
            if self.slots > 8 and n == 5:
                raise error
            yield sample

    monkeypatch.setattr(LocalEngine, "generate", failing)
    found = list(speaker.generate(iter(asks)))
    assert calls == [32, 16, 8]
    assert Counter(c.ask for c in found) == Counter(asks)
    assert {c.ask: c.text for c in found} == whole
    said = capsys.readouterr().err
    assert "16 slots instead of 32" in said and "8 slots instead of 16" in said


def test_memory_that_runs_out_inside_the_engine_ends_in_fewer_slots(model, monkeypatch, capsys):
    asks = [Ask(f"{i % 4}+8=", SamplingParams(max_tokens=12), 0, i) for i in range(40)]
    speaker = LocalSpeaker(str(model), slots=16, precision="fp32")
    whole = {c.ask: c.text for c in speaker.generate(asks)}
    step, steps = Slots.step, []

    def failing(self):
        steps.append(self)
        if speaker.engine.slots > 8 and len(steps) == 20:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step(self)

    monkeypatch.setattr(Slots, "step", failing)
    found = list(speaker.generate(asks))
    assert speaker.engine.slots == 8 and "8 slots instead of 16" in capsys.readouterr().err
    assert Counter(c.ask for c in found) == Counter(asks)
    assert {c.ask: c.text for c in found} == whole


def test_invariant_samples_do_not_depend_on_the_slots(model, monkeypatch):
    asks = [Ask("3+8=", SamplingParams(max_tokens=12), 0, i) for i in range(70)]
    few, many = (
        LocalSpeaker(str(model), slots=slots, precision="fp32", invariant=True)
        for slots in (8, 128)
    )
    assert (few.engine.slots, many.engine.slots) == (8, 128)

    def drawn(speaker):
        return {c.ask: replace(c, seconds=0) for c in speaker.generate(asks)}

    assert drawn(few) == drawn(many)

    def failing(self):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Slots, "step", failing)
    with pytest.raises(ValueError, match="does not hold even one sample at once"):
        list(many.generate(asks))


def test_where_nothing_helps_there_is_a_sentence_and_what_was_finished_stays(model, monkeypatch):
    speaker = LocalSpeaker(str(model), slots=8, precision="fp32")
    generate = LocalEngine.generate

    def failing(self, requests, **options):
        for n, sample in enumerate(generate(self, requests, **options)):
            if n == 3 or self.slots < 8:
                raise torch.OutOfMemoryError("CUDA out of memory")
            yield sample

    monkeypatch.setattr(LocalEngine, "generate", failing)
    found = []
    with pytest.raises(ValueError, match="the memory does not hold even one sample at once"):
        for completion in speaker.generate(
            [Ask("3+8=", SamplingParams(max_tokens=4), 0, i) for i in range(9)]
        ):
            found.append(completion)
    assert len(found) == 3


def test_a_cue_is_its_own_tokens_alone(tmp_path):
    """What the tokenizer puts in front of a text belongs to a prompt, not into a thought."""
    words = character_tokenizer(tasks.get("last_digit").alphabet)
    bos = words.token_to_id("=")
    words.post_processor = TemplateProcessing(single="= $A", special_tokens=[("=", bos)])
    speaker = LocalSpeaker(str(save_random(tmp_path, words)), slots=8, precision="fp32", cue="+-")
    assert speaker.cue == (words.token_to_id("+"), words.token_to_id("-"))
    assert speaker.encode("+")[:2] == (bos, words.token_to_id("+"))


def test_other_faults_are_not_taken_for_it():
    assert not out_of_memory(RuntimeError("shape mismatch"))
    assert not out_of_memory(ValueError("not enough memory"))
