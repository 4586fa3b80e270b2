"""The decoder in C: the model's own numbers, the same bits in any company, the same tokens."""

import itertools

import pytest
import torch

from ponder.inference.engine import LocalEngine, Request, SamplingParams
from ponder.kernels.sample_tokens import sample_tokens_reference, uniform
from ponder.models import KVCache
from ponder.models.decoder import Decoder, bf16_pays, fits

from .tiny import gpt

VARIANTS = [
    dict(),
    dict(qk_norm=False, attention_bias=True, n_kv_head=4, activation="gelu"),
    dict(gated=False, activation="relu2", tie_embeddings=False, n_kv_head=1),
    dict(n_embd=36, n_inner=52, head_dim=20, n_head=3, n_kv_head=3, vocab_size=37),
    dict(n_embd=37, n_inner=51, head_dim=34, activation="relu", qkv_bias=True, qk_norm=False),
    dict(norm="layer", positions="learned", attention_bias=True, mlp_bias=True, qk_norm=False)
    | dict(gated=False, activation="gelu_tanh"),
    dict(nope_layers=(1,), activation="tanh"),
    dict(activation="sigmoid", head_dim=80),
    dict(activation="identity", gated=False),
    dict(n_head=6, n_kv_head=1, head_dim=64),  # heads that read their keys together: four, then two
    dict(n_head=3, n_kv_head=1, head_dim=48),
]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 0.25)])
def test_decoder_is_the_model(variant, dtype, tolerance):
    """Two right-padded prompts prefilled, then token by token, against one full forward pass."""
    model = gpt(**variant)
    tokens = torch.randint(0, model.config.vocab_size, (2, 70))
    starts = torch.tensor([7, 32])
    decoder = Decoder(model, dtype)
    with torch.inference_mode():
        wanted = model(tokens)
        cache = KVCache(model.config, 2, 32, dtype=dtype)
        prefilled = decoder.logits(decoder.hidden(tokens[:, :32], cache))
        torch.testing.assert_close(prefilled, wanted[:, :32], rtol=0, atol=tolerance)
        cache.lengths += starts
        for _ in range(30):
            if (cache.lengths >= cache.capacity).any():
                cache.resize(cache.capacity + 16)
            here = torch.arange(2), cache.lengths
            logits = decoder.logits(decoder.hidden(tokens[here][:, None], cache))
            torch.testing.assert_close(logits[:, 0], wanted[here], rtol=0, atol=tolerance)
            cache.lengths += 1


