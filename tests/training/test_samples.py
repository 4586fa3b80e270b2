"""What the model writes during training is what its logits say, one token after another."""

import json

import torch
from tokenizers import processors

from ponder import tasks
from ponder.models import GPT, GPTConfig
from ponder.training import preset
from ponder.training.data import load_data
from ponder.training.samples import greedy, write_samples


def model(vocab=12, context=24):
    torch.manual_seed(0)
    shape = GPTConfig(vocab, context, n_layer=2, n_head=2, n_kv_head=1, head_dim=16, n_embd=32)
    model = GPT(shape)
    for p in model.parameters():  # output projections start at zero
        torch.nn.init.normal_(p, std=0.4)
    return model


def slowly(model, prompt, limit, eos):
    """No cache and no batch."""
    row = []
    while len(row) < limit:
        token = int(model(torch.tensor([prompt + row]))[0, -1].argmax())
        if token == eos:
            break
        row.append(token)
    return row


def test_greedy_writes_what_the_logits_say():
    ours, prompts = model(), [[1, 2, 3], [4], [5, 6, 7, 8, 9, 1]]
    whole = [slowly(ours, prompt, 10, None) for prompt in prompts]
    assert greedy(ours, prompts, 10, None) == whole
    eos = whole[0][4]
    cut = [slowly(ours, prompt, 10, eos) for prompt in prompts]
    assert greedy(ours, prompts, 10, eos) == cut and len(cut[0]) < 10


def test_greedy_stops_where_the_context_ends():
    ours = model(context=16)
    rows = greedy(ours, [[1] * 10, [2] * 3], 100, None)
    assert [len(row) for row in rows] == [6, 6]
    assert greedy(ours, [[1] * 16], 100, None) == [[]]


class Answers(GPT):
    """Knows the completion of every problem: a task's own trace and answer."""

    def __init__(self, shape, completions):
        super().__init__(shape)
        self.completions = completions

    def hidden(self, tokens, cache=None, segment_ids=None):
        B, T = tokens.shape
        count = 0 if cache.empty else self.written
        self.written = count + 1
        cache.empty = False
        out = torch.zeros(B, T, self.config.vocab_size)
        for b, row in enumerate(self.completions):
            out[b, :, row[min(count, len(row) - 1)]] = 1.0
        return out

    def logits(self, hidden):
        return hidden


def test_a_task_s_samples_are_judged():
    config = preset("tiny")
    data = load_data(config)
    task = tasks.get("last_digit")
    problems = task.problems("val", 3, 0)
    texts = [f"{task.trace(p)}</think>{p.answer}<eos>" for p in problems]
    texts[1] = f"</think>{(int(problems[1].answer) + 1) % 10}<eos>"
    completions = [data.tokenizer.encode(text).ids for text in texts]
    vocab = data.tokenizer.get_vocab_size()
    samples = write_samples(Answers(GPTConfig(vocab, 64), completions), data, 3)
    assert [s["right"] for s in samples] == [True, False, True]
    assert [s["prompt"] for s in samples] == [p.prompt for p in problems]
    assert samples[0]["text"] == "<think>" + texts[0].removesuffix("<eos>")


def test_a_small_task_gives_the_samples_that_it_has(tmp_path):
    rows = [{"question": f"{i} + 1?", "answer": f"one more\n#### {i + 1}"} for i in range(100)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = load_data(preset("tiny", data=f"task:gsm8k:{tmp_path}/sums.jsonl"))
    held_out = len(tasks.at_most(data.sources[0].task, "val", 10**6, 0))
    ours = model(vocab=data.tokenizer.get_vocab_size(), context=64)
    samples = write_samples(ours, data, 60)
    assert len(samples) == held_out < 60
    assert [s["right"] for s in samples] == [False] * held_out


def test_prompts_are_encoded_as_training_rows_and_fit_the_context(monkeypatch):
    """A tokenizer may end every text, and a prompt may be longer than the context."""
    data = load_data(preset("tiny"))
    tokenizer, eos = data.tokenizer, data.vocabulary.id("<eos>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", eos)]
    )
    shown = []
    monkeypatch.setattr(
        "ponder.training.samples.greedy",
        lambda model, prompts, limit, eos: shown.extend(prompts) or [[]] * len(prompts),
    )
    samples = write_samples(model(context=12), data, 40)
    assert 0 < len(samples) < 40 and max(map(len, shown)) < 12
    for sample, prompt in zip(samples, shown, strict=True):
        text = tokenizer.decode(prompt, skip_special_tokens=False)
        assert text == sample["prompt"] + "<think>"
    assert write_samples(model(context=3), data, 40) == []


