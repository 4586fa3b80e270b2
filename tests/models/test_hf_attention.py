"""What Transformers asks for as a mask, and attention by what is given for it."""

import itertools
import sys
import warnings
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import masking_utils as theirs

from ponder.kernels.attention import attention_reference
from ponder.models import hf_attention

WINDOW = 3


def packed(b, h, i, j):
    """Sequences of 4, 1 and the other tokens."""
    ids = torch.tensor([0, 0, 0, 0, 1] + [2] * 11)
    return (j <= i) & (ids[i] == ids[j])


def every_third_is_hidden(b, h, i, j):
    return (j <= i) & ((j % 3 != 1) | (j == i))


def blocks(b, h, i, j):
    """As an image's tokens see each other."""
    ids = torch.tensor([-1, -1, 0, 0, 0, -1, 1, 1, 1, 1] + [-1] * 6)
    return (j <= i) | ((ids[i] == ids[j]) & (ids[i] >= 0))


BOTH_WAYS = dict(allow_is_bidirectional_skip=True)
# What sees what, the window that the layer is told, whether it is causal, and what else is asked.
FUNCTIONS = {
    "causal": (theirs.causal_mask_function, None, True, {}),
    "window": (theirs.sliding_window_causal_mask_function(WINDOW), WINDOW, True, {}),
    "chunks": (theirs.chunked_causal_mask_function(4, torch.zeros(2).int()), None, True, {}),
    "packed": (theirs.and_masks(packed, theirs.causal_mask_function), None, True, {}),
    "users": (every_third_is_hidden, None, True, dict(use_vmap=True)),
    "blocks": (theirs.or_masks(blocks, theirs.causal_mask_function), None, True, {}),
    "both ways": (theirs.bidirectional_mask_function, None, False, BOTH_WAYS),
    "window both ways": (
        theirs.and_masks(
            theirs.sliding_window_bidirectional_overlay(WINDOW), theirs.bidirectional_mask_function
        ),
        WINDOW + 1,
        False,
        BOTH_WAYS,
    ),
}
# Some models leave their layers' is_causal as it is, as eager attention goes by the mask alone.
for name in ("both ways", "window both ways"):
    sees, _, _, asked = FUNCTIONS[name]
    FUNCTIONS[f"{name}, causal layer"] = sees, None, True, asked
LENGTHS = {  # queries, keys, the first query's position, the first key's
    "a prompt": (9, 9, 0, 0),
    "more tokens": (4, 9, 5, 0),
    "one token": (1, 9, 8, 0),
    "keys that left": (3, 6, 8, 5),
    "one token, keys that left": (1, 5, 10, 6),
    "keys to come": (3, 12, 4, 0),
    "one token, keys to come": (1, 12, 6, 0),
    "one token, keys that left, keys to come": (1, 5, 8, 6),
}
PADDING = {
    "none": lambda n: None,
    "left": lambda n: torch.arange(n)[None] >= torch.tensor([[0], [3]]),
    "right": lambda n: torch.arange(n)[None] < torch.tensor([[n], [max(1, n - 3)]]),
}


def request(function: str, lengths: str, padding: str, **more) -> dict:
    sees, _, _, asked = FUNCTIONS[function]
    n_queries, n_keys, q_offset, kv_offset = LENGTHS[lengths]
    mask = PADDING[padding](q_offset + n_queries)
    return dict(
        batch_size=2,
        q_length=n_queries,
        kv_length=n_keys,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=sees,
        attention_mask=mask,
        **asked,
    ) | dict(more)


def dense(asked: dict) -> Tensor:
    """(B, 1, T, S), by Transformers' own."""
    return theirs.sdpa_mask(**asked | dict.fromkeys(SKIPS, False))


SKIPS = "allow_is_causal_skip", "allow_is_bidirectional_skip"


def check(asked: dict, window: int | None, causal: bool) -> Tensor | None:
    """That attention by our mask is that by Transformers' own; gives the mask."""
    torch.manual_seed(0)
    n_queries, n_keys = asked["q_length"], asked["kv_length"]
    q, k, v = (torch.randn(2, h, n, 8) for h, n in ((4, n_queries), (2, n_keys), (2, n_keys)))
    module = nn.Module()
    module.num_key_value_groups, module.is_causal = 2, causal
    given = hf_attention.mask(**asked)
    found, _ = hf_attention.attend(module, q, k, v, given, sliding_window=window)
    mask = dense(asked)
    expected = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True).transpose(1, 2)
    seen = mask.any(-1).expand(2, 1, n_queries).transpose(1, 2)[..., None].expand_as(expected)
    assert seen.any()
    torch.testing.assert_close(found[seen], expected[seen])
    return given


