"""Our kernels under Transformers' models: eager attention's numbers, or kept as it was."""

import copy
import json
import math
import os
import subprocess
import sys
import types

import pytest
import torch
import transformers
from packaging.version import Version
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

from ponder.models import hf_attention, hf_layers, patch, register, unpatch
from ponder.models.patch import _turning
from ponder.training.tokenizer import character_tokenizer

from .peers import FAMILIES, GEMMA, GROUPED, LAYERS, Peer

TOKENS = torch.randint(0, 50, (3, 40), generator=torch.Generator().manual_seed(0))


def eager(peer: Peer):
    model = peer.build()
    model.set_attn_implementation("eager")
    return model


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request):
    """A model with eager attention, a patched copy of it, and the summary."""
    model = eager(FAMILIES[request.param])
    patched = copy.deepcopy(model)
    return model, patched, patch(patched, quiet=True)


@pytest.fixture
def llama():
    model = eager(FAMILIES["llama"])
    return model, copy.deepcopy(model)


def masks() -> dict[str, dict]:
    """Forward's arguments: nothing, padding on either side and within, and two packed rows."""
    left, right, holes = (torch.ones_like(TOKENS) for _ in range(3))
    left[0, :9] = left[2, :1] = 0
    right[0, 31:] = right[1, 2:] = 0
    holes[0, 5:8] = holes[1, 20] = 0
    packed = torch.cat([torch.arange(n) for n in (1, 17, 22)])[None].repeat(3, 1)
    packed[1] = torch.arange(40)
    return {
        "none": {},
        "left": dict(attention_mask=left),
        "right": dict(attention_mask=right),
        "holes": dict(attention_mask=holes),
        "packed": dict(position_ids=packed, use_cache=False),
    }


def test_all_of_a_known_model_is_replaced(pair):
    model, patched, parts = pair
    said = {part.name: part.replaced for part in parts}
    layers = model.config.num_hidden_layers
    norms = [m for m in model.modules() if "Norm" in type(m).__name__]
    kind = model.config.model_type
    rotary, norm = (0 if kind == "gpt2" else layers), (0 if kind == "nemotron" else len(norms))
    assert said == dict(attention=layers, rotary=rotary, norm=norm, MLP=layers, loss=1)
    kept = {part.name: dict(part.kept) for part in parts if part.kept}
    other = {"NemotronLayerNorm1P computes something else": 5}
    assert kept == (dict(norm=other) if kind == "nemotron" else {})
    changed = [
        m for m, n in zip(patched.modules(), model.modules(), strict=True) if type(m) is not type(n)
    ]
    assert len(changed) == sum(said.values()) - layers  # attention itself goes by the registry
    assert list(patched.state_dict()) == list(model.state_dict())


@torch.no_grad()
def test_masks_are_those_of_eager_attention(pair):
    model, patched, _ = pair
    plain = model(TOKENS).logits
    assert plain.std() > 0.3, "weights too small to tell right from wrong"
    for name, options in masks().items():
        seen = options.get("attention_mask", torch.ones_like(TOKENS)).bool()
        expected, found = model(TOKENS, **options).logits, patched(TOKENS, **options).logits
        assert (found - expected)[seen].abs().max() < 1e-4, name
        assert name in ("none", "right") or (expected - plain)[seen].abs().max() > 1e-2, name


def test_loss_and_gradients(pair):
    """A packed row, a padded one whose first token has no target, and a loss by the token count."""
    model, patched, _ = pair
    mask = masks()["left"]["attention_mask"].clone()
    labels = TOKENS.masked_fill(mask == 0, -100)
    labels[0, 9] = labels[2, 1] = -100  # eager attention lets padding see everything
    options = dict(input_ids=TOKENS, attention_mask=mask, labels=labels, num_items_in_batch=50)
    found = []
    for m in (model, patched):
        m.train()
        m.zero_grad()
        out = m(**options)
        out.loss.backward()
        gradients = {n: p.grad for n, p in m.named_parameters()}
        found.append((out.loss.item(), gradients, type(out)))
        m.eval()
        assert (out.logits is None) == (m is patched)
    (expected, gradients, kind), (loss, ours, fused) = found
    assert fused is kind
    # About ten sums in a row per layer, forward and back, of at most 120 (tokens) products, each
    # with a relative error of ε √120 whose sign is random; both sides make it.
    tolerance = 2 * 2**-24 * math.sqrt(120) * 10 * model.config.num_hidden_layers
    assert abs(loss - expected) <= tolerance * expected
    for name, gradient in gradients.items():
        error = (ours[name] - gradient).norm() / gradient.norm()
        assert error <= tolerance, f"{name}: {error:.1e} against {tolerance:.1e}"


@torch.no_grad()
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate(pair, cache):
    """Prompts padded on the left, beyond the windows; a static cache has keys behind the query."""
    model, patched, _ = pair
    mask = torch.ones(2, 9, dtype=torch.int64)
    mask[0, :4] = 0
    options = dict(attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0)
    options["cache_implementation"] = cache
    options["disable_compile"] = True
    expected = model.generate(TOKENS[:2, :9], **options)
    assert torch.equal(patched.generate(TOKENS[:2, :9], **options), expected)


