"""Checkpoint folders against Transformers' reading of them, and every way to break them."""

import json
import subprocess
import sys
import threading

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    StaticCache,
)
from transformers.activations import ACT2FN

from ponder.kernels import ACTIVATIONS
from ponder.models import GPT, GPTConfig, KVCache, hub, load, load_config, load_tokenizer, save
from ponder.models.config_json import HIDDEN_ACTS, from_fields, model_type
from ponder.models.layers import RopeScaling
from ponder.training.tokenizer import SPECIAL, bpe_tokenizer, character_tokenizer

from .peers import PEERS, Peer, randomize

CHARACTERS = "0123456789+-*=. '<>ab\n"
TEXT = "12+3 = . 'a'\n<think>5 b</think>7<eos>"


VOCABULARY = len(SPECIAL) + len(CHARACTERS)


def gpt(seed: int = 0, **fields) -> GPT:
    shape = dict(context=64, n_layer=2, n_head=4, n_kv_head=2, head_dim=16, n_embd=64, n_inner=96)
    torch.manual_seed(seed)
    model = GPT(GPTConfig(VOCABULARY, **shape | fields))
    randomize(model)
    return model


GPT2 = dict(
    **dict(norm="layer", positions="learned", gated=False, qk_norm=False, n_kv_head=4),
    **dict(attention_bias=True, mlp_bias=True, activation="gelu_tanh"),
)
# Every model type, tied and not; activations whose names differ; 24 × 4 ≠ 64.
SHAPES = {
    "qwen3": ("qwen3", {}),
    "qwen3-untied-relu2": ("qwen3", dict(tie_embeddings=False, activation="relu2", norm_eps=1e-3)),
    "qwen3-identity-biased": ("qwen3", dict(activation="identity", attention_bias=True)),
    "llama-gelu_tanh": ("llama", dict(qk_norm=False, activation="gelu_tanh", rope_theta=777.0)),
    "llama-biased": ("llama", dict(qk_norm=False, attention_bias=True, head_dim=24)),
    "ponder-relu2": ("ponder", dict(gated=False, activation="relu2")),
    "ponder-untied": ("ponder", dict(gated=False, qk_norm=False, tie_embeddings=False)),
    "ponder-odd-width": ("ponder", dict(qk_norm=False, n_embd=54, head_dim=24)),
    "llama-stretched": (
        "llama",
        dict(qk_norm=False, mlp_bias=True, rope_scaling=RopeScaling(8.0, 16), tie_embeddings=False),
    ),
    "qwen2": ("qwen2", dict(qk_norm=False, qkv_bias=True, activation="gelu")),
    "smollm3": ("smollm3", dict(qk_norm=False, nope_layers=(1,), tie_embeddings=False)),
    "gpt2": ("gpt2", GPT2),
    "gpt2-untied": ("gpt2", GPT2 | dict(tie_embeddings=False, activation="relu")),
    "ponder-learned": ("ponder", GPT2 | dict(n_kv_head=2, attention_bias=False, qkv_bias=True)),
    "ponder-stretched": ("ponder", dict(gated=False, rope_scaling=RopeScaling(8.0, 16))),
    "ponder-layer-norm": ("ponder", dict(norm="layer", mlp_bias=True, nope_layers=(0,))),
}


@torch.no_grad()
def greedy(model: GPT, prompt: list[int], count: int, eos: int) -> list[int]:
    """The prompt and at most `count` greedy tokens, the last of them eos where it came."""
    tokens = list(prompt)
    cache = KVCache(model.config, 1, len(prompt) + count)
    new = prompt
    while len(tokens) < len(prompt) + count and (tokens == prompt or tokens[-1] != eos):
        logits = model.logits(model.hidden(torch.tensor([new]), cache)[:, -1])
        cache.lengths += len(new)
        new = [int(logits.argmax())]
        tokens += new
    return tokens


@pytest.mark.parametrize("name", SHAPES)
@torch.no_grad()
def test_saved_folder_opens_with_transformers(name, tmp_path):
    kind, fields = SHAPES[name]
    model, tokenizer = gpt(**fields), character_tokenizer(CHARACTERS)
    said = save(model, tmp_path / "model", tokenizer=tokenizer)
    assert f"model_type {kind}" in said and ("register()" in said) == (kind == "ponder")
    if kind == "ponder":
        hub.register()
    peer, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", output_loading_info=True
    )
    assert peer.config.model_type == kind and peer.dtype == torch.float32
    assert not any(report.values()), report
    # Transformers 5 would split text as Qwen2's own tokenizer does, whatever the folder says.
    opens = PreTrainedTokenizerFast if kind == "qwen2" else AutoTokenizer
    assert ("PreTrainedTokenizerFast opens" in said) == (kind == "qwen2")
    peer_tokenizer = opens.from_pretrained(tmp_path / "model")

    ids = tokenizer.encode(TEXT).ids
    assert (
        peer_tokenizer(TEXT).input_ids == ids == load_tokenizer(tmp_path / "model").encode(TEXT).ids
    )
    assert peer_tokenizer.decode(ids) == TEXT
    assert peer_tokenizer.eos_token_id == 0

    expected = model(torch.tensor([ids]))
    assert expected.std() > 0.3
    assert (peer(torch.tensor([ids])).logits - expected).abs().max() < 1e-4
    assert torch.equal(load(tmp_path / "model")(torch.tensor([ids])), expected)
    assert load_config(tmp_path / "model") == model.config

    for prompt in ("1+2=", "a"):
        ids = tokenizer.encode(prompt).ids
        ours = greedy(model, ids, 24, eos=0)
        theirs = peer.generate(torch.tensor([ids]), max_new_tokens=24, do_sample=False)[0].tolist()
        assert theirs == ours
        assert peer_tokenizer.decode(theirs) == tokenizer.decode(ours, skip_special_tokens=False)