@pytest.mark.filterwarnings("ignore:Module has a mask that is not causal")
@pytest.mark.parametrize("compiling", [False, True])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_attention_is_that_of_transformers_own_masks(function, compiling, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    _, window, causal, _ = FUNCTIONS[function]
    for lengths, padding in itertools.product(LENGTHS, PADDING):
        asked = request(function, lengths, padding)
        check(asked, window, causal)
        if "one token" in lengths:  # of a cache whose numbers stand on the device
            moved = dict(kv_offset=torch.tensor(asked["kv_offset"]))
            check(asked | dict(q_offset=torch.tensor(asked["q_offset"])), window, causal)
            check(asked | moved, window, causal)


def test_masks_have_as_many_numbers_as_there_are_keys():
    """Whatever can be said so is: of causality, windows and segments a dense mask is never made."""
    for function, lengths in itertools.product(("causal", "window", "chunks", "packed"), LENGTHS):
        if lengths == "keys to come":
            continue
        for padding in PADDING:
            given = check(request(function, lengths, padding), FUNCTIONS[function][1], True)
            assert given is None or given.shape == (2, 1, 1, LENGTHS[lengths][1])
    assert hf_attention.mask(**request("causal", "a prompt", "none")) is None
    assert hf_attention.mask(**request("window", "more tokens", "none")) is None
    assert hf_attention.mask(**request("causal", "one token", "none")) is None
    # For one query the mask tells the window too, which counts from the last key elsewhere.
    given = check(request("window", "one token, keys to come", "none"), WINDOW, True)
    assert given is not None and given.dtype == torch.int64
    assert check(request("users", "a prompt", "none"), None, True).shape == (2, 1, 9, 9)


@pytest.mark.parametrize("compiling", [False, True])
@pytest.mark.parametrize(
    "lengths, function", [("a prompt", "causal"), ("a prompt", "window"), ("one token", "window")]
)
def test_a_model_that_insists_gets_the_whole_mask(lengths, function, compiling, monkeypatch):
    """It does more with it than attend. But for a cache of a fixed size Transformers insists."""
    if (lengths, function) != ("a prompt", "window"):  # while it is compiled, the ids tell it
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    insists = dict(allow_is_causal_skip=False)
    given = hf_attention.mask(**(asked := request(function, lengths, "none", **insists)))
    assert given is not None and torch.equal(given, dense(asked))
    given = hf_attention.mask(**request("packed", "a prompt", "none", **insists))
    assert given is not None and given.shape == (2, 1, 1, 9)
    given = hf_attention.mask(**request("causal", "one token, keys to come", "none", **insists))
    assert given is not None and given.shape == (2, 1, 1, 12) and given.dtype == torch.int64


def module_and_inputs(
    n_queries: int, n_keys: int, head_dim: int, head_dim_v: int, kind: type[nn.Module] = nn.Module
):
    torch.manual_seed(0)
    module = kind()
    module.num_key_value_groups, module.is_causal = 2, True
    shapes = (4, n_queries, head_dim), (2, n_keys, head_dim), (2, n_keys, head_dim_v)
    return module, *(torch.randn(1, *shape) for shape in shapes)


@pytest.mark.parametrize("head_dims", [(288, 288), (288, 16), (16, 288)])
def test_wide_heads_are_transformers_own(head_dims):
    module, q, k, v = module_and_inputs(5, 5, *head_dims)
    hf_attention._said.clear()
    with pytest.warns(UserWarning, match=r"heads of \d+ dimensions, more than 256"):
        found, _ = hf_attention.attend(module, q, k, v, None)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(found, expected.transpose(1, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it was said
        hf_attention.attend(module, q, k, v, None)


def test_options_are_those_of_the_call():
    module, *inputs = module_and_inputs(5, 9, 16, 16)
    sinks = torch.randn(4)
    options = dict(softcap=2.0, scaling=0.5, sliding_window=WINDOW)
    found, _ = hf_attention.attend(module, *inputs, None, s_aux=sinks, **options)
    expected = attention_reference(*inputs, scale=0.5, window=WINDOW, softcap=2.0, sinks=sinks)
    torch.testing.assert_close(found, expected.transpose(1, 2))


@pytest.mark.parametrize("option", ["indices", "block_indices", "compressor"])
def test_a_layer_that_chooses_its_keys_is_refused(option):
    module, *inputs = module_and_inputs(5, 5, 16, 16)
    given = {} if option == "compressor" else {option: torch.zeros(1)}
    module.compressor = nn.Identity() if option == "compressor" else None
    with pytest.raises(ValueError, match="Module chooses its keys by itself"):
        hf_attention.attend(module, *inputs, None, **given)


def test_sequences_by_their_bounds_are_of_one_row_without_a_cache_and_without_a_mask():
    bounds = torch.tensor([0, 2, 5], dtype=torch.int32)
    module, q, k, v = module_and_inputs(5, 5, 16, 16)
    ids = torch.zeros(1, 1, 1, 5, dtype=torch.int32)
    by_mask, _ = hf_attention.attend(module, q, k, v, ids, cu_seq_lens_q=bounds)
    assert torch.equal(by_mask, hf_attention.attend(module, q, k, v, ids)[0])
    by_bounds, _ = hf_attention.attend(module, q, k, v, None, cu_seq_lens_q=bounds)
    assert not torch.allclose(by_bounds, by_mask)
    two = [torch.cat([x, x]) for x in (q, k, v)]  # a mask says all, whatever else is given
    of_two, _ = hf_attention.attend(module, *two, ids.repeat(2, 1, 1, 1), cu_seq_lens_q=bounds)
    torch.testing.assert_close(of_two, torch.cat([by_mask, by_mask]))
    with pytest.raises(ValueError, match="with 1 rows of 3 tokens after 2 others; it is for one"):
        hf_attention.attend(module, q[:, :, 2:], k, v, None, cu_seq_lens_q=bounds)


@pytest.mark.filterwarnings("ignore:Module has dropout")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, WINDOW])
def test_dropout_after_other_tokens_is_transformers_own(window, causal):
    """With the same random numbers: by the mask that causality and the window stand for."""
    module, q, k, v = module_and_inputs(4, 9, 16, 16)
    options = dict(dropout=0.5, sliding_window=window, is_causal=causal)
    i, j = torch.arange(5, 9)[:, None], torch.arange(9)
    seen = (j <= i) if causal else torch.ones(4, 9).bool()
    if window is not None:
        seen &= (i - j).abs() < window
    torch.manual_seed(1)
    found, _ = hf_attention.attend(module, q, k, v, None, **options)
    torch.manual_seed(1)
    expected = F.scaled_dot_product_attention(q, k, v, seen, dropout_p=0.5, enable_gqa=True)
    torch.testing.assert_close(found, expected.transpose(1, 2))


@pytest.mark.parametrize("option", ["position_bias", "cache"])
def test_what_attends_otherwise_is_transformers_own(option):
    module, *inputs = module_and_inputs(5, 5, 16, 16)
    hf_attention._said.clear()
    with pytest.warns(UserWarning, match=f"Module has {option}: Transformers computes"):
        hf_attention.attend(module, *inputs, None, **{option: torch.zeros(1)})


@pytest.fixture
def own_model(monkeypatch):
    """A module whose model's eager attention gives what it was called with, and inputs."""
    model = ModuleType("a_model")
    model.eager_attention_forward = lambda module, q, k, v, mask, **options: (mask, options)
    monkeypatch.setitem(sys.modules, "a_model", model)
    kind = type("Attention", (nn.Module,), dict(__module__="a_model"))
    hf_attention._said.clear()
    return module_and_inputs(5, 5, 16, 16, kind)


def test_scores_that_are_scaled_by_the_layer_are_the_model_s_own(own_model):
    """GPT-2's, in releases of Transformers that leave it to eager attention."""
    module, *inputs = own_model
    module.scale_attn_by_inverse_layer_idx = True
    with pytest.warns(UserWarning, match="Attention scales its scores by its layer"):
        mask, options = hf_attention.attend(module, *inputs, None)
    assert options == dict(scaling=None, dropout=0.0)
    assert torch.equal(mask == 0, torch.ones(1, 1, 5, 5).tril().bool())
    found, _ = hf_attention.attend(module, *inputs, None, scaling=0.3)  # it is told
    expected = F.scaled_dot_product_attention(*inputs, is_causal=True, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(found, expected.transpose(1, 2))


@pytest.mark.filterwarnings("ignore:Attention has a mask that is not causal")
@pytest.mark.parametrize("option", [dict(softcap=2.0), dict(s_aux=torch.ones(4))], ids=str)
def test_what_sdpa_lacks_is_the_model_s_own(option, own_model):
    module, *inputs = own_model
    seen = every_third_is_hidden(0, 0, torch.arange(5)[:, None], torch.arange(5))[None, None]
    given = dict(dropout=0.1, scaling=0.5, layer=3) | option
    mask, options = hf_attention.attend(module, *inputs, seen, **given)
    assert options == given
    lowest = torch.finfo(torch.float32).min
    assert torch.equal(mask, torch.zeros(1, 1, 5, 5).masked_fill(~seen, lowest))