def test_unpatch_and_wrong_use(llama, capsys):
    model, patched = llama
    before = [type(m) for m in patched.modules()]
    with pytest.raises(ValueError, match="LlamaForCausalLM is not patched"):
        unpatch(patched)
    patch(patched)
    said = capsys.readouterr().out
    assert "ponder under LlamaForCausalLM:" in said and "norm       5 replaced" in said
    with pytest.raises(ValueError, match="the LlamaForCausalLM is patched already"):
        patch(patched)
    with pytest.raises(ValueError, match="layers.0.self_attn in the LlamaModel is patched already"):
        patch(patched.model)
    other = copy.deepcopy(patched)
    unpatch(patched)
    assert [type(m) for m in patched.modules()] == before
    assert patched.config._attn_implementation == "eager"
    with torch.no_grad():
        expected = model(TOKENS).logits
        assert torch.equal(patched(TOKENS).logits, expected)
        assert (other(TOKENS).logits - expected).abs().max() < 1e-4
    unpatch(other)
    assert [type(m) for m in other.modules()] == before
    made = type(patched)(model.config)
    patch(made, quiet=True)
    again = type(made)(model.config)  # by a class of ours: patched in no more than that
    with pytest.raises(ValueError, match="the LlamaForCausalLM is patched already"):
        patch(again)
    unpatch(again)
    assert type(again) is type(model)
    patch(other.model, quiet=True)
    with pytest.raises(ValueError, match="model in the LlamaForCausalLM is patched already"):
        patch(other)
    with pytest.raises(ValueError, match="takes a Transformers model, not a Linear"):
        patch(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="no weights: model.embed_tokens.weight is on the meta"):
        patch(model.to("meta"))


def test_what_was_given_another_class_since_is_not_unpatched(llama):
    """As `fully_shard` gives one, too: nothing is changed."""
    _, patched = llama
    patch(patched, quiet=True)
    before = [type(m) for m in patched.modules()]
    norm = patched.model.norm
    torch.nn.utils.parametrize.register_parametrization(norm, "weight", nn.Identity())
    with pytest.raises(ValueError, match="model.norm was made into a ParametrizedLlamaRMSNorm"):
        unpatch(patched)
    torch.nn.utils.parametrize.remove_parametrizations(norm, "weight")
    assert [type(m) for m in patched.modules()] == before
    unpatch(patched)


def test_models_that_share_a_config():
    one, two = (eager(FAMILIES["llama"]) for _ in range(2))
    two.config = one.config
    for model in (one, two):
        patch(model, quiet=True)
    for model in (one, two):
        unpatch(model)
    assert one.config._attn_implementation == "eager"
    patch(two, quiet=True)  # one is patched no more
    unpatch(two)
    assert one.config._attn_implementation == "eager"


def test_saves_as_if_unpatched(llama, tmp_path):
    model, patched = llama
    patch(patched, quiet=True)
    for m, name in ((model, "plain"), (patched, "patched")):
        m.save_pretrained(tmp_path / name)
    for file in (tmp_path / "plain").iterdir():
        assert (tmp_path / "patched" / file.name).read_bytes() == file.read_bytes(), file.name
    assert "ponder" not in json.dumps(json.loads((tmp_path / "patched/config.json").read_text()))


def test_pickled_as_patched(llama, tmp_path):
    """Into a process that has not heard of our attention; a deep copy goes the same way."""
    model, patched = llama
    patch(patched, quiet=True)
    torch.save(patched, tmp_path / "patched.pt")
    with torch.no_grad():
        torch.save(patched(TOKENS).logits, tmp_path / "logits.pt")
    script = """
import sys, torch
model, logits, tokens = (torch.load(f, weights_only=False) for f in sys.argv[1:])
with torch.no_grad():
    assert torch.equal(model(tokens).logits, logits)
from ponder.models import unpatch
unpatch(model)
assert "ponder" not in str([type(m).__mro__ for m in model.modules()])
assert model.config._attn_implementation == "eager"
"""
    torch.save(TOKENS, tmp_path / "tokens.pt")
    files = [str(tmp_path / f"{name}.pt") for name in ("patched", "logits", "tokens")]
    environment = os.environ | {"PYTHONPATH": ":".join(sys.path)}
    command = [sys.executable, "-c", script, *files]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@torch.no_grad()
def test_compiled():
    """In one graph, with our attention for every mask: nothing is said of Transformers'."""
    model = eager(FAMILIES["gemma2"])
    patched = copy.deepcopy(model)
    patch(patched, quiet=True)
    hf_attention._said.clear()
    for name in ("none", "left", "packed"):
        torch.compiler.reset()
        compiled = torch.compile(patched, backend="eager", fullgraph=True)
        given = masks()[name] | dict(use_cache=False)
        seen = given.get("attention_mask", torch.ones_like(TOKENS)).bool()
        error = (compiled(TOKENS, **given).logits - model(TOKENS, **given).logits)[seen]
        assert error.abs().max() < 1e-4 and not hf_attention._said, name
    whole = torch.ones(3, 1, 40, 40).tril().log()  # what is Transformers' is said while it traces
    with pytest.warns(UserWarning, match="Transformers computes such attention, not ponder"):
        compiled(TOKENS, attention_mask=dict(full_attention=whole, sliding_attention=whole))


@torch.no_grad()
def test_attention_alone_by_its_name(llama, tmp_path):
    register()
    model, _ = llama
    model.save_pretrained(tmp_path)
    named = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="ponder")
    for options in masks().values():
        seen = options.get("attention_mask", torch.ones_like(TOKENS)).bool()
        expected, found = model(TOKENS, **options).logits, named(TOKENS, **options).logits
        assert 0 < (found - expected)[seen].abs().max() < 1e-4


@torch.no_grad()
def test_a_window_that_the_model_leaves_to_the_mask():
    """Qwen2-MoE's layers do not tell their attention function of it."""
    experts = dict(num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16)
    windows = dict(use_sliding_window=True, sliding_window=7, max_window_layers=1)
    peer = Peer("qwen2_moe", experts | windows | dict(shared_expert_intermediate_size=16))
    model = eager(peer)
    patched = copy.deepcopy(model)
    patch(patched, quiet=True)
    far, near = (m(TOKENS).logits for m in (model, patched))
    assert (far - near).abs().max() < 1e-4
    model.config.sliding_window = 99
    assert (model(TOKENS).logits - near).abs().max() > 1e-2, "no window to be seen"