@pytest.mark.parametrize("kind", ["character", "bpe"])
def test_tokenizers_agree(kind, tmp_path):
    """Also on what the vocabulary lacks, on spaces that some decoders swallow, and on specials."""
    texts = ["a sample of 12 + 34, twice: a sample of 12 + 34"] * 9
    tokenizer = (
        character_tokenizer(CHARACTERS) if kind == "character" else bpe_tokenizer(texts, 280)
    )
    torch.manual_seed(0)
    save(GPT(GPTConfig(280, n_layer=1)), tmp_path / "model", tokenizer=tokenizer)
    peer, ours = (
        AutoTokenizer.from_pretrained(tmp_path / "model"),
        load_tokenizer(tmp_path / "model"),
    )
    for text in (*texts[:1], TEXT, "", " a  b . ' \n", "éé漢", "<unk><eos> <eos>", "a</think"):
        ids = tokenizer.encode(text).ids
        assert peer(text).input_ids == ours.encode(text).ids == ids
        for skip in (True, False):
            decoded = tokenizer.decode(ids, skip_special_tokens=skip)
            assert peer.decode(ids, skip_special_tokens=skip) == decoded
    if kind == "bpe":
        assert peer.decode(peer("éé漢 .").input_ids) == "éé漢 ."


def test_beginning_and_chat_template(tmp_path):
    """As vLLM's chat needs them: the template is found, and knows the token of beginning."""
    tokenizer = character_tokenizer(CHARACTERS)
    tokenizer.add_special_tokens(["<bos>"])
    torch.manual_seed(0)
    model = GPT(GPTConfig(VOCABULARY + 1, n_layer=1))
    template = (
        "{{ bos_token }}{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'a<think>' }}{% endif %}"
    )
    for _ in range(2):  # the second time into a folder that exists
        save(model, tmp_path / "model", tokenizer=tokenizer, bos="<bos>", template=template)
    peer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert peer.chat_template == template and peer.bos_token_id == VOCABULARY
    said = [dict(role="user", content="1+2=")]
    text = peer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
    assert text == "<bos>1+2=<eos>a<think>"
    ids = tokenizer.encode(text).ids
    assert peer(text, add_special_tokens=False).input_ids == ids and ids[0] == VOCABULARY
    for name in ("config.json", "generation_config.json"):
        fields = json.loads((tmp_path / "model" / name).read_text())
        assert (fields["bos_token_id"], fields["eos_token_id"]) == (VOCABULARY, 0), name
    save(model, tmp_path / "model", tokenizer=tokenizer)  # whatever else is there stays
    assert AutoTokenizer.from_pretrained(tmp_path / "model").chat_template == template


@torch.no_grad()
def test_generation_stops_at_eos(tmp_path):
    """The head's rows are exchanged so that the first greedy token is <eos>."""
    model, tokenizer = gpt(tie_embeddings=False), character_tokenizer(CHARACTERS)
    prompt = tokenizer.encode("1+2=").ids
    first = greedy(model, prompt, 1, eos=-1)[-1]
    weight = model.lm_head.weight
    weight[[0, first]] = weight[[first, 0]]
    save(model, tmp_path / "model", tokenizer=tokenizer)
    peer = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert greedy(model, prompt, 20, eos=0) == [*prompt, 0]
    assert peer.generate(torch.tensor([prompt]), max_new_tokens=20)[0].tolist() == [*prompt, 0]


@torch.no_grad()
def test_ponder_type_with_and_without_cache(tmp_path):
    hub.register()
    model = gpt(gated=False, activation="relu2")
    save(model, tmp_path / "model")
    peer = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    prompts = torch.randint(4, VOCABULARY, (3, 7))
    plain = peer.generate(prompts, max_new_tokens=20, do_sample=False, use_cache=False)
    assert torch.equal(plain, peer.generate(prompts, max_new_tokens=20, do_sample=False))
    beams = dict(max_new_tokens=8, do_sample=False, num_beams=3)  # reorders the cache's rows
    assert torch.equal(
        peer.generate(prompts, **beams, use_cache=False), peer.generate(prompts, **beams)
    )
    with pytest.raises(ValueError, match="attention_mask has zeros"):
        peer(prompts, attention_mask=torch.tensor([[0] + [1] * 6] * 3))
    with pytest.raises(ValueError, match="65 tokens are more than the model's context of 64"):
        peer(prompts.repeat(1, 10)[:, :65])
    with pytest.raises(ValueError, match="the StaticCache gives 16 keys for 7 tokens"):
        peer(prompts, past_key_values=StaticCache(config=peer.config, max_cache_len=16))
    peer.save_pretrained(tmp_path / "again")
    assert torch.equal(load(tmp_path / "again")(prompts), model(prompts))
    fresh = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path / "model"))
    assert torch.equal(fresh.model.rotary.cos, model.rotary.cos)


