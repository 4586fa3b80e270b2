import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare, kstest

from ponder.kernels.sample_tokens import (
    philox,
    sample_tokens,
    sample_tokens_reference,
    uniform,
)

from .numerics import DTYPES

OFF = dict(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0)


def streams(n_row, device="cpu", seed=0):
    seeds = torch.randint(-(2**63), 2**63 - 1, (n_row,), generator=generator(seed))
    return dict(seeds=seeds.to(device), positions=torch.arange(n_row, device=device))


def generator(seed):
    return torch.Generator().manual_seed(seed)


def kept(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """Exact probabilities after the filters, of one row in Python floats; slow and literal."""
    best = max(logits)
    p = [math.exp((x - best) / temperature) for x in logits]
    order = sorted(range(len(p)), key=lambda i: -logits[i])
    keep = set(order)
    if 0 < top_k < len(p):
        keep = {i for i in order if logits[i] >= logits[order[top_k - 1]]}
    if top_p < 1:
        total, mass = math.fsum(p[i] for i in keep), 0.0
        for i in order:
            mass += p[i]
            if mass >= top_p * total:
                keep = {j for j in keep if logits[j] >= logits[i]}
                break
    keep = {i for i in keep if p[i] >= min_p}
    total = math.fsum(p[i] for i in keep)
    return [p[i] / total if i in keep else 0.0 for i in range(len(p))]


def test_philox_known_answers():
    """The vectors that Salmon et al. publish with Random123 (kat_vectors, philox4x32 10)."""
    pi = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0]
    ones = 0xFFFFFFFF
    words = philox(
        torch.tensor([[0, ones, x] for x in pi[:4]]), torch.tensor([[0, ones, x] for x in pi[4:]])
    )
    assert words.T.tolist() == [
        [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8],
        [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ]


def test_uniform_is_uniform_and_keeps_to_its_definition():
    n = 20_000
    seeds, positions = torch.zeros(n, dtype=torch.int64), torch.arange(n)
    assert kstest(uniform(seeds, positions).numpy(), "uniform").pvalue > 0.01
    assert kstest(uniform(positions, seeds).numpy(), "uniform").pvalue > 0.01
    seed, position = -(2**63) + 12345, 2**40 + 7
    key = torch.tensor([[seed & 0xFFFFFFFF], [(seed >> 32) & 0xFFFFFFFF]])
    x, y, _, _ = philox(torch.tensor([[7], [2**8], [0], [0]]), key)[:, 0].tolist()
    u = uniform(torch.tensor([seed]), torch.tensor([position])).item()
    assert u == ((x << 32 | y) >> 11) / 2**53


def test_kernel_draws_the_same_uniform_numbers(device):
    """Equal logits over 2⁶ tokens: the token is the top six bits of the random word, exactly."""
    n_row, n_token = 40, 64
    stream = streams(n_row, device)
    stream["positions"] = stream["positions"] * (2**57 + 3)
    zeros = torch.zeros(n_row, n_token, device=device)
    tokens, _ = sample_tokens(zeros, **stream)
    assert torch.equal(tokens, (uniform(**stream) * n_token).long())


FILTERS = [
    {},
    dict(temperature=0.5),
    dict(temperature=1.7, top_k=4),
    dict(top_p=0.7),
    dict(min_p=0.2),
    dict(temperature=1.3, top_k=9, top_p=0.9, min_p=0.05),
]


@pytest.mark.parametrize("filters", FILTERS)
def test_distribution(filters, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    logits = torch.randn(12, generator=generator(1)) * 2
    n = 50_000
    stream = dict(seeds=torch.full((n,), 7), positions=torch.arange(n))
    tokens, _ = sample_tokens(logits.expand(n, -1), **filters, **stream)
    exact = torch.tensor(kept(logits.double().tolist(), **filters), dtype=torch.float64)
    counts = tokens.bincount(minlength=12)
    assert (counts[exact == 0] == 0).all()
    some = exact > 0
    assert chisquare(counts[some].numpy(), (exact[some] * n).numpy()).pvalue > 0.01


@st.composite
def rows(draw):
    """Logits with ties and −inf among them, and filters, some of them off.

    Logits are multiples of 1/64: in fp32, a smaller difference may be no difference of probability.
    """
    finite = st.integers(-1280, 1280).map(lambda i: i / 64)
    values = st.one_of(st.sampled_from([-math.inf, -0.0, 0.0, 1.0, 2.0]), finite)
    logits = draw(st.lists(values, min_size=1, max_size=24))
    logits[draw(st.integers(0, len(logits) - 1))] = draw(finite)
    return logits, dict(
        temperature=draw(st.sampled_from([1.0, 0.25, 0.7, 2.0])),
        top_k=draw(st.sampled_from([0, 1, 2, 5, 100])),
        top_p=draw(st.sampled_from([1.0, 1e-9, 0.33, 0.61, 0.97])),
        min_p=draw(st.sampled_from([0.0, 0.013, 0.37, 1.0])),
    )


def consistent(logits, filters, path, n_row):
    """The draw at u is the token at u of the literal distribution, but for rounding."""
    stream = streams(n_row, path)
    x = torch.tensor([logits] * n_row, dtype=torch.float32, device=path)
    tokens, logprobs = sample_tokens(x, **filters, **stream)
    exact = torch.tensor(kept(logits, **filters), dtype=torch.float64)
    upper = exact.cumsum(0)
    for token, logprob, u in zip(
        tokens.tolist(), logprobs.tolist(), uniform(**stream).tolist(), strict=True
    ):
        assert exact[token] > 0, f"token {token} was filtered out"
        assert upper[token] - exact[token] - 1e-6 <= u <= upper[token] + 1e-6
        assert logprob == pytest.approx(x[0].double().log_softmax(0)[token].item(), abs=1e-5)


@settings(max_examples=300, deadline=None)
@given(rows())
def test_filters_against_literal_ones(row):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "0")
        consistent(*row, "cpu", 5)


@settings(max_examples=12, deadline=None)
@given(rows())
def test_filters_against_literal_ones_in_the_kernel(row):
    consistent(*row, "cuda" if torch.cuda.is_available() else "cpu", 2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_kernel_agrees_with_pytorch_over_several_blocks(dtype, device):
    n_row, n_token = 8, 9000  # blocks of 4096 tokens
    logits = (torch.randn(n_row, n_token, generator=generator(2)) * 3).to(device, dtype)
    logits[3, 4000:] = -math.inf
    parameters = dict(
        temperature=torch.tensor([1.0, 0.0, 0.7, 1.5, 1.0, 1.0, 0.9, 1.0], device=device),
        top_k=torch.tensor([0, 0, 50, 5000, 0, 1, 200, 0], device=device),
        top_p=torch.tensor([1.0, 1.0, 1.0, 1.0, 0.8, 1.0, 0.9, 1.0], device=device),
        min_p=torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.01, 0.1], device=device),
    )
    wide = torch.zeros(n_row, 2 * n_token, device=device, dtype=dtype)
    wide[:, :n_token] = logits
    stream = streams(n_row, device)
    tokens, logprobs = sample_tokens(wide[:, :n_token], **parameters, **stream)
    expected, expected_logprobs = sample_tokens_reference(logits, **parameters, **stream)
    assert torch.equal(tokens, expected)
    torch.testing.assert_close(logprobs, expected_logprobs, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("path", "n_row", "filters"),
    [("cpu", 40, filters) for filters in FILTERS] + [("kernel", 4, FILTERS[-1])],
    indirect=["path"],
)
def test_a_draw_does_not_depend_on_the_batch(path, n_row, filters):
    logits = torch.randn(n_row, 37, generator=generator(3)).to(path)
    stream = streams(n_row, path)
    tokens, logprobs = sample_tokens(logits, **filters, **stream)
    order = torch.randperm(n_row, generator=generator(4)).to(path)
    shuffled = sample_tokens(
        logits[order], **filters, seeds=stream["seeds"][order], positions=stream["positions"][order]
    )
    assert torch.equal(shuffled[0], tokens[order]) and torch.equal(shuffled[1], logprobs[order])
    # Neighbours with parameters of their own; one row alone; numbers in place of tensors.
    mixed = {
        name: torch.full((n_row,), filters.get(name, off), device=path) for name, off in OFF.items()
    }
    mixed["temperature"][1::2] = 0.0
    mixed["top_k"][1::2] = 3
    mixed["top_p"][1::2] = 0.5
    mixed["min_p"][1::2] = 0.3
    beside = sample_tokens(logits, **mixed, **stream)
    assert torch.equal(beside[0][::2], tokens[::2])
    assert torch.equal(beside[1][::2], logprobs[::2])
    last = {name: x[-1:] for name, x in stream.items()}
    alone = sample_tokens(logits[-1:], **filters, **last)
    assert alone[0] == tokens[-1] and alone[1] == logprobs[-1]


