"""GPT against Transformers' models with the same weights, and its own promises."""

import json
import math
from dataclasses import asdict, replace

import pytest
import torch

from ponder.models import GPT, GPTConfig, KVCache, layout, load
from ponder.models.config_json import model_type
from ponder.models.layers import RopeScaling

from .peers import PEERS, randomize

TINY = GPTConfig(
    vocab_size=50, context=64, n_layer=2, n_head=4, n_kv_head=2, head_dim=16, n_embd=64
)


@pytest.fixture(scope="module", params=PEERS)
def pair(request, tmp_path_factory):
    """A Transformers model, and the GPT loaded from its folder."""
    peer = PEERS[request.param].build()
    folder = tmp_path_factory.mktemp("peer")
    peer.save_pretrained(folder)
    return peer, load(folder)


def chunked_logits(model: GPT, tokens, lengths: list[int]):
    """Logits (B, T, V) computed in pieces: NaN where a row did not get that far.

    The first lengths[b] tokens of row b in one right-padded prefill, the next three in one chunk,
    then one at a time until the longest row is whole; the cache grows as it must.
    """
    B, T = tokens.shape
    logits = torch.full((B, T, model.config.vocab_size), math.nan)
    cache = KVCache(model.config, B, max(lengths))
    padded = tokens[:, : max(lengths)].clone()
    for b, n in enumerate(lengths):
        padded[b, n:] = 0
    step = model.logits(model.hidden(padded, cache))
    cache.lengths += torch.tensor(lengths)
    for b, n in enumerate(lengths):
        logits[b, :n] = step[b, :n]
    n = 3
    while (longest := int(cache.lengths.max())) + n <= T:
        position = cache.lengths[:, None] + torch.arange(n)
        row = torch.arange(B)[:, None]
        cache.resize(longest + n)
        hidden = model.hidden(tokens[row, position], cache)
        logits[row, position] = model.logits(hidden)
        cache.lengths += n
        n = 1
    return logits


@torch.no_grad()
def test_logits_equal_transformers(pair):
    peer, model = pair
    tokens = torch.randint(0, 50, (3, 40))
    expected = peer(tokens).logits
    assert expected.std() > 0.3, "weights too small to tell right from wrong"
    assert (model(tokens) - expected).abs().max() < 1e-4


@torch.no_grad()
def test_cached_logits_equal_transformers(pair):
    peer, model = pair
    tokens = torch.randint(0, 50, (3, 24))
    logits = chunked_logits(model, tokens, lengths=[9, 1, 14])
    done = logits.isfinite().all(-1)
    assert done.sum(1).tolist() == [19, 11, 24]
    assert (logits - peer(tokens).logits)[done].abs().max() < 1e-4


@torch.no_grad()
def test_packed_documents_are_as_if_alone(pair):
    _, model = pair
    lengths = 1, 17, 9
    row = torch.randint(0, 50, (1, sum(lengths)))
    segment_ids = torch.arange(3).repeat_interleave(torch.tensor(lengths))[None]
    packed = model(row, segment_ids=segment_ids)
    alone = torch.cat([model(part) for part in row.split(lengths, 1)], 1)
    assert (packed - alone).abs().max() < 1e-5
    assert (packed - model(row)).abs().max() > 1e-2


def test_loss_and_gradients_equal_transformers(pair):
    peer, model = pair
    tokens = torch.randint(0, 50, (3, 41))
    targets = tokens[:, 1:].clone()
    targets[0, :7] = -100
    logits = peer(tokens[:, :-1]).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    loss = model(tokens[:, :-1], targets)
    peer.zero_grad()
    model.zero_grad()
    expected.backward()
    loss.backward()
    # About ten sums in a row per layer, forward and back, of at most 120 (tokens) products, each
    # with a relative error of ε √120 whose sign is random; both sides make it.
    c = model.config
    tolerance = 2 * 2**-24 * math.sqrt(max(c.n_inner, tokens.numel())) * 10 * c.n_layer
    assert abs(loss.item() - expected.item()) <= tolerance * expected.item()
    grads = {name: p.grad for name, p in model.named_parameters()}
    ours = layout.to_checkpoint(model_type(model.config), grads)
    for name, p in peer.named_parameters():
        grad, expected = ours.pop(name), p.grad
        if name.endswith("c_attn.bias"):
            # A key bias adds the same to every score of a query: without rotary positions it has
            # no gradient, and what both sides have is rounding.
            keys = slice(c.n_embd, 2 * c.n_embd)
            assert grad[keys].norm() <= tolerance * grad.norm()
            grad, expected = (torch.cat((g[: c.n_embd], g[2 * c.n_embd :])) for g in (grad, p.grad))
        error = (grad - expected).norm() / expected.norm()
        assert error <= tolerance, f"{name}: {error:.1e} against {tolerance:.1e}"
    assert not ours


def test_a_shape_comes_back_from_json():
    scaling = RopeScaling(8.0, 4096, low=1.0, high=4.0)
    shape = GPTConfig(100, n_layer=4, rope_scaling=scaling, nope_layers=(1, 3), gated=False)
    for config in (TINY, shape):
        assert GPTConfig.of(json.loads(json.dumps(asdict(config)))) == config


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_loss_reductions(reduction):
    torch.manual_seed(0)
    model = GPT(TINY)
    randomize(model)
    tokens = torch.randint(0, 50, (2, 9))
    targets = tokens.roll(-1, 1)
    targets[:, -1] = -100
    logits = model(tokens).flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, targets.flatten(), reduction=reduction)
    loss = model(tokens, targets, reduction=reduction)
    torch.testing.assert_close(loss.flatten(), expected.flatten())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("gated", [True, False])