@pytest.mark.parametrize("name", PEERS)
def test_configuration_there_and_back(name):
    from ponder.models.config_json import from_fields, to_fields

    theirs = json.loads(PEERS[name].build().config.to_json_string(use_diff=False))
    config = from_fields(theirs)
    ours = to_fields(config)
    assert from_fields(ours) == config
    for key, value in ours.items():
        if key not in ("architectures", "rope_theta", "rope_scaling"):
            assert theirs[key] == value, key


def test_dtypes(tmp_path):
    model = gpt()
    save(model, tmp_path / "half", dtype=torch.bfloat16)
    half = load(tmp_path / "half")
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert half.rotary.cos.dtype == torch.float32
    assert torch.equal(half.embed_tokens.weight, model.embed_tokens.weight.bfloat16())
    wide = load(tmp_path / "half", dtype=torch.float64)
    assert torch.equal(wide.norm.weight, model.norm.weight.bfloat16().double())
    assert wide.lm_head.weight is wide.embed_tokens.weight
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "half").dtype == torch.bfloat16


def test_methods_and_training_goes_on(tmp_path):
    model, tokens = gpt(), torch.randint(0, VOCABULARY, (2, 9))
    model.save_pretrained(tmp_path / "model", tokenizer=character_tokenizer(CHARACTERS))
    again = GPT.from_pretrained(tmp_path / "model")
    again(tokens[:, :-1], tokens[:, 1:]).backward()
    model(tokens[:, :-1], tokens[:, 1:]).backward()
    for (name, p), q in zip(again.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), name


@pytest.mark.parametrize("name", ["gpt2", "llama-stretched", "qwen2", "smollm3"])
def test_fine_tuned_checkpoint_goes_back(name, tmp_path):
    """Theirs, read, trained, written, read by them: the same logits; in shards both ways."""
    PEERS[name].build().save_pretrained(tmp_path / "theirs", max_shard_size="40KB")
    model, tokens = GPT.from_pretrained(tmp_path / "theirs"), torch.randint(0, 50, (4, 33))
    optimizer, losses = torch.optim.AdamW(model.parameters(), 3e-3), []
    for _ in range(10):
        optimizer.zero_grad()
        losses.append(model(tokens[:, :-1], tokens[:, 1:]))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]
    save(model, tmp_path / "ours", shard_bytes=40_000)
    assert "model.safetensors.index.json" in files(tmp_path / "ours")
    peer = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    with torch.no_grad():
        assert (peer(tokens).logits - model(tokens)).abs().max() < 1e-4


@torch.no_grad()
def test_gpt2s_own_checkpoint(tmp_path):
    """As on the hub: saved without the head, so under shorter names, with the masks of its layers,
    a config.json that does not say n_inner, and dropout, which a GPT has not."""
    fields = PEERS["gpt2"].fields | dict(n_inner=None, attn_pdrop=0.1)
    peer = Peer("gpt2", fields).build()
    peer.save_pretrained(tmp_path)
    state = {
        n.removeprefix("transformer."): t
        for n, t in load_file(tmp_path / "model.safetensors").items()
    }
    state["h.0.attn.bias"] = torch.ones(1, 1, 64, 64).bool()
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    edit_config(tmp_path, ["n_inner", "layer_norm_epsilon", "tie_word_embeddings"])
    tokens = torch.randint(0, 50, (2, 9))
    model = load(tmp_path)
    assert model.config.n_inner == 256 and model.config.tie_embeddings
    assert (model(tokens) - peer(tokens).logits).abs().max() < 1e-4


def test_gpt2_has_no_head_dim_of_its_own(tmp_path):
    """Transformers does not read the field, so a head stays a fourth of the width."""
    peer = PEERS["gpt2"].build()
    peer.config.head_dim = 24
    peer.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["head_dim"] == 24
    tokens = torch.randint(0, 50, (2, 9))
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path)(tokens).logits
        assert (load(tmp_path)(tokens) - theirs).abs().max() < 1e-4


def test_ponder_folders_of_before(tmp_path):
    """Written when there were neither LayerNorm nor learned positions nor layers without them."""
    model, tokens = gpt(gated=False), torch.randint(0, VOCABULARY, (2, 9))
    save(model, tmp_path)
    edit_config(tmp_path, ["norm_type", "position_type", "qkv_bias", "mlp_bias", "no_rope_layers"])
    assert torch.equal(load(tmp_path)(tokens), model(tokens))


def test_lora(tmp_path):
    """PEFT's adapters on a GPT, MLP's projections among them: trained, merged, written."""
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    model, tokens = gpt(), torch.randint(0, VOCABULARY, (2, 9))
    lora = peft.LoraConfig(target_modules=["q_proj", "gate_proj", "down_proj"])
    with torch.no_grad():  # PyTorch's norms round otherwise where weights have gradients
        before = model(tokens)
        adapted = peft.get_peft_model(model, lora)
        assert torch.equal(adapted(tokens), before)  # they start at nothing
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], 1e-2)
    for _ in range(2):  # the second of an adapter's matrices has no gradient in the first step
        optimizer.zero_grad()
        adapted(tokens[:, :-1], tokens[:, 1:]).backward()
        optimizer.step()
    assert all(p.grad.norm() > 0 for p in adapted.parameters() if p.requires_grad)
    after = adapted(tokens).detach()
    merged = adapted.merge_and_unload()
    assert (merged(tokens) - after).abs().max() < 1e-4 < (after - before).abs().max()
    save(merged, tmp_path)
    with torch.no_grad():
        peer = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert (peer(tokens).logits - after).abs().max() < 1e-4