def test_a_model_with_a_longer_context_writes_no_more_than_a_row(monkeypatch):
    data, limits = load_data(preset("tiny", context=40)), []
    monkeypatch.setattr(
        "ponder.training.samples.greedy",
        lambda model, prompts, limit, eos: limits.append(limit) or [[]] * len(prompts),
    )
    write_samples(model(context=8192), data, 4)
    assert limits == [40]


def test_a_text_is_continued(tmp_path):
    (tmp_path / "text.txt").write_text("to be or not to be, " * 60)
    config = preset("tiny", data=f"text:{tmp_path}/text.txt", context=16)
    data = load_data(config)
    ours = model(vocab=data.tokenizer.get_vocab_size(), context=16)
    samples = write_samples(ours, data, 2)
    assert len(samples) == 2
    for sample in samples:
        assert sample["right"] is None and len(sample["prompt"]) == 4
        assert sample["prompt"] in "to be or not to be, to be"
        prompt = data.tokenizer.encode(sample["prompt"]).ids
        row = data.tokenizer.encode(sample["text"], add_special_tokens=False).ids
        assert row == slowly(ours, prompt, 12, data.tokenizer.token_to_id("<eos>"))


class Reads(GPT):
    """Writes what a list says, one token a call, whatever it is given; and notes the prompts."""

    def __init__(self, shape, words):
        super().__init__(shape)
        self.words, self.asked = words, []

    def hidden(self, tokens, cache=None, segment_ids=None):
        if cache.empty:
            self.asked, self.count, cache.empty = tokens.tolist(), 0, False
        out = torch.zeros(*tokens.shape, self.config.vocab_size)
        out[..., self.words[min(self.count, len(self.words) - 1)]] = 1.0
        self.count += 1
        return out

    def logits(self, hidden):
        return hidden


def rows_of(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"jsonl:{path}"


def test_a_row_s_prompt_is_asked_alone_and_the_answer_ends_at_eos(tmp_path):
    def turns(n):
        said = [("user", f"{n}?"), ("assistant", f"a{n}"), ("user", "more?"), ("assistant", "no")]
        return dict(messages=[dict(role=role, content=content) for role, content in said])

    numbers = range(100, 300)
    kinds = {
        "completion": (
            [dict(prompt=f"{n}+1=", completion=f"is {n}") for n in numbers],
            "+1=",
            "is ",
        ),
        "worked": (
            [dict(question=f"{n}?", answer=f"x\n#### {n}") for n in numbers],
            "?\n<think>",
            "",
        ),
        "messages": ([turns(n) for n in numbers], "?\nassistant:", " a"),
    }
    for kind, (rows, end, begin) in kinds.items():
        data = load_data(preset("tiny", data=rows_of(tmp_path / f"{kind}.jsonl", rows)))
        word = data.tokenizer.encode("1").ids
        ours = Reads(
            GPTConfig(data.vocabulary.size, 64), [*word, data.vocabulary.id("<eos>"), *word]
        )
        samples = write_samples(ours, data, 3)
        assert len({s["prompt"] for s in samples}) == 3
        for sample in samples:
            prompt, text, right, expected = sample.values()
            assert prompt.endswith(end) and "<eos>" not in prompt + expected, kind
            assert (text, right) == ("1", None)
            number = next(str(n) for n in numbers if str(n) in prompt)
            assert expected.startswith(begin) and expected.endswith(number), kind
            assert prompt.count(number) == 1
        assert write_samples(ours, data, 3) == samples


def test_documents_of_plain_text_are_continued_from_their_beginning(tmp_path):
    rows = [{"text": f"abcdefgh {n}"} for n in range(100, 200)]
    data = load_data(preset("tiny", data=rows_of(tmp_path / "a.jsonl", rows), batch_size=2))
    samples = write_samples(model(vocab=data.vocabulary.size, context=64), data, 2)
    assert [list(s) for s in samples] == [["prompt", "text", "right"]] * 2
    assert [s["prompt"] for s in samples] == ["abc"] * 2


def test_every_source_of_a_mixture_is_sampled(tmp_path):
    rows = [{"prompt": f"{n}+1=", "completion": "?"} for n in range(100)]
    sources = (rows_of(tmp_path / "a.jsonl", rows), "task:last_digit")
    data = load_data(preset("tiny", data=sources))
    ours = model(vocab=data.vocabulary.size, context=64)
    for count, kinds in ((1, [None, False]), (4, [None, False, None, False])):
        samples = write_samples(ours, data, count)
        assert [s["right"] for s in samples] == kinds
        assert ["expected" in s for s in samples] == [kind is None for kind in kinds]