@pytest.mark.parametrize("variant", [*VARIANTS[:6], *VARIANTS[-2:], dict(n_embd=96, n_inner=288)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rows_bits_do_not_depend_on_its_place(variant, dtype, set_threads):
    """Rows that are alike get logits alike, however many there are, of how many the cache has room,
    which are asked for, and on how many threads; and the same with a longer cache."""
    model = gpt(**variant)
    c = model.config
    keys, values = torch.randn(2, c.n_layer, 1, c.n_kv_head, 64, c.head_dim)
    found, blocks = [], []
    with torch.inference_mode():
        decoder = Decoder(model, dtype)
        for threads, rows, capacity in itertools.product((1, 2, 5), (1, 13, 200), (32, 64)):
            set_threads(threads)
            cache = KVCache(c, rows, capacity, dtype=dtype)
            cache.keys.copy_(keys[:, :, :, :capacity])
            cache.values.copy_(values[:, :, :, :capacity])
            cache.lengths += 20
            cache.empty = False
            for some in (None, torch.randperm(rows)[: rows // 3 + 1]):
                tokens = torch.full((rows if some is None else len(some), 1), 5)
                found.append(decoder.logits(decoder.hidden(tokens, cache, some))[:, 0])
            tokens = torch.arange(capacity).remainder(20).expand(rows // 8 + 1, -1)
            block = KVCache(c, len(tokens), capacity, dtype=dtype)
            decoder.hidden(tokens, block)
            blocks.append(torch.stack((block.keys, block.values))[..., :32, :])
    for logits in found:
        assert (logits == found[0][:1]).all()
    for block in blocks:
        assert (block == blocks[0][:, :, :1]).all()


def test_a_prefill_leaves_what_a_pass_does():
    decoder = Decoder(gpt())
    whole, filled = (KVCache(decoder.config, 3, 32) for _ in range(2))
    tokens = torch.randint(0, 21, (3, 30))
    decoder.hidden(tokens, whole)
    decoder.prefill(tokens, filled)
    assert torch.equal(whole.keys, filled.keys) and torch.equal(whole.values, filled.values)
    assert filled.keys[:, :, :, :30].abs().min() > 0 and not filled.empty


def test_a_row_that_is_left_out_is_left_alone():
    model = gpt()
    decoder, cache = Decoder(model), KVCache(model.config, 9, 32)
    cache.keys.fill_(7.0)
    cache.values.fill_(7.0)
    cache.lengths += 3
    cache.empty = False
    decoder.hidden(torch.tensor([[4], [5]]), cache, torch.tensor([6, 2]))
    written = (cache.keys != 7.0).flatten(2).any(-1).any(0)
    assert written.nonzero().flatten().tolist() == [2, 6]
    assert (cache.keys[:, [2, 6], :, [3, 3]] != 7.0).all()


def test_of_nothing_it_makes_nothing():
    decoder, none = Decoder(gpt()), torch.zeros(0, dtype=torch.int64)
    hidden = decoder.hidden(none[:, None], KVCache(decoder.config, 0, 32))
    logits = decoder.logits(hidden[:, -1])
    given = dict(temperature=torch.ones(0), top_p=torch.ones(0), min_p=torch.ones(0), top_k=none)
    tokens, logprobs = decoder.sample_tokens(logits, **given, seeds=none, positions=none)
    assert hidden.shape == (0, 1, 48) and logits.shape == (0, 21)
    assert tokens.shape == logprobs.shape == (0,)
    assert decoder.hidden(none.expand(2, 0), KVCache(decoder.config, 2, 32)).shape == (2, 0, 48)


def test_what_lies_outside_is_refused():
    model = gpt()
    decoder, cache = Decoder(model), KVCache(model.config, 2, 32)
    for tokens, message in (
        (torch.zeros(2, 33, dtype=torch.int64), "longer than the cache or the context"),
        (torch.tensor([[1], [21]]), "a token is not the model's"),
        (torch.tensor([[1], [-1]]), "a token is not the model's"),
    ):
        with pytest.raises(ValueError, match=message):
            decoder.hidden(tokens, cache)
    cache, cache.empty = KVCache(model.config, 2, 200), False
    cache.lengths += torch.tensor([3, 128])
    with pytest.raises(ValueError, match="longer than the cache or the context"):
        decoder.hidden(torch.tensor([[1], [1]]), cache)
    for wrong in (KVCache(model.config, 1, 32), KVCache(model.config, 2, 32, dtype=torch.bfloat16)):
        with pytest.raises(ValueError, match="the cache holds .*; this pass is of 2 in .*float32"):
            decoder.hidden(torch.tensor([[1], [1]]), wrong)


def test_integers_of_any_kind_are_tokens():
    decoder, tokens = Decoder(gpt()), torch.tensor([[1, 2, 3]])
    found = [
        decoder.hidden(tokens.to(dtype), KVCache(decoder.config, 1, 32))
        for dtype in (torch.int64, torch.int32)
    ]
    assert torch.equal(*found)


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16, torch.device("meta")])
def test_defaults_of_torch_change_no_sample(default):
    model = gpt(attention_bias=True, qkv_bias=False)
    params = SamplingParams(max_tokens=9)
    requests = [Request((1, 2, 3), params, 0, i) for i in range(5)]

    def drawn(slots):
        engine = LocalEngine(model, slots=slots, eos=0)
        assert engine.native
        return sorted((s.request.index, s.tokens, s.logprob) for s in engine.generate(requests))

    expected = drawn(3)
    if isinstance(default, torch.device):
        with default:
            assert drawn(3) == expected
        return
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        assert drawn(3) == expected
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize(
    "part", ["layers.1.mlp.up_proj", "layers.0", "layers.1.self_attn", "norm", "embed_tokens"]
)
def test_a_model_that_something_looks_into_is_none_for_the_decoder(part):
    model = gpt()
    model.get_submodule(part).register_forward_hook(lambda module, args, y: None)
    assert not fits(model, torch.float32)


def test_a_head_that_is_adapted_is_none_for_the_decoder():
    model = gpt()

    class Adapted(torch.nn.Linear):
        pass

    model.lm_head.__class__ = Adapted
    assert not fits(model, torch.float32)


def test_a_model_whose_weights_are_not_its_own_is_none_for_the_decoder(monkeypatch):
    assert fits(gpt(), torch.bfloat16) and not fits(gpt(), torch.float16)
    adapted = gpt()
    adapted.layers[1].mlp.up_proj.register_forward_hook(lambda module, args, y: 2 * y)
    assert not fits(adapted, torch.float32)
    engine = LocalEngine(adapted, slots=8, eos=0)
    assert not engine.native and engine.network() is adapted
    with pytest.raises(ValueError, match="invariant is true; on a CPU it needs a GPT in fp32"):
        LocalEngine(adapted, eos=0, invariant=True)
    monkeypatch.setattr("ponder.models.decoder.library", lambda _: None)  # no compiler
    assert not fits(gpt(), torch.float32)


@pytest.mark.parametrize("seconds, expected", [((1.0, 0.7), True), ((1.0, 0.9), False)])
def test_bf16_is_chosen_where_it_pays(monkeypatch, seconds, expected):
    clock = 0.0

    def hidden(decoder, tokens, cache):
        nonlocal clock
        assert len(tokens) == 10 and cache.keys.dtype == decoder.dtype
        clock += seconds[decoder.dtype == torch.bfloat16]

    monkeypatch.setattr(Decoder, "hidden", hidden)
    monkeypatch.setattr("ponder.models.decoder.time.perf_counter", lambda: clock)
    assert bf16_pays(gpt(), 10) == expected


FILTERS = [
    {},
    dict(temperature=0.0),
    dict(temperature=0.6),
    dict(top_k=5),
    dict(top_k=1),
    dict(top_p=0.8),
    dict(top_p=1e-6),
    dict(min_p=0.1),
    dict(temperature=1.4, top_k=30, top_p=0.9, min_p=0.01),
]


@pytest.mark.parametrize("n_token", [2, 37, 1000, 5000])
@pytest.mark.parametrize("ties", [False, True])
def test_tokens_are_those_of_the_definition(n_token, ties):
    """Rows of all kinds beside each other, token by token; equal logits, -inf and outliers too."""
    draw = torch.Generator().manual_seed(n_token)
    rows = 40 * len(FILTERS)
    logits = torch.randn(rows, n_token, generator=draw) * 3
    if ties:
        logits = logits.round()
    logits[::7, : n_token // 2] = -torch.inf
    logits[::11, -1] = 90.0
    off = dict(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0)
    given = {
        name: torch.tensor([(off | FILTERS[i % len(FILTERS)])[name] for i in range(rows)])
        for name in off
    }
    seeds = torch.randint(-(2**63), 2**63 - 1, (rows,), generator=draw)
    given |= dict(seeds=seeds, positions=torch.arange(rows) * (2**40 + 1))
    wanted, wanted_logprobs = sample_tokens_reference(logits, **given)
    tokens, logprobs = Decoder(gpt()).sample_tokens(logits, **given)
    assert tokens.tolist() == wanted.tolist()
    torch.testing.assert_close(logprobs, wanted_logprobs, rtol=1e-5, atol=1e-5)
    one_by_one = [
        Decoder(gpt()).sample_tokens(
            logits[i : i + 1], **{k: v[i : i + 1] for k, v in given.items()}
        )
        for i in range(0, rows, 50)
    ]
    assert [(t.item(), p.item()) for t, p in one_by_one] == [
        (tokens[i].item(), logprobs[i].item()) for i in range(0, rows, 50)
    ]


def test_uniform_numbers_are_the_same():
    """Equal logits over 2⁶ tokens: the token is the top six bits of the random word, exactly."""
    n = 200
    stream = dict(seeds=torch.arange(n) * (2**55 + 1) - 2**62, positions=torch.arange(n) << 33)
    off = dict(temperature=torch.ones(n), top_k=torch.zeros(n, dtype=torch.int64))
    off |= dict(top_p=torch.ones(n), min_p=torch.zeros(n))
    tokens, _ = Decoder(gpt()).sample_tokens(torch.zeros(n, 64), **off, **stream)
    assert torch.equal(tokens, (uniform(**stream) * 64).long())


def test_a_row_of_nan_draws_some_token_and_says_so():
    logits = torch.randn(2, 9)
    logits[0, 4] = torch.nan
    given = dict(
        temperature=torch.ones(2), top_k=torch.tensor([3, 3]), top_p=torch.tensor([0.9, 0.9])
    )
    given |= dict(min_p=torch.zeros(2), seeds=torch.arange(2), positions=torch.arange(2))
    tokens, logprobs = Decoder(gpt()).sample_tokens(logits, **given)
    assert 0 <= tokens[0] < 9 and logprobs[0].isnan() and logprobs[1].isfinite()