def test_needs_neither_transformers_nor_a_compiler(tmp_path):
    model, tokenizer, path = gpt(), character_tokenizer(CHARACTERS), tmp_path / "model"
    save(model, path, tokenizer=tokenizer)
    script = (
        "import sys; from ponder.models import load, load_tokenizer, save\n"
        "path = sys.argv[1]; save(load(path), path, tokenizer=load_tokenizer(path))\n"
        "sys.exit({'transformers', 'huggingface_hub', 'torch._dynamo'} & {*sys.modules} or 0)"
    )
    subprocess.run([sys.executable, "-c", script, path], check=True, cwd=tmp_path)
    tokens = torch.arange(VOCABULARY)[None]
    assert torch.equal(load(path)(tokens), model(tokens))
    assert load_tokenizer(path).get_vocab() == tokenizer.get_vocab()


# Writing


def files(folder) -> set[str]:
    return {p.name for p in folder.iterdir()}


def test_shards(tmp_path):
    first, second = gpt(1), gpt(2)
    tokens = torch.randint(0, VOCABULARY, (2, 9))
    path = tmp_path / "model"
    save(first, path, shard_bytes=50_000)
    shards = {f for f in files(path) if f.endswith(".safetensors")}
    assert len(shards) > 2 and "model.safetensors" not in shards
    assert torch.equal(load(path)(tokens), first(tokens))
    with torch.no_grad():
        peer = AutoModelForCausalLM.from_pretrained(path)
        assert (peer(tokens).logits - first(tokens)).abs().max() < 1e-4

    save(second, path, shard_bytes=50_000)  # no shard of the first is written over in place
    assert shards.isdisjoint(files(path)) and torch.equal(load(path)(tokens), second(tokens))
    save(first, path)
    assert {f for f in files(path) if f.startswith("model")} == {"model.safetensors"}
    assert torch.equal(load(path)(tokens), first(tokens))
    save(second, path, shard_bytes=50_000)
    assert "model.safetensors" not in files(path)
    assert torch.equal(load(path)(tokens), second(tokens))


def test_what_else_is_in_the_folder_stays(tmp_path):
    path = tmp_path / "model"
    (path / "train").mkdir(parents=True)
    (path / "train/metrics.jsonl").write_text("{}")
    (path / "run.json").write_text("{}")
    (path / ".model.saving").mkdir()  # a save that was killed
    (path / ".model.saving/model.safetensors").write_text("half")
    save(gpt(1), path, tokenizer=character_tokenizer(CHARACTERS))
    save(gpt(2), path)
    assert (path / "train/metrics.jsonl").read_text() == (path / "run.json").read_text() == "{}"
    assert files(path) == {
        *("train", "run.json", "config.json", "generation_config.json", "model.safetensors"),
        *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    }
    modes = {(path / name).stat().st_mode for name in ("config.json", "model.safetensors")}
    assert len(modes) == 1


def test_what_a_folder_says_of_its_tokens_stays(tmp_path):
    """A fine-tuned model over the one that it came from: it ends its texts as before."""
    model = PEERS["llama"].build()
    model.config.eos_token_id, model.config.bos_token_id = 7, 1
    model.generation_config.eos_token_id = [7, 8]
    model.save_pretrained(tmp_path)
    before = (tmp_path / "generation_config.json").read_text()
    load(tmp_path).save_pretrained(tmp_path)
    assert (tmp_path / "generation_config.json").read_text() == before
    fields = json.loads((tmp_path / "config.json").read_text())
    assert (fields["bos_token_id"], fields["eos_token_id"], fields["pad_token_id"]) == (1, 7, None)
    load(tmp_path).save_pretrained(tmp_path, tokenizer=character_tokenizer(CHARACTERS[:9]))
    assert hub.load_ends(tmp_path, load_tokenizer(tmp_path)) == (0,)
    (tmp_path / "config.json").write_text("{")
    save(model := gpt(1), tmp_path)  # over a broken folder: it is whole then
    assert torch.equal(load(tmp_path).norm.weight, model.norm.weight)


@pytest.mark.parametrize("existing", [True, False])
def test_a_failed_save_leaves_no_trace(existing, tmp_path, monkeypatch):
    path, tokens = tmp_path / "model", torch.randint(0, VOCABULARY, (2, 9))
    if existing:
        save(gpt(1), path)
    before = files(path) if existing else set()

    def full(state, file, metadata):
        file.write_bytes(b"half of it")
        raise OSError("No space left on device")

    monkeypatch.setattr(hub, "save_file", full)
    with pytest.raises(OSError, match="No space"):
        save(gpt(2), path)
    assert files(tmp_path) == ({"model"} if existing else set())
    if existing:
        assert files(path) == before and torch.equal(load(path)(tokens), gpt(1)(tokens))