LATENT = dict(
    **dict(q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=16, qk_nope_head_dim=16),
    **dict(v_head_dim=16, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1),
    **dict(moe_intermediate_size=32, first_k_dense_replace=2),
)
SPARSE = LATENT | dict(index_topk=4, index_n_heads=2, index_head_dim=32)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["deepseek_v32", "glm_moe_dsa"])
def test_attention_that_chooses_its_keys_is_kept(kind):
    """By rules of theirs, which they tell attention functions of other names another way."""
    model = eager(Peer(kind, SPARSE))
    patched = copy.deepcopy(model)
    attention = patch(patched, quiet=True)[0]
    assert attention.replaced == 0 and "chooses its keys by itself" in str(attention)
    assert (patched(TOKENS).logits - model(TOKENS).logits).abs().max() < 1e-4
    model.set_attn_implementation("ponder")
    with pytest.raises(ValueError, match="Attention chooses its keys by itself"):
        model(TOKENS)


@torch.no_grad()
@pytest.mark.parametrize("name", ["none", "left", "right", "packed"])
def test_a_mask_that_was_made_for_more_queries(name):
    """Gemma 4's last layers compute the kept token alone, by a mask that was made for all."""
    more = dict(global_head_dim=32, num_kv_shared_layers=2, hidden_size_per_layer_input=8)
    layers = dict(num_hidden_layers=4, layer_types=2 * LAYERS["layer_types"])
    fields = GEMMA | layers | more | dict(vocab_size_per_layer_input=50)
    model = eager(Peer("gemma4_text", fields))
    patched = copy.deepcopy(model)
    patch(patched, quiet=True)
    options = masks()[name] | dict(logits_to_keep=1)
    last = options.get("attention_mask", torch.ones_like(TOKENS))[:, -1:].bool()
    error = patched(TOKENS, **options).logits - model(TOKENS, **options).logits
    assert error[last].abs().max() < 1e-4


@torch.no_grad()
def test_cu_seq_lens(llama):
    """As a collator without padding gives them: the row's sequences are as if alone."""
    model, patched = llama
    patch(patched, quiet=True)
    ends = torch.tensor([0, 11, 12, 40], dtype=torch.int32)
    found = patched(TOKENS[:1], cu_seq_lens_q=ends, cu_seq_lens_k=ends, use_cache=False).logits
    for start, end in zip(ends[:-1], ends[1:], strict=True):
        alone = model(TOKENS[:1, start:end]).logits
        assert (found[:, start:end] - alone).abs().max() < 1e-4
    with pytest.raises(ValueError, match="cu_seq_lens_q is given with 3 rows of 40 tokens"):
        patched(TOKENS, cu_seq_lens_q=ends, use_cache=False)


@torch.no_grad()
def test_a_mask_of_another_kind_is_transformers_own(llama):
    model, patched = llama
    patch(patched, quiet=True)
    hf_attention._said.clear()
    seen = torch.rand(3, 1, 40, 40, generator=torch.Generator().manual_seed(1)) > 0.5
    seen |= torch.eye(40, dtype=torch.bool)
    mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    with pytest.warns(UserWarning, match="LlamaAttention has a mask that is not causal"):
        found = patched(TOKENS, attention_mask=mask).logits
    assert (found - model(TOKENS, attention_mask=mask).logits).abs().max() < 1e-4

    with pytest.raises(ValueError, match=r"\(3, 1, 40, 40\) of torch.int32 in the layer"):
        patched(TOKENS, attention_mask=seen.int())


@torch.no_grad()
@pytest.mark.parametrize("family", ["qwen3", "gemma2"])
def test_weights_that_are_asked_for_are_transformers_own(family):
    model = eager(FAMILIES[family])
    patched = copy.deepcopy(model)
    patch(patched, quiet=True)
    mask = masks()["right"]["attention_mask"]
    options = dict(attention_mask=mask, output_attentions=True)
    expected, found = model(TOKENS, **options).attentions, patched(TOKENS, **options).attentions
    for ours, theirs in zip(found, expected, strict=True):
        seen = mask.bool()[:, None, :, None].expand_as(theirs)
        torch.testing.assert_close(ours[seen], theirs[seen], atol=1e-4, rtol=1e-4)
    model.config.output_attentions = True  # of every call
    attention = patch(model, quiet=True)[0]
    assert attention.kept == {"its config has output_attentions": 2}
    assert len(model(TOKENS).attentions) == 2


@pytest.mark.parametrize("kind", ["plain", "segments", "cu_seq_lens"])
def test_dropout_is_transformers_own(kind):
    """With the same random numbers: the fallback's mask is the one that the segments stood for."""
    hf_attention._said.clear()
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, 9, 8) for heads in (4, 2, 2))
    module = nn.Module()
    module.num_key_value_groups, module.is_causal = 2, True
    ids = torch.tensor([[0] * 4 + [1] * 5, [~0] * 3 + [0] * 6], dtype=torch.int32)
    i, j = torch.arange(9)[:, None], torch.arange(9)
    mask = ((j <= i) & (i - j < 3))[None, None].repeat(2, 1, 1, 1)
    given = dict(attention_mask=None)
    if kind == "segments":
        mask[0, :, 4:, :4] = mask[1, :, :, :3] = False
        given = dict(attention_mask=ids[:, None, None])
    elif kind == "cu_seq_lens":
        q, k, v, mask = (x[:1] for x in (q, k, v, mask))
        mask[0, :, 4:, :4] = False
        given |= dict(cu_seq_lens_q=torch.tensor([0, 4, 9], dtype=torch.int32))
    options = dict(dropout=0.5, scaling=0.3)
    torch.manual_seed(1)
    with pytest.warns(UserWarning, match="dropout 0.5"):
        found, _ = hf_attention.attend(module, q, k, v, sliding_window=3, **given, **options)
    torch.manual_seed(1)
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    expected, _ = sdpa_attention_forward(module, q, k, v, mask, **options)
    seen = mask.any(-1).transpose(1, 2)[..., None].expand_as(expected)
    torch.testing.assert_close(found[seen], expected[seen])
    with pytest.raises(ValueError, match=r"attention_mask is \(2, 9\) of torch.bool in the layer"):
        hf_attention.attend(module, q, k, v, torch.ones(2, 9).bool())