def test_greedy(path):
    logits = torch.tensor([[0.0, 2.0, 2.0, 1.0], [-math.inf, -3.0, -math.inf, -3.0]], device=path)
    stream = streams(2, path)
    tokens, logprobs = sample_tokens(logits, temperature=0, **stream)
    assert tokens.tolist() == [1, 1]
    expected = [logits[0].log_softmax(0)[1].item(), math.log(0.5)]
    assert logprobs.tolist() == pytest.approx(expected, abs=1e-6)
    one = torch.tensor([0.0, 1.0], device=path)
    assert sample_tokens(logits, temperature=one, **stream)[0][0] == 1
    wide = torch.zeros(2, 5000, device=path)  # equals in two blocks of the kernel
    wide[0, [100, 4900]] = 1.0
    wide[1, [200, 4800]] = torch.tensor([1.0, 2.0], device=path)
    assert sample_tokens(wide, temperature=0, **stream)[0].tolist() == [100, 4800]


def test_the_strictest_filters_leave_the_best_token(path):
    logits = torch.randn(6, 19, generator=generator(5)).to(path)
    best = logits.argmax(-1)
    for filters in (
        dict(top_k=1),
        dict(top_p=1e-30),
        dict(min_p=1.0),
        dict(temperature=1e-38),
    ):
        assert torch.equal(sample_tokens(logits, **filters, **streams(6, path))[0], best), filters