def test_a_reader_never_sees_half(tmp_path):
    """While one thread saves two models in turn, another always reads one of the two."""
    both, path = [gpt(1), gpt(2)], tmp_path / "model"
    save(both[0], path)
    allowed = {m.embed_tokens.weight[0, 0].item(): m.norm.weight for m in both}
    stop = threading.Event()

    def write():
        while not stop.is_set():
            for model in both:
                save(model, path)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        seen = []
        for _ in range(60):
            model = load(path)
            seen.append(model.embed_tokens.weight[0, 0].item())
            assert torch.equal(model.norm.weight, allowed[seen[-1]])
    finally:
        stop.set()
        writer.join()
    assert set(seen) == set(allowed), "the writer never came between two reads"


def test_what_cannot_be_saved(tmp_path):
    tokenizer = character_tokenizer(CHARACTERS)
    with pytest.raises(ValueError, match="tokenizer has ids up to 25; the model has only 20 token"):
        torch.manual_seed(0)
        save(GPT(GPTConfig(20)), tmp_path / "model", tokenizer=tokenizer)
    apart = Tokenizer(models.WordLevel({"<unk>": 0, "a": 26}, unk_token="<unk>"))
    with pytest.raises(ValueError, match="tokenizer has ids up to 26; the model has only 26 token"):
        save(gpt(), tmp_path / "model", tokenizer=apart)
    with pytest.raises(ValueError, match="template is 'once', and no tokenizer is given"):
        save(gpt(), tmp_path / "model", template="once")
    with pytest.raises(ValueError, match="not a DataParallel: unwrap it"):
        save(torch.nn.DataParallel(gpt()), tmp_path / "model")  # type: ignore[arg-type]
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file is a file; a checkpoint is a folder"):
        save(gpt(), tmp_path / "file")
    with pytest.raises(ValueError, match="dtype is torch.int8; weights can be torch.float64, "):
        save(gpt(), tmp_path / "model", dtype=torch.int8)
    assert files(tmp_path) == {"file"}


def untied(model: GPT):
    model.lm_head.weight = nn.Parameter(model.embed_tokens.weight.detach().clone())


def adapted(model: GPT):
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (untied, r"1 tensor \(lm_head.weight\)"),
        (lambda m: setattr(m, "scale", nn.Parameter(torch.ones(1))), r"1 tensor \(scale\)"),
        (lambda m: nn.utils.parametrizations.weight_norm(m.norm), "3 tensors .norm.weight, norm"),
        (lambda m: setattr(m.layers[1], "mlp", m.layers[0].mlp), "3 tensors .layers.1.mlp.gate"),
        (adapted, "layers.0.self_attn.q_proj.weight"),
    ],
    ids=["untied", "more", "parametrized", "shared", "adapted"],
)
def test_a_model_that_is_not_what_its_config_says(change, said, tmp_path):
    change(model := gpt())
    with pytest.raises(ValueError, match=f"not what its config says in .*{said}"):
        save(model, tmp_path / "model")
    assert not files(tmp_path)


# Reading what is broken


@pytest.fixture
def folder(tmp_path):
    save(gpt(tie_embeddings=False), tmp_path / "model", tokenizer=character_tokenizer(CHARACTERS))
    return tmp_path / "model"


def refused(folder) -> str:
    """The message, after a check that it is one line."""
    with pytest.raises(ValueError) as caught:
        load(folder)
    message = str(caught.value)
    assert "\n" not in message and str(folder) in message
    return message


def edit_config(folder, drop=(), **changes):
    fields = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(
        json.dumps({name: v for name, v in fields.items() if name not in drop})
    )


def edit_weights(folder, change):
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", {"format": "pt"})