class Adapted(nn.Module):
    """A projection with something added, as LoRA's; its weight is the projection's."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base = base

    @property
    def weight(self):
        return self.base.weight

    bias = None

    def forward(self, x):
        return self.base(x) + x.mean(-1, keepdim=True)


@torch.no_grad()
@pytest.mark.parametrize("early", [True, False])
def test_what_is_wrapped_is_called(early):
    model = eager(FAMILIES["qwen3"])
    patched = copy.deepcopy(model)
    parts = [] if early else patch(patched, quiet=True)
    for m in (model, patched):
        m.model.layers[0].mlp.up_proj = Adapted(m.model.layers[0].mlp.up_proj)
        m.lm_head = Adapted(m.lm_head)
        m.model.layers[1].mlp.down_proj.register_forward_hook(lambda m, x, y: 2 * y)
    parts = patch(patched, quiet=True) if early else parts
    if early:
        kept = next(part.kept for part in parts if part.name == "MLP")
        assert kept == {
            "up_proj is wrapped or hooked (Adapted)": 1,
            "down_proj is wrapped or hooked (Linear)": 1,
        }
    assert (patched(TOKENS).logits - model(TOKENS).logits).abs().max() < 1e-4
    losses = [m.train()(input_ids=TOKENS, labels=TOKENS).loss for m in (model, patched)]
    torch.testing.assert_close(*losses)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
def test_an_activation_that_is_no_longer_the_proven_one_is_called(family):
    model = eager(FAMILIES[family])
    patched = copy.deepcopy(model)
    patch(patched, quiet=True)
    for m in (model, patched):
        mlps = [part for part in m.modules() if type(part).__name__.endswith("MLP")]
        name = next(n for n in ("act_fn", "activation_fn", "act") if hasattr(mlps[0], n))
        setattr(mlps[0], name, nn.ReLU())
        getattr(mlps[1], name).register_forward_hook(lambda m, x, y: 2 * y)
    assert (patched(TOKENS).logits - model(TOKENS).logits).abs().max() < 1e-4
    mlp = next(part for part in patch(model, quiet=True) if part.name == "MLP")
    assert mlp.replaced == 1 and f"1 kept: {name} is hooked" in str(mlp)


@torch.no_grad()
def test_an_activation_that_is_a_function(llama, monkeypatch):
    """It is the proven one, though a module would make a method of it."""
    _, patched = llama
    calls, kernel = [], hf_layers.gated_mlp
    monkeypatch.setattr(hf_layers, "gated_mlp", lambda *x, **o: calls.append(x) or kernel(*x, **o))
    for layer in patched.model.layers:
        del layer.mlp.act_fn
        layer.mlp.act_fn = lambda x: nn.functional.silu(x)
    patch(patched, quiet=True)
    calls.clear()
    patched(TOKENS)
    assert len(calls) == 2


@torch.no_grad()
def test_what_is_unknown_is_kept_and_named(llama, capsys):
    model, patched = llama

    class OddRMSNorm(type(model.model.norm)):
        def forward(self, x):
            return 3 * super().forward(x)

    for m in (model, patched):
        m.model.norm.__class__ = OddRMSNorm
        m.model.layers[0].mlp.act_fn = nn.Hardswish()
        m.model.layers[1].mlp.forward = types.MethodType(lambda self, x: x, m.model.layers[1].mlp)
    patch(patched)
    said = capsys.readouterr().out
    assert "norm       4 replaced; 1 kept: OddRMSNorm computes something else" in said
    assert "no kernel has its activation (Hardswish)" in said
    assert "1 kept: its forward is replaced" in said
    assert (patched(TOKENS).logits - model(TOKENS).logits).abs().max() < 1e-4


def test_dropout_is_told_wherever_it_is_written(llama):
    _, patched = llama
    for layer, rate in zip(patched.model.layers, (0.25, nn.Dropout(0.5)), strict=True):
        layer.self_attn.attention_dropout = rate  # Persimmon's is a module
    attention = next(part for part in patch(patched, quiet=True) if part.name == "attention")
    assert attention.note == "by PyTorch's sdpa while training, with dropout 0.5"

    model = eager(Peer("gpt2", dict(attn_pdrop=0.125)))
    attention = patch(model, quiet=True)[0]
    assert attention.note == "by PyTorch's sdpa while training, with dropout 0.125"


@torch.no_grad()
def test_layer_norms_that_no_kernel_computes_are_kept(llama):
    """Without parameters, and over two dimensions."""
    model, patched = llama
    for m in (model, patched):
        m.model.norm = nn.LayerNorm(64, elementwise_affine=False)
        m.model.layers[0].input_layernorm = nn.LayerNorm((40, 64))
    norms = next(part for part in patch(patched, quiet=True) if part.name == "norm")
    assert norms.replaced == 3 and sum(norms.kept.values()) == 2
    assert (patched(TOKENS).logits - model(TOKENS).logits).abs().max() < 1e-4


@torch.no_grad()
def test_an_attention_whose_forward_is_replaced_turns_as_before(llama):
    model, patched = llama
    for m in (model, patched):
        attention = m.model.layers[0].self_attn
        attention.forward = types.MethodType(type(attention).forward, attention)
    rotary = next(part for part in patch(patched, quiet=True) if part.name == "rotary")
    assert rotary.replaced == 1 and rotary.kept == {"its forward is replaced": 1}
    assert type(patched.model.layers[0].self_attn) is type(model.model.layers[0].self_attn)
    assert (patched(TOKENS).logits - model(TOKENS).logits).abs().max() < 1e-4


@torch.no_grad()
def test_queries_and_keys_of_two_dtypes_are_turned_by_transformers():
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as theirs

    ours = _turning(theirs)
    q, k, angles = torch.randn(1, 2, 3, 8), torch.randn(1, 1, 3, 8), torch.randn(1, 3, 4)
    angles = torch.cat([angles, angles], -1)
    hf_attention._said.clear()
    with pytest.warns(UserWarning, match="rotary positions of a part"):
        found = ours(q, k.double(), angles.cos(), angles.sin())
    for x, y in zip(found, theirs(q, k.double(), angles.cos(), angles.sin()), strict=True):
        assert x.dtype == y.dtype and torch.equal(x, y)


class SmallNorm(nn.Module):
    """What a norm can do that an RMSNorm does not: take off the mean, add a bias that is 0 yet,
    norm groups of numbers, each by itself (Qwen4-Exp's)."""

    def __init__(self, mean: bool, bias: bool, groups: int, width: int = 2048):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None
        self.mean, self.groups, self.eps = mean, groups, 1e-6

    def forward(self, x):
        x = (x - self.mean * x.mean(-1, keepdim=True)).unflatten(-1, (self.groups, -1))
        y = x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt()
        y = y.flatten(-2) * self.weight
        return y if self.bias is None else y + self.bias


@torch.no_grad()
def test_norms_of_one_class_are_looked_at_by_their_settings(llama):
    _, patched = llama
    forms = [(False, False, 1), (True, False, 1), (False, True, 1), (False, False, 4)]
    patched.model.more = nn.ModuleList([SmallNorm(*form) for form in forms])
    norm = next(part for part in patch(patched, quiet=True) if part.name == "norm")
    assert norm.replaced == 5 + 1 and norm.kept == {"SmallNorm computes something else": 3}
    assert [type(m) is SmallNorm for m in patched.model.more] == [False, True, True, True]


class ScaledMLP(nn.Module):
    """Halved, or clamped where numbers are large; its sum is 0 yet."""

    def __init__(self, scale: float, limit: float):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(64, 96), nn.Linear(64, 96)
        self.down_proj, self.act_fn = nn.Linear(96, 64, bias=False), nn.SiLU()
        nn.init.zeros_(self.down_proj.weight)
        self.scale, self.limit = scale, limit

    def forward(self, x):
        up = self.up_proj(x).clamp(-self.limit, self.limit)
        return self.scale * self.down_proj(self.act_fn(self.gate_proj(x)) * up)


class FailingNorm(nn.Module):
    """What gives no tensor, or none for a row of numbers."""

    def __init__(self, error: type[Exception] | None):
        super().__init__()
        self.weight, self.eps, self.error = nn.Parameter(torch.zeros(64)), 1e-6, error

    def forward(self, x):
        if self.error is not None:
            raise self.error
        return x * self.weight, x


def test_a_module_is_proven_on_a_copy_whatever_its_weights(llama):
    _, patched = llama
    forms = [(1.0, 1e9), (0.5, 1e9), (1.0, 10.0)]
    patched.model.mlps = nn.ModuleList([ScaledMLP(*form) for form in forms])
    patched.model.norms = nn.ModuleList([SmallNorm(mean, False, 1) for mean in (False, True)])
    errors = [None, AssertionError, AttributeError]
    patched.model.more = nn.ModuleList([FailingNorm(error) for error in errors])
    for m in patched.model.norms:
        nn.init.zeros_(m.weight)
    calls = []
    for m in (patched.model.norm, patched.model.norms[0], patched.model.mlps[0]):
        m.register_forward_hook(lambda *call: calls.append(call))
    parts = {part.name: part for part in patch(patched, quiet=True)}
    assert parts["MLP"].kept == {"ScaledMLP computes something else": 2}
    assert parts["norm"].kept == {
        "SmallNorm computes something else": 1,
        "FailingNorm computes something else": 3,
    }
    assert not calls and patched.model.norms[0].weight.eq(0).all()


class ParallelLinear(nn.Linear):
    """Half of a matrix, whose products another device adds to."""

    def forward(self, x):
        return 2 * super().forward(x)


FORMS = {
    "up, activation, down, dropout": lambda m, x: m.drop(m.down(m.act(m.up(x)))),
    "a dropout between": lambda m, x: m.down(m.drop(m.act(m.up(x)))),
    "a dropout of what comes in": lambda m, x: m.down(m.act(m.up(m.drop(x)))),
    "two dropouts": lambda m, x: m.drop(m.down(m.drop(m.act(m.up(x))))),
    "no dropout of that rate": lambda m, x: m.down(m.act(m.up(x))),
    "down first": lambda m, x: m.drop(m.up(m.act(m.down(x)))),
    "activation first": lambda m, x: m.drop(m.down(m.up(m.act(x)))),
    "activation last": lambda m, x: m.drop(m.act(m.down(m.up(x)))),
    "activation twice": lambda m, x: m.drop(m.act(m.down(m.act(m.up(x))))),
    "gated by itself": lambda m, x: m.drop(m.down(m.act(m.up(x)) * m.up(x))),
    "a norm before": lambda m, x: m.drop(m.down(m.act(m.up(nn.functional.rms_norm(x, (64,)))))),
    "a norm between": lambda m, x: m.drop(m.down(nn.functional.rms_norm(m.act(m.up(x)), (64,)))),
    "a clamp": lambda m, x: m.drop(m.down(m.act(m.up(x).clamp(-30, 30)))),
    "a residual": lambda m, x: x + m.drop(m.down(m.act(m.up(x)))),
    "a scale that is 1 yet": lambda m, x: m.scale * m.drop(m.down(m.act(m.up(x)))),
    "no bias": lambda m, x: m.drop(nn.functional.linear(m.act(m.up(x)), m.down.weight)),
    "another bias": lambda m, x: m.drop(m.down(m.act(m.up(x)))) + m.up.bias,
}


class SquareMLP(nn.Module):
    """Two matrices around an activation, in one of the FORMS, which no simple setting tells."""

    def __init__(self, form: str, linear: type = nn.Linear, rate: float = 0.0):
        super().__init__()
        self.up, self.down, self.act = nn.Linear(64, 64), linear(64, 64), nn.GELU()
        self.drop, self.form = nn.Dropout(rate), [form]
        self.register_buffer("scale", torch.ones(1))

    def forward(self, x, noise=0.0):
        return FORMS[self.form[0]](self, x + noise)


def test_a_plain_mlp_is_replaced_by_what_it_computes(llama):
    """Whatever the rate of its dropout is when it is patched."""
    _, patched = llama
    torch.manual_seed(0)
    forms = [(form,) for form in FORMS] + [(next(iter(FORMS)), ParallelLinear)]
    patched.model.more = nn.ModuleList([SquareMLP(*form) for form in forms])
    patched.model.grows = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64))
    plain = copy.deepcopy(patched.model.more)
    mlp = next(part for part in patch(patched, quiet=True) if part.name == "MLP")
    kept = {"SquareMLP computes something else": len(FORMS) - 1}
    assert mlp.kept == kept | {"down is wrapped or hooked (ParallelLinear)": 1}
    x, found = torch.randn(2, 9, 64, requires_grad=True), []
    for mlps in (plain, patched.model.more):
        for m in mlps:
            m.train().drop.p, m.scale[:] = 0.25, 3.0
            torch.manual_seed(1)
            y = m(x)
            to = [x, *m.parameters()]
            found.append([y, *torch.autograd.grad(y.square().sum(), to, materialize_grads=True)])
    for expected, ours in zip(found[: len(forms)], found[len(forms) :], strict=True):
        torch.testing.assert_close(ours, expected)
    patched.model.grows.append(nn.ReLU())
    assert patched.model.grows(x).min() == 0
    ours = patched.model.more[0].eval()
    assert type(ours) is not SquareMLP
    for given, options in (((x, 1.0), {}), ((), dict(x=x, noise=1.0))):
        torch.testing.assert_close(ours(*given, **options), plain[0].eval()(x, 1.0))
        torch.testing.assert_close(ours(*given, **options), ours(x + 1.0))