def test_equals_at_a_threshold_are_all_kept(path):
    """Two of four equal tokens at most are asked for; all four can be drawn, and no other."""
    n_row = 24
    logits = torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0, -1.0], device=path).expand(n_row, -1)
    for filters in (dict(top_k=2), dict(top_p=0.4)):
        tokens, _ = sample_tokens(logits, **filters, **streams(n_row, path))
        assert set(tokens.tolist()) == {0, 2, 3, 4}, filters


def test_excluded_tokens_are_never_drawn(path):
    logits = torch.full((20, 30), -math.inf, device=path)
    logits[:, [3, 29]] = 0.0
    tokens, logprobs = sample_tokens(logits, **streams(20, path))
    assert set(tokens.tolist()) == {3, 29}
    torch.testing.assert_close(logprobs, torch.full_like(logprobs, -math.log(2)))


def test_broken_logits_show_in_the_logprob_and_stay_in_their_row(path):
    logits = torch.randn(4, 10, generator=generator(6)).to(path)
    expected = sample_tokens(logits, **streams(4, path))
    logits[1, 4] = math.nan
    logits[2] = -math.inf
    tokens, logprobs = sample_tokens(
        logits, top_p=torch.tensor([1, 0.5, 0.5, 1]), **streams(4, path)
    )
    assert logprobs.isnan().tolist() == [False, True, True, False]
    assert ((tokens >= 0) & (tokens < 10)).all()
    assert torch.equal(tokens[::3], expected[0][::3])


def test_one_token_and_no_rows(path):
    tokens, logprobs = sample_tokens(torch.zeros(2, 1, device=path), **streams(2, path))
    assert tokens.tolist() == [0, 0] and logprobs.tolist() == [0.0, 0.0]
    tokens, logprobs = sample_tokens(
        torch.zeros(0, 5, device=path), temperature=torch.zeros(0, device=path), **streams(0, path)
    )
    assert tokens.shape == logprobs.shape == (0,)
    assert (tokens.dtype, logprobs.dtype) == (torch.int64, torch.float32)


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_k", -1),
        ("top_k", 2.0),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.01),
        ("min_p", 1.01),
        ("min_p", math.nan),
    ],
)
def test_bad_parameters_are_named(name, bad):
    logits = torch.zeros(3, 5)
    with pytest.raises(ValueError, match=f"{name} is {bad}; it must be"):
        sample_tokens(logits, **{name: bad}, **streams(3))
    if name != "top_k" or bad == -1:
        values = torch.full((3,), OFF[name])
        values[1] = bad
        with pytest.raises(ValueError, match=f"{name} is .*; it must be"):
            sample_tokens(logits, **{name: values}, **streams(3))


def test_unsupported_input_is_named():
    logits = torch.zeros(3, 5)
    with pytest.raises(ValueError, match=r"logits is \(5,\).*\(B, V\)"):
        sample_tokens(logits[0], **streams(3))
    with pytest.raises(ValueError, match="logits is torch.float64"):
        sample_tokens(logits.double(), **streams(3))
    with pytest.raises(ValueError, match=r"seeds is \(2,\)"):
        sample_tokens(logits, seeds=torch.arange(2), positions=torch.arange(3))
    with pytest.raises(ValueError, match="positions is .*int32"):
        sample_tokens(logits, seeds=torch.arange(3), positions=torch.arange(3).int())
    with pytest.raises(ValueError, match=r"top_p is \(2,\); it must be a number or \(3,\)"):
        sample_tokens(logits, top_p=torch.ones(2), **streams(3))
    with pytest.raises(ValueError, match="top_k is torch.float32"):
        sample_tokens(logits, top_k=torch.ones(3), **streams(3))


def test_opcheck(device):
    logits = torch.randn(2, 30, device=device)
    ones = torch.ones(2, device=device)
    parameters = (ones, ones.long() * 4, ones * 0.9, ones * 0.1)
    torch.library.opcheck(
        torch.ops.ponder.sample_tokens.default, (logits, *parameters, *streams(2, device).values())
    )


@pytest.mark.parametrize("large", [1e3, 1e4, 1e5])
def test_large_logits_leave_the_logprob_its_digits(large, path):
    logits = torch.full((2, 2), large, device=path)
    _, logprob = sample_tokens(logits, **OFF, **streams(2, path))
    torch.testing.assert_close(
        logprob, torch.full((2,), -math.log(2), device=path), rtol=1e-6, atol=0
    )