def test_every_parameter_learns_from_the_start(tied, gated):
    """Output projections and an untied head start at zero: steps later nothing is left behind."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(50, n_layer=2, tie_embeddings=tied, gated=gated, attention_bias=True))
    tokens = torch.randint(0, 50, (4, 33))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2 if tied else 3):
        optimizer.zero_grad()
        loss = model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        optimizer.step()
    for name, p in model.named_parameters():
        # The key bias adds the same to every score of a query that has no position: a rotary one
        # does have, so it, too, has a gradient.
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.norm() > 0, name


@pytest.mark.parametrize("width", [64, 512])
@pytest.mark.parametrize("tied", [True, False])
def test_first_loss_is_a_uniform_guess(tied, width):
    torch.manual_seed(0)
    model = GPT(GPTConfig(100, n_layer=1, n_embd=width, tie_embeddings=tied))
    tokens = torch.randint(0, 100, (8, 65))
    assert abs(model(tokens[:, :-1], tokens[:, 1:]).item() - math.log(100)) < 0.6


def test_tied_head_is_the_embedding():
    tied, untied = GPT(TINY), GPT(GPTConfig(**vars(TINY) | dict(tie_embeddings=False)))
    assert tied.lm_head.weight is tied.embed_tokens.weight
    assert untied.parameter_count - tied.parameter_count == 50 * 64
    assert tied.parameter_count == sum(p.numel() for p in set(tied.parameters()))


@torch.no_grad()
def test_rotary_tables_stay_fp32():
    model = GPT(TINY)
    before = model.rotary.cos.clone()
    model.to(torch.bfloat16)
    assert model.embed_tokens.weight.dtype == torch.bfloat16
    assert model.rotary.cos.dtype == torch.float32 and torch.equal(model.rotary.cos, before)


def test_autocast_trains_near_fp32():
    """bf16 products around an fp32 residual stream: loss within bf16's rounding, all gradients."""
    torch.manual_seed(0)
    model = GPT(TINY)
    randomize(model)
    tokens = torch.randint(0, 50, (4, 33))
    exact = model(tokens[:, :-1], tokens[:, 1:])
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(tokens[:, :-1], tokens[:, 1:])
    loss.backward()
    assert loss.item() == pytest.approx(exact.item(), rel=2**-8 * 10)
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_unsound_configurations_are_told_at_once():
    with pytest.raises(ValueError) as caught:
        GPTConfig(0, n_head=6, n_kv_head=4, head_dim=300, activation="swoosh", rope_theta=0.0)
    for part in (
        "vocab_size is 0",
        "n_head 6 is not a multiple of n_kv_head 4",
        "head_dim is 300",
        "activation is 'swoosh'; known are relu",
        "rope_theta is 0.0",
    ):
        assert part in str(caught.value)


def test_more_tokens_than_the_context():
    with pytest.raises(ValueError, match="65 tokens are more than the model's context of 64"):
        GPT(TINY)(torch.zeros(1, 65, dtype=torch.long))


def test_segments_are_not_for_a_cache():
    tokens = torch.zeros(1, 4, dtype=torch.long)
    with pytest.raises(ValueError, match="segment_ids are given with a cache"):
        GPT(TINY).hidden(tokens, KVCache(TINY, 1, 8), tokens)


def test_gradients_are_not_for_a_cache():
    with pytest.raises(ValueError, match="a cache holds no gradients: .*no_grad"):
        GPT(TINY).hidden(torch.zeros(1, 4, dtype=torch.long), KVCache(TINY, 1, 8))


@torch.no_grad()
def test_a_cache_is_not_written_past_its_end():
    model, cache = GPT(TINY), KVCache(TINY, 2, 8)
    full = "the cache has room for 8 tokens a row, not for 9"
    with pytest.raises(ValueError, match=full):
        model.hidden(torch.zeros(2, 9, dtype=torch.long), cache)
    model.hidden(torch.zeros(2, 8, dtype=torch.long), cache)
    cache.lengths.copy_(torch.tensor([8, 3]))
    with pytest.raises(ValueError, match=full):  # its keys would be those of the next row
        model.hidden(torch.zeros(2, 1, dtype=torch.long), cache)


def test_a_model_made_without_memory_has_its_rotary_tables():
    model = GPT(TINY)
    with torch.device("meta"):
        empty = GPT(TINY)
    empty.to_empty(device="cpu").load_state_dict(model.state_dict())
    tokens = torch.arange(12).view(2, 6)
    assert empty(tokens).equal(model(tokens))


@pytest.mark.parametrize("tied", [False, True])
def test_a_grown_vocabulary_says_what_it_said(tied):
    torch.manual_seed(0)
    model = GPT(replace(TINY, tie_embeddings=tied))
    torch.nn.init.normal_(model.lm_head.weight)
    tokens = torch.arange(12).view(2, 6)
    before, size = model(tokens), TINY.vocab_size
    assert model.grow_vocabulary(size) is model and model(tokens).equal(before)
    after = model.grow_vocabulary(size + 3)(tokens)
    torch.testing.assert_close(after[..., :size], before)
    torch.testing.assert_close(after[..., size:], before.mean(-1, keepdim=True).expand(-1, -1, 3))
    assert model.config.vocab_size == model.lm_head.out_features == size + 3
    assert (model.lm_head.weight is model.embed_tokens.weight) == tied
    model(tokens + size - 9, tokens).backward()  # the new ones too
    assert model.embed_tokens.weight.grad[size:].abs().sum() > 0
    with pytest.raises(ValueError, match=f"size is 5; the model has {size + 3} tokens"):
        model.grow_vocabulary(5)