def test_large_numbers_of_the_proof_are_none_too_large_for_fp16():
    model = eager(Peer("llama", dict(hidden_act="relu2"))).half()
    assert not any(part.kept for part in patch(model, quiet=True))


def test_an_mlp_with_dropout_of_its_own_is_kept():
    """SeedOss's drops out of its sum, which shows only while it trains."""
    for rate, kept in ((0.1, {"SeedOssMLP computes something else": 2}), (0.0, {})):
        peer = Peer("seed_oss", GROUPED | dict(residual_dropout=rate))
        mlp = next(part for part in patch(peer.build(), quiet=True) if part.name == "MLP")
        assert mlp.kept == kept and mlp.replaced == 2 - sum(kept.values())


class Packed(torch.Tensor):
    """What quantized weights are in torchao: a Tensor of another class, in a plain Linear."""


def test_weights_of_another_class_are_not_read(llama):
    _, patched = llama
    weight = patched.model.layers[0].mlp.up_proj.weight
    weight.data, other = weight.data, weight.data.as_subclass(Packed)
    patched.model.layers[0].mlp.up_proj.weight = nn.Parameter(other)
    mlp = next(part for part in patch(patched, quiet=True) if part.name == "MLP")
    assert mlp.kept == {"up_proj is quantized or distributed (its weight is a Packed)": 1}