LLAMA3 = dict(rope_type="llama3", factor=8.0, rope_theta=500000.0)
STRETCH = dict(low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(model_type="gpt_neox"), "model_type is 'gpt_neox'; known are llama, qwen2, qwen3, "),
        (dict(model_type=None), "model_type is None"),
        (dict(hidden_size=None), "hidden_size is missing"),
        (dict(hidden_size="64"), 'hidden_size is "64"; it must be a whole number'),
        (dict(num_hidden_layers=True), "num_hidden_layers is true; it must be a whole number"),
        (dict(rms_norm_eps="small"), 'rms_norm_eps is "small"; it must be a number'),
        (dict(tie_word_embeddings=1), "tie_word_embeddings is 1; it must be true or false"),
        (dict(num_key_value_heads=3), "n_head 4 is not a multiple of n_kv_head 3"),
        (dict(head_dim=None, num_attention_heads=3), "hidden_size 64 is not a multiple of"),
        (dict(hidden_act="quick_gelu"), "hidden_act is 'quick_gelu'; known are silu"),
        (dict(quantization_config=dict(bits=4)), 'quantization_config is {"bits": 4}'),
        (dict(mlp_bias=True), "mlp_bias is true, which a GPT does not express"),
        (dict(attention_dropout=0.1), "attention_dropout is 0.1"),
        (dict(is_causal=False), "is_causal is false, which a GPT does not express"),
        (dict(scale_attn_weights=False), "scale_attn_weights is false, which a GPT does not"),
        (dict(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx is true"),
        (dict(attention_chunk_size=8), "attention_chunk_size is 8"),
        (dict(add_cross_attention=True), "add_cross_attention is true"),
        (dict(num_local_experts=4), "num_local_experts is 4"),
        (dict(compression_config=dict(bits=4)), 'compression_config is {"bits": 4}'),
        (dict(use_sliding_window=True, sliding_window=32), "use_sliding_window is true"),
        (dict(model_type="llama", sliding_window=32), "sliding_window is 32"),
        (dict(layer_types=["full_attention", "sliding_attention"]), "layer_types holds 'sliding"),
        (dict(layer_types=4), "layer_types holds 4; a GPT has full_attention alone"),
        (dict(rope_scaling=dict(type="linear", factor=2.0)), 'rope_scaling has type "linear"'),
        (dict(rope_scaling=dict(type="yarn")), 'rope_scaling has type "yarn"'),
        (dict(rope_parameters=dict(factor=2.0, rope_type="yarn")), 'has rope_type "yarn"'),
        (dict(rope_parameters=LLAMA3), "rope_parameters: original_max_position_embeddings is miss"),
        (
            dict(rope_parameters=LLAMA3 | STRETCH | dict(low_freq_factor=4.0)),
            "rope_parameters: rotary scaling has factor 8.0, low 4.0 and high 4.0",
        ),
        (dict(rope_parameters=LLAMA3 | STRETCH | dict(beta_fast=3)), "has beta_fast 3"),
        (dict(model_type="smollm3", no_rope_layers=[1]), "no_rope_layers is [1]; it must hold a 0"),
        (dict(model_type="smollm3", no_rope_layer_interval=0), "no_rope_layer_interval is 0"),
        (dict(model_type="gpt2"), "n_embd is missing"),
        (dict(rope_parameters=dict(full_attention={})), "rope_parameters has full_attention"),
        (dict(partial_rotary_factor=0.5), "partial_rotary_factor 0.5"),
        (dict(rope_parameters=dict(rope_theta=-1.0)), "rope_theta is -1.0; it must be above 0"),
        (dict(rope_parameters=dict(rope_theta=0)), "rope_theta is 0.0; it must be above 0"),
    ],
)
def test_fields_that_a_gpt_does_not_express(changes, message, folder):
    edit_config(folder, **changes)
    assert message in refused(folder)


def test_silent_fields_take_transformers_defaults(tmp_path):
    """An old config.json says little; where Llama and Qwen3 differ, so do we."""
    silent = ("rope_parameters", "rope_theta", "rms_norm_eps", "hidden_act", "attention_bias")
    for name, fields in [("qwen3", dict(head_dim=128)), ("llama", dict(qk_norm=False))]:
        model = gpt(tie_embeddings=False, **fields)
        save(model, tmp_path / name)
        edit_config(tmp_path / name, (*silent, "tie_word_embeddings"))
        if name == "qwen3":
            edit_config(tmp_path / name, ["head_dim"])
        else:
            edit_config(tmp_path / name, ["head_dim", "num_key_value_heads"])
            assert "k_proj.weight is (32, 64) and not (64, 64)" in refused(tmp_path / name)
            edit_config(tmp_path / name, num_key_value_heads=2, rope_theta=500)
        peer, tokens = AutoModelForCausalLM.from_pretrained(tmp_path / name), torch.arange(9)[None]
        with torch.no_grad():
            assert (load(tmp_path / name)(tokens) - peer(tokens).logits).abs().max() < 1e-4


SIZES = dict(hidden_size=1024, num_hidden_layers=9, num_attention_heads=64, intermediate_size=64)
GPT2_SIZES = dict(n_embd=1024, n_layer=9, n_head=64)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "smollm3", "gpt2"])
def test_what_a_config_leaves_open_is_what_transformers_says_of_its_type(kind):
    said = dict(vocab_size=99, pad_token_id=0) | (GPT2_SIZES if kind == "gpt2" else SIZES)
    said |= {"n_positions" if kind == "gpt2" else "max_position_embeddings": 64}
    theirs = AutoConfig.for_model(kind, **said).to_dict()
    assert from_fields(dict(model_type=kind) | said) == from_fields(theirs)


def test_biases_that_qwen2_does_not_ask_for():
    """Its queries, keys and values have biases, and its output has none, whatever it says."""
    fields = dict(model_type="qwen2", vocab_size=99, max_position_embeddings=64) | SIZES
    assert from_fields(fields | dict(attention_bias=True)) == from_fields(fields)


@pytest.mark.parametrize("name", HIDDEN_ACTS)
def test_an_activation_is_what_transformers_calls_so(name):
    x = torch.linspace(-9, 9, 99, dtype=torch.float64)
    assert torch.allclose(ACTIVATIONS[HIDDEN_ACTS[name]](x), ACT2FN[name](x), rtol=0, atol=1e-9)


QWEN2 = dict(qk_norm=False, qkv_bias=True)


