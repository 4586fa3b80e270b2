import json

import numpy as np
import pytest
import torch

from ponder.training import TrainConfig, preset
from ponder.training.data import IGNORE, TextData, load_data
from ponder.training.tokenizer import SPECIAL, bpe_tokenizer, character_tokenizer

TEXT = "To be, or not to be: that is the question.\n" * 40


def text_data(**changes) -> TextData:
    config = TrainConfig(data="text:x", context=8, batch_size=4, **changes)
    return TextData(config, TEXT, "Whether 'tis nobler")


def test_batches_depend_on_seed_and_step_alone():
    one, two = text_data(), text_data()
    for step in (3, 0, 3):
        for name in ("tokens", "targets"):
            assert torch.equal(getattr(one.batch(step), name), getattr(two.batch(step), name))
    assert not torch.equal(one.batch(0)[0], one.batch(1)[0])
    assert not torch.equal(one.batch(0)[0], text_data(seed=1).batch(0)[0])


def test_text_targets_are_the_next_tokens():
    data = text_data()
    tokens, targets, _ = data.batch(0)
    assert torch.equal(tokens[:, 1:], targets[:, :-1])
    for row, target in zip(tokens, targets, strict=True):
        assert data.tokenizer.decode([*row.tolist(), int(target[-1])]) in TEXT


def test_validation_predicts_every_token_once():
    data = text_data()
    seen = [y[y != IGNORE] for _, y, _ in data.validation()]
    assert torch.equal(torch.cat(seen), torch.from_numpy(data.held_out[1:].astype(np.int64)))


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
    data = load_data(preset("tiny", data="task:last_digit", context=8))
    with pytest.raises(ValueError, match=r"last_digit has \d+ tokens; context is 8"):
        data.batch(0)


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


def test_hub_data_from_a_local_folder(tmp_path):
    pytest.importorskip("datasets", reason="datasets is not installed")
    texts = [f"Now is the winter of our discontent number {i}" for i in range(40)]
    lines = [json.dumps({"text": text}) for text in texts]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    data = load_data(preset("tiny", data=f"hub:{tmp_path}"))
    text = data.tokenizer.decode(data.train.tolist(), skip_special_tokens=False)
    assert text.count("<eos>") == 37  # 38 documents of 40 to train on, joined
    assert "number 39" in data.tokenizer.decode(data.held_out.tolist())
    with pytest.raises(ValueError, match="no column 'story'; it has text"):
        load_data(preset("tiny", data=f"hub:{tmp_path}:story"))


def test_character_tokenizer_round_trip():
    tokenizer = character_tokenizer(TEXT)
    assert tokenizer.decode(tokenizer.encode(TEXT).ids) == TEXT
    assert [tokenizer.token_to_id(t) for t in SPECIAL] == [0, 1, 2, 3]
    assert tokenizer.encode("<think>be</think>").ids[0] == 1
    assert tokenizer.encode("€").ids == [3]


def test_bpe_tokenizer_round_trip():
    tokenizer = bpe_tokenizer([TEXT], 300)
    ids = tokenizer.encode(TEXT + "€").ids
    assert tokenizer.decode(ids) == TEXT + "€"
    assert len(ids) < len(TEXT) / 2
    with pytest.raises(ValueError, match="too small"):
        bpe_tokenizer([TEXT], 100)