def test_an_mlp_with_parameters_of_its_own_is_kept(llama):
    _, patched = llama
    patched.model.layers[0].mlp.scale = nn.Parameter(torch.ones(1))
    mlp = next(part for part in patch(patched, quiet=True) if part.name == "MLP")
    assert mlp.kept == {"LlamaMLP has parameters beside its projections": 1} and mlp.replaced == 1


def test_autocast_and_bfloat16(llama):
    """Within bf16's rounding (2^-8) of eight products in a row of the same in fp32."""
    model, patched = llama
    patch(patched, quiet=True)
    options = dict(input_ids=TOKENS, labels=TOKENS)
    exact = model.train()(**options).loss.item()
    with torch.autocast("cpu", torch.bfloat16):
        assert patched.train()(**options).loss.item() == pytest.approx(exact, rel=2**-8 * 8)
    patched.to(torch.bfloat16)
    loss = patched(**options).loss
    loss.backward()
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(exact, rel=2**-8 * 8)
    assert all(p.grad.isfinite().all() for p in patched.parameters())


@torch.no_grad()
def test_half_precision_of_a_model_that_views_what_attention_gives():
    """AFMoE's, after which only contiguous numbers can come; no further off than eager attention:
    a model's half of the roundings are ours, so 1.5 times its error is allowed."""
    experts = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
    model = eager(Peer("afmoe", GROUPED | experts | dict(sliding_window=7)))
    patched, exact = copy.deepcopy(model).bfloat16(), model(TOKENS).logits
    patch(patched, quiet=True)
    errors = [(m(TOKENS).logits - exact).norm() for m in (model.bfloat16(), patched)]
    assert errors[1] < 1.5 * errors[0]