@pytest.mark.parametrize(
    ("fields", "changes"),
    [
        *((GPT2, dict(n_kv_head=2)), (GPT2, dict(head_dim=24)), (GPT2, dict(mlp_bias=False))),
        *((GPT2, dict(attention_bias=False)), (GPT2, dict(gated=True)), (GPT2, dict(norm="rms"))),
        *(({}, dict(mlp_bias=True)), ({}, dict(nope_layers=(0,))), ({}, dict(qkv_bias=True))),
        *((QWEN2, dict(head_dim=24)), (QWEN2, dict(mlp_bias=True))),
        (QWEN2, dict(nope_layers=(0,))),
    ],
)
def test_what_one_field_takes_out_of_a_standard_type_is_ponder_s(fields, changes):
    shape = dict(n_layer=2, n_head=4, n_kv_head=2, head_dim=16, n_embd=64, n_inner=96) | fields
    assert model_type(GPTConfig(99, 64, **shape)) != "ponder"
    assert model_type(GPTConfig(99, 64, **shape | changes)) == "ponder"


def test_a_stretched_model_s_scaling_is_written_by_both_of_its_names(tmp_path):
    """Transformers 4, vLLM and llama.cpp read the older one."""
    save(gpt(qk_norm=False, rope_scaling=RopeScaling(8.0, 32)), tmp_path / "model")
    said = json.loads((tmp_path / "model" / "config.json").read_text())
    assert said["rope_scaling"].items() <= said["rope_parameters"].items()
    assert said["rope_scaling"]["rope_type"] == "llama3" and said["rope_scaling"]["factor"] == 8.0


def test_weights_are_in_place_before_what_names_them_and_config_last(tmp_path, monkeypatch):
    """Whatever moment a reader comes at, what it finds named is there, and no old single file is
    preferred to new shards for longer than it must be."""
    save(gpt(), tmp_path)
    moved = []
    replace, unlink = hub.os.replace, hub.Path.unlink
    monkeypatch.setattr(hub.os, "replace", lambda a, b: (moved.append(b.name), replace(a, b)))
    monkeypatch.setattr(hub.Path, "unlink", lambda p: (moved.append(f"- {p.name}"), unlink(p)))
    save(gpt(), tmp_path, shard_bytes=40_000)
    kinds = [name.endswith(".safetensors") for name in moved if name[0] != "-"]
    assert kinds == sorted(kinds, reverse=True) and sum(kinds) > 1
    assert moved[-2:] == ["config.json", "- model.safetensors"]
    assert "model.safetensors.index.json" in moved
    moved.clear()
    save(gpt(), tmp_path)
    assert [name for name in moved if name[0] == "-"][0] == "- model.safetensors.index.json"


def test_a_rotary_scaling_by_either_of_its_names():
    fields = dict(model_type="llama", vocab_size=99, max_position_embeddings=64) | SIZES
    old = dict(type="llama3", factor=8.0) | STRETCH
    found = from_fields(fields | dict(rope_scaling=old, rope_theta=500000.0))
    assert found == from_fields(fields | dict(rope_parameters=LLAMA3 | STRETCH))
    assert found.rope_scaling is not None and found.rope_theta == 500000


def test_missing_files(tmp_path, folder):
    with pytest.raises(ValueError, match="there is no folder /nowhere/at/all"):
        load("/nowhere/at/all")
    with pytest.raises(ValueError, match="config.json is a file; a checkpoint is a folder"):
        load(folder / "config.json")
    with pytest.raises(ValueError, match="there is no .*tokenizer.json"):
        load_tokenizer(tmp_path)
    (folder / "config.json").rename(tmp_path / "config.json")
    assert "config.json: there is no such file" in refused(folder)
    (tmp_path / "config.json").rename(folder / "config.json")
    assert refused(folder.parent) == f"{folder.parent} is no checkpoint; {folder} is one"
    (folder / "model.safetensors").unlink()
    assert "neither model.safetensors nor model.safetensors.index.json" in refused(folder)
    (folder / "pytorch_model.bin").write_bytes(b"")
    assert "pickled weights (pytorch_model.bin)" in refused(folder)


def test_broken_files(folder):
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="tokenizer.json is not a tokenizer"):
        load_tokenizer(folder)
    whole = (folder / "model.safetensors").read_bytes()
    for size in (len(whole) - 1, 100, 0):
        (folder / "model.safetensors").write_bytes(whole[:size])
        assert "model.safetensors is truncated or not safetensors" in refused(folder)
    (folder / "model.safetensors").write_bytes(whole)
    for text, message in (("{", "this is not JSON"), ("[]", "this is not a JSON object")):
        (folder / "config.json").write_text(text)
        assert message in refused(folder)


def test_missing_and_extra_tensors(folder):
    edit_weights(folder, lambda state: state.pop("model.norm.weight"))
    assert "lacks 1 tensor (model.norm.weight) that" in refused(folder)
    edit_weights(folder, lambda state: state.update(score=torch.ones(1)))
    assert "lacks 1 tensor (model.norm.weight) that" in refused(folder)
    assert "and holds 1 tensor (score) that a qwen3 model" in refused(folder)
    edit_config(folder, num_hidden_layers=4)
    message = refused(folder)
    assert "lacks 23 tensors (model.layers.2." in message and "...)" in message
    edit_config(folder, num_hidden_layers=2)
    edit_weights(folder, lambda state: (state.pop("score"), state.update(norm())))
    edit_weights(folder, lambda state: state.update(kept=state.pop("lm_head.weight")))
    assert "lacks 1 tensor (lm_head.weight) that" in refused(folder)  # which is not tied
    edit_weights(folder, lambda state: state.update({"lm_head.weight": state.pop("kept")}))
    edit_config(folder, tie_word_embeddings=True)
    assert "lm_head.weight is not model.embed_tokens.weight" in refused(folder)


