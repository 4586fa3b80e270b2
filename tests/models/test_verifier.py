import json
from dataclasses import replace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from torch.nn.functional import binary_cross_entropy_with_logits

from ponder.models import GPT, GPTConfig, hub
from ponder.models.verifier import (
    Reading,
    Verifier,
    encode_solutions,
    load_verifier,
    save_verifier,
    step_ends,
)

QWEN3 = GPTConfig(
    vocab_size=12, context=32, n_layer=2, n_head=2, n_kv_head=1, head_dim=16, n_embd=32, n_inner=48
)
SHAPES = {
    "qwen3": QWEN3,
    "llama": replace(QWEN3, qk_norm=False, tie_embeddings=False),
    "gpt2": replace(
        QWEN3,
        norm="layer",
        positions="learned",
        gated=False,
        qk_norm=False,
        attention_bias=True,
        mlp_bias=True,
        n_kv_head=2,
        activation="gelu_tanh",
    ),
    "ponder": replace(QWEN3, gated=False),
}


def words(size=12):
    names = ["<eos>", "<think>", "</think>", "<unk>", *"abcdefgh"][:size]
    tokenizer = Tokenizer(
        models.BPE(dict(zip(names, range(size), strict=True)), [], unk_token="<unk>")
    )
    tokenizer.add_special_tokens(names[:4])
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def random_verifier(shape, reading=Reading("value", ";")):  # noqa: B008
    torch.manual_seed(0)
    verifier = Verifier(GPT(shape), reading)
    with torch.no_grad():
        for parameter in verifier.parameters():
            parameter.normal_(std=0.3)
    return verifier.eval()


@pytest.mark.parametrize("kind", SHAPES)
def test_what_is_saved_gives_the_calibrated_logits(kind, tmp_path):
    verifier = random_verifier(SHAPES[kind])
    tokens = torch.randint(12, (3, 9))
    logits = verifier(tokens)
    said = save_verifier(verifier, tmp_path, tokenizer=words(), scale=0.5, shift=-2.0)
    assert ("AutoModelForTokenClassification opens it" in said) == (kind != "ponder")
    torch.testing.assert_close(verifier(tokens), logits, rtol=0, atol=0)  # not changed by saving
    loaded = load_verifier(tmp_path)
    assert loaded.reading == verifier.reading and loaded.config == verifier.config
    torch.testing.assert_close(loaded.eval()(tokens), 0.5 * logits - 2, rtol=1e-5, atol=1e-5)
    if kind != "ponder":
        from transformers import AutoModelForTokenClassification

        theirs = AutoModelForTokenClassification.from_pretrained(tmp_path).eval()
        assert theirs.config.id2label == {0: "right"}
        found = theirs(tokens).logits
        assert found.shape == (3, 9, 1)
        torch.testing.assert_close(found[..., 0], 0.5 * logits - 2, rtol=1e-4, atol=1e-4)


def test_the_loss_is_that_of_the_labels_there_are():
    verifier = random_verifier(QWEN3)
    tokens, targets = torch.randint(12, (4, 7)), torch.randint(2, (4, 7))
    targets[torch.rand(4, 7) < 0.4] = -100
    there = targets != -100
    truth = binary_cross_entropy_with_logits(verifier(tokens)[there], targets[there].float())
    torch.testing.assert_close(verifier(tokens, targets), truth)
    torch.testing.assert_close(verifier(tokens, targets, reduction="sum"), truth * there.sum())
    with pytest.raises(ValueError, match="reduction is 'none'; it must be mean or sum"):
        verifier(tokens, targets, reduction="none")
    verifier(tokens, targets).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in verifier.parameters())


def test_a_new_verifier_finds_everything_equally_likely():
    assert (Verifier(GPT(QWEN3), Reading("outcome"))(torch.randint(12, (2, 5))) == 0).all()


def test_a_folder_that_holds_no_verifier_is_told(tmp_path):
    hub.save(GPT(QWEN3), tmp_path / "writer", tokenizer=words())
    with pytest.raises(ValueError, match="writer holds no verifier, but Qwen3ForCausalLM"):
        load_verifier(tmp_path / "writer")
    with pytest.raises(ValueError, match="there is no folder .*nowhere"):
        load_verifier(tmp_path / "nowhere")
    verifier = random_verifier(QWEN3)
    verifier.model.scale = torch.nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match=r"not what its config says in 1 tensor \(model.scale\)"):
        save_verifier(verifier, tmp_path / "more", tokenizer=words())
    folder = tmp_path / "verifier"
    save_verifier(random_verifier(QWEN3), folder, tokenizer=words())
    fields = json.loads((folder / "config.json").read_text())
    for wrong in ({"labels": "mood", "step_end": "", "end": True}, {"mood": 1}, ["outcome"]):
        (folder / "config.json").write_text(json.dumps(fields | {"verifier": wrong}))
        with pytest.raises(ValueError, match="it must have labels .outcome, value, process."):
            load_verifier(folder)
    (folder / "config.json").write_text(json.dumps(fields))
    (folder / "model.safetensors").write_bytes(b"123")
    with pytest.raises(ValueError, match="truncated or not safetensors"):
        load_verifier(folder)


def test_solutions_are_read_as_the_model_wrote_them():
    tokenizer = words()
    [(tokens, start), (cut, _)] = encode_solutions(
        tokenizer, [("ab", "<think>c</think><unk>", 0), ("ab", "<think>c", None)]
    )
    assert start == 2 and tokens == [4, 5, 1, 6, 2, 3, 0] and cut == [4, 5, 1, 6]
    with pytest.raises(ValueError, match="tokenizer does not know 'z', which is in '<think>z'"):
        encode_solutions(tokenizer, [("ab", "<think>z", None)])
    assert step_ends(tokenizer, "c") == {6: 1} and step_ends(tokenizer, "") == {}
    assert set(step_ends(tokenizer, "think")) == {1, 2}