def test_what_wants_logits_gets_them(llama):
    model, patched = llama
    patch(patched, quiet=True)
    expected = model(input_ids=TOKENS, labels=TOKENS)
    found = patched(input_ids=TOKENS, labels=TOKENS)  # not training
    assert (found.logits - expected.logits).abs().max() < 1e-4
    torch.testing.assert_close(found.loss, expected.loss)
    patched.train()
    assert patched(input_ids=TOKENS).logits is not None
    loss, logits, *_ = patched(input_ids=TOKENS, labels=TOKENS, return_dict=False)
    torch.testing.assert_close(loss, expected.loss)
    patched.loss_function = lambda logits, labels, **_: logits.sum()
    torch.testing.assert_close(patched(input_ids=TOKENS, labels=TOKENS).loss, logits.sum())


def test_the_fused_loss_is_that_of_the_call(llama):
    """Whatever else is given with the labels, in Transformers' own order or by name."""
    model, patched = llama
    patch(patched, quiet=True)
    mask = (torch.arange(40) >= torch.tensor([[0], [7], [30]])).long()
    labels = TOKENS.where((mask & mask.roll(1, 1)).bool(), -100)  # none from a padded token
    last = dict(labels=TOKENS[:, -8:], logits_to_keep=8)
    calls = [
        ((TOKENS, mask), dict(labels=labels)),
        ((TOKENS,), dict(labels=labels, attention_mask=mask)),
        ((TOKENS,), dict(labels=TOKENS, ignore_index=int(TOKENS[0, 5]))),
        ((TOKENS,), last),
    ]
    losses = []
    for args, options in calls:
        expected = model.train()(*args, **options).loss
        found = patched.train()(*args, **options)
        torch.testing.assert_close(found.loss, expected)
        losses.append(expected.item())
    assert len({round(x, 4) for x in losses}) == 3  # the mask's twice

    called = []
    patched.lm_head.register_forward_hook(lambda *_: called.append(1))
    torch.testing.assert_close(
        patched(TOKENS, labels=TOKENS).loss, model(TOKENS, labels=TOKENS).loss
    )
    assert called == [1]


def test_a_loss_of_ones_own_is_kept(llama):
    model, replaced = llama
    replaced.forward = types.MethodType(type(model).forward, replaced)
    loss = patch(replaced, quiet=True)[-1]
    assert loss.kept == {"the model's forward is replaced": 1}
    own = eager(FAMILIES["llama"])
    own.__class__ = type("Own", (type(model),), {})
    loss = patch(own, quiet=True)[-1]
    assert loss.name == "loss" and loss.kept == {"that of Own is not known": 1}


def rows(count: int) -> list[dict]:
    return [
        dict(input_ids=TOKENS[i % 3].tolist(), labels=TOKENS[i % 3].tolist()) for i in range(count)
    ]


def trained(model, folder, **options) -> tuple[list[float], int]:
    """The losses of three steps of Transformers' own trainer."""
    arguments = TrainingArguments(
        folder,
        max_steps=3,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )
    trainer = Trainer(model, arguments, train_dataset=rows(8))
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def test_trainer(llama, tmp_path):
    """With accumulation, and activations computed twice."""
    options = dict(gradient_checkpointing=True, gradient_accumulation_steps=2)
    model, patched = llama
    patch(patched, quiet=True)
    expected, found = trained(model, tmp_path, **options), trained(patched, tmp_path, **options)
    assert found == pytest.approx(expected, rel=1e-3) and found[-1] < 0.95 * found[0]


def test_trl_and_peft(llama, tmp_path):
    trl = pytest.importorskip("trl", reason="TRL is not installed")
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    from datasets import Dataset

    model, patched = llama
    patch(patched, quiet=True)
    found = []
    for m in (model, patched):
        arguments = trl.SFTConfig(
            tmp_path,
            max_steps=2,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            use_cpu=True,
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            bf16=False,
            dataset_kwargs=dict(skip_prepare_dataset=True),
            gradient_checkpointing=False,
            remove_unused_columns=False,
        )
        torch.manual_seed(0)
        lora = peft.LoraConfig(target_modules=["q_proj", "up_proj"], init_lora_weights=False)
        trainer = trl.SFTTrainer(
            m,
            arguments,
            train_dataset=Dataset.from_list(rows(6)),
            peft_config=lora,
            data_collator=lambda batch: (
                {k: torch.tensor([b[k] for b in batch]) for k in batch[0]}
                | dict(attention_mask=torch.ones(len(batch), 40, dtype=torch.int64))
            ),
            processing_class=PreTrainedTokenizerFast(
                tokenizer_object=character_tokenizer("ab"), eos_token="<eos>", pad_token="<eos>"
            ),
        )
        trainer.train()
        found.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
    assert found[1] == pytest.approx(found[0], rel=1e-3) and found[0][0] != found[0][1]