def norm() -> dict[str, torch.Tensor]:
    return {"model.norm.weight": torch.ones(64)}


def test_an_equal_head_of_a_tied_model_and_old_rotary_tables_are_fine(folder):
    edit_config(folder, tie_word_embeddings=True)

    def tie(state):
        state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
        state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)

    edit_weights(folder, tie)
    model = load(folder)
    assert model.lm_head.weight is model.embed_tokens.weight


@pytest.mark.parametrize("head", [True, False])
def test_a_tied_model_with_a_nan(head, folder):
    edit_config(folder, tie_word_embeddings=True)

    def spoil(state):
        state["model.embed_tokens.weight"][3, 5] = float("nan")
        state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
        if not head:
            del state["lm_head.weight"]

    edit_weights(folder, spoil)
    assert load(folder).lm_head.weight.isnan().sum() == 1


def test_wrong_shapes_and_types(folder):
    with pytest.raises(ValueError, match="dtype is torch.int8; weights can be torch.float64, "):
        load(folder, dtype=torch.int8)
    edit_config(folder, vocab_size=30)
    message = refused(folder)
    assert "2 tensors (model.embed_tokens.weight is (26, 64) and not (30, 64), lm_head" in message
    edit_config(folder, vocab_size=26)
    edit_weights(folder, lambda state: state.update({"model.norm.weight": torch.ones(64).byte()}))
    assert "is quantized, which is not read: it holds 1 tensor (model.norm.weight in U8)" in (
        refused(folder)
    )


def test_broken_shards(tmp_path):
    path = tmp_path / "model"
    save(gpt(), path, shard_bytes=50_000)
    index = path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    shard = sorted(set(content["weight_map"].values()))[1]
    (path / shard).rename(tmp_path / shard)
    assert f"the shard {path / shard} is missing" in refused(path)
    outside = {
        name: file.replace(shard, f"../{shard}") for name, file in content["weight_map"].items()
    }
    index.write_text(json.dumps(dict(weight_map=outside)))
    assert f"'../{shard}' is not the name of a shard beside it" in refused(path)
    index.write_text(json.dumps(dict(weight_map={})))
    assert "it holds no weight_map" in refused(path)


def test_hub_id_without_network(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    for read in (load, load_tokenizer):
        with pytest.raises(
            ValueError, match="no folder nobody/nothing.*Hugging Face hub"
        ) as caught:
            read("nobody/nothing")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("files", "ends"),
    [
        ({}, (0,)),  # the tokenizer's own <eos>
        ({"config.json": {"eos_token_id": 5}}, (5,)),
        ({"config.json": {"eos_token_id": None}}, (0,)),
        ({"generation_config.json": {"eos_token_id": [7, 5]}, "config.json": {}}, (5, 7)),
        ({"tokenizer_config.json": {"eos_token": "b"}, "config.json": {"eos_token_id": 0}}, (0, 5)),
        ({"tokenizer_config.json": {"eos_token": {"content": "a"}}}, (4,)),
        ({"tokenizer_config.json": {"eos_token": "unheard of"}}, (0,)),
    ],
)
def test_a_text_ends_where_any_file_says_so(tmp_path, files, ends):
    tokenizer = character_tokenizer("abcd")
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    assert hub.load_ends(tmp_path, tokenizer) == ends


@pytest.mark.parametrize("said", [[[1, 2]], 1.5, True, [{"content": 3.0}]])
def test_an_end_that_is_no_token_is_named(tmp_path, said):
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": said}))
    with pytest.raises(ValueError, match="config.json: eos_token_id is .*; it names a token"):
        hub.load_ends(tmp_path, character_tokenizer("abcd"))


def test_a_chat_template_is_found_where_it_is_kept(tmp_path):
    settings = tmp_path / "tokenizer_config.json"
    assert hub.load_template(tmp_path) is None
    settings.write_text(json.dumps({"eos_token": "<eos>"}))
    assert hub.load_template(tmp_path) is None
    settings.write_text(json.dumps({"chat_template": "one"}))
    assert hub.load_template(tmp_path) == "one"
    named = [dict(name="default", template="three"), dict(name="tool_use", template="two")]
    settings.write_text(json.dumps({"chat_template": named}))
    assert hub.load_template(tmp_path) == "three"
    settings.write_text(json.dumps({"chat_template": named[1:]}))
    assert hub.load_template(tmp_path) is None
    settings.write_text(json.dumps({"chat_template": named}))
    (tmp_path / "chat_template.jinja").write_text("four")
    assert hub.load_template(tmp_path) == "four"
    (tmp_path / "chat_template.jinja").unlink()
    settings.write_text("[]")
    with pytest.raises(ValueError, match="tokenizer_config.json: this is not a JSON object"):
        hub.load_template(tmp_path)
    for other in ([{"template": "five"}], ["five"], 5, [dict(name="default", template=5)]):
        settings.write_text(json.dumps({"chat_template": other}))
        with pytest.raises(ValueError, match="chat_template is neither a template nor a list"):
            hub.load_template(tmp_path)