def test_the_kernels_themselves_under_a_model(monkeypatch):
    """In Triton's interpreter: loss, gradients and two generated tokens."""
    pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    shape = dict(
        vocab_size=19, hidden_size=32, intermediate_size=48, num_hidden_layers=1, head_dim=16,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=32, sliding_window=4,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    config = Gemma2Config(**shape)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    for p in model.parameters():
        nn.init.normal_(p, std=0.2)
    patched = copy.deepcopy(model)
    assert not any(part.kept for part in patch(patched, quiet=True))
    tokens = torch.randint(0, 19, (1, 9))
    for m in (model, patched):
        m.train()(input_ids=tokens, labels=tokens).loss.backward()
        m.eval()
    for (name, p), q in zip(patched.named_parameters(), model.parameters(), strict=True):
        error = (p.grad - q.grad).norm() / q.grad.norm()
        assert error < 1e-5, (name, error)
    options = dict(max_new_tokens=2, do_sample=False)
    assert torch.equal(patched.generate(tokens, **options), model.generate(tokens, **options))


def test_decoding_where_values_are_not_as_wide_as_keys(monkeypatch):
    """DeepSeek-V3's, of which the decode kernel takes none."""
    pytest.importorskip("triton", reason="Triton is not installed")
    model = eager(Peer("deepseek_v3", LATENT | dict(num_hidden_layers=1)))
    patched = copy.deepcopy(model)
    patch(patched, quiet=True)
    options = dict(max_new_tokens=2, do_sample=False, attention_mask=torch.ones(1, 6).long())
    expected = model.generate(TOKENS[:1, :6], **options)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert torch.equal(patched.generate(TOKENS[:1, :6], **options), expected)


@torch.no_grad()
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("name", ["none", "packed"])
def test_a_model_that_makes_more_of_its_mask_gets_a_whole_one(window, name):
    """Doge adds its own mask to the causal one, which it must then be given."""
    model = eager(Peer("doge", GROUPED | dict(sliding_window=window)))
    expected = model(TOKENS, **masks()[name]).logits
    attention = patch(model, quiet=True)[0]
    assert attention.kept == {"DogeForCausalLM tells its layers by the whole mask alone": 2}
    assert (model(TOKENS, **masks()[name]).logits - expected).abs().max() < 1e-4
    hf_attention._said.clear()
    model.set_attn_implementation("ponder")
    with pytest.warns(UserWarning, match="a mask that is not causal"):
        found = model(TOKENS, **masks()[name]).logits
    assert (found - expected).abs().max() < 1e-4


def test_a_model_whose_attention_takes_no_other_keeps_it(monkeypatch, llama):
    model, _ = llama
    monkeypatch.setattr(type(model), "_supports_attention_backend", False)
    before = model.config._attn_implementation
    parts = {part.name: part for part in patch(model, quiet=True)}
    assert parts["attention"].replaced == 0
    assert any("takes no attention of others" in why for why in parts["attention"].kept)
    assert model.config._attn_implementation == before
    unpatch(model)


@torch.no_grad()
def test_a_window_that_no_layer_tells():
    """PhiMoE's layers know of no window: Transformers' whole mask has it."""
    experts = dict(num_local_experts=2, num_experts_per_tok=2)
    model = eager(Peer("phimoe", GROUPED | experts | dict(sliding_window=5)))
    expected = model(TOKENS).logits
    register()
    model.set_attn_implementation("ponder")
    torch.testing.assert_close(model(TOKENS).logits, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("by_name", [True, False])
def test_a_window_that_a_cache_alone_has(by_name):
    """Moshi's static cache asks for masks with one."""
    model = eager(Peer("moshi", GROUPED | dict(sliding_window=7, ffn_dim=96)))
    options = dict(max_new_tokens=6, do_sample=False, pad_token_id=0, output_logits=True)
    options |= dict(cache_implementation="static", disable_compile=True)
    options |= dict(return_dict_in_generate=True, attention_mask=torch.ones(3, 12).long())
    expected = model.generate(TOKENS[:, :12], **options).logits
    if by_name:
        register()
        model.set_attn_implementation("ponder")
    else:
        patch(model, quiet=True)
    for found, logits in zip(
        model.generate(TOKENS[:, :12], **options).logits, expected, strict=True
    ):
        assert (found - logits).abs().max() < 1e-4


@torch.no_grad()
def test_rotary_positions_of_queries_alone():
    """Qwen4-Exp's indexer turns its keys later."""
    indexer = dict(indexer_n_heads=2, indexer_kv_heads=1, indexer_head_dim=16, indexer_budget=16)
    more = dict(indexer_compress_ratio=4, hc_lowrank=8, hc_count=2, num_experts=4)
    more |= dict(moe_intermediate_size=32, shared_expert_intermediate_size=32)
    layers = dict(num_hidden_layers=1, layer_types=["indexed_attention"], num_experts_per_tok=2)
    if Version(transformers.__version__) < Version("5.23"):
        pytest.skip("needs Qwen4-Exp as Transformers 5.23 has it")
    model = eager(Peer("qwen4_exp_text", GROUPED | indexer | more | layers))
    expected = model(TOKENS).logits
    patch(model, quiet=True)
    assert (model(TOKENS).logits - expected).abs().max() < 1e-4


def test_every_part_says_what_was_found():
    """LongCat's attention by another name, Nemotron's norms, BERT's MLPs that are no modules."""
    shape = dict(kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=16, qk_nope_head_dim=16)
    shape |= dict(num_layers=1, ffn_hidden_size=96, expert_ffn_hidden_size=32, moe_topk=2)
    longcat = Peer("longcat_flash", shape | dict(n_routed_experts=4, v_head_dim=16)).build()
    assert patch(longcat, quiet=True)[0].replaced == 2
    norm = next(p for p in patch(Peer("nemotron").build(), quiet=True) if p.name == "norm")
    assert norm.kept == {"NemotronLayerNorm1P computes something else": 5}
    mamba = Peer("mamba2", dict(num_heads=8, head_dim=16, n_groups=1, state_size=16)).build()
    expected = mamba(TOKENS).logits
    norm = next(p for p in patch(mamba, quiet=True) if p.name == "norm")
    assert norm.kept == {"MambaRMSNormGated computes something else": 2}
    assert (mamba(TOKENS).logits - expected).abs().max() < 1e-4
    bert = Peer("bert", dict(is_decoder=True)).build()
    bert.attention = nn.Module()  # ModernBERT's, where its dropout is left out
    bert.attention.qkv, bert.attention.out = nn.Linear(64, 192), nn.Linear(64, 64)
    bert.attention.drop = nn.Identity()
    bert = patch(bert, quiet=True)
    mlp = next(part for part in bert if part.name == "MLP")
    assert str(mlp) == "  MLP        0 replaced; none was found"
