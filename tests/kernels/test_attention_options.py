"""What attention offers beyond the plain call: which keys are seen, how scores are made, lse."""

import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

from ponder.kernels import attention
from ponder.kernels.attention import attention_reference

from .numerics import DTYPES, EPSILON, HARDWARE, check, run
from .test_attention import Recorder, compiled_as, qkv

module = importlib.import_module("ponder.kernels.attention")


def check_options(sizes, dtype, device, head_dim_v=None, causal=True, **options):
    """Forward, log-sum-exp and the gradients of both, sinks' among them, against fp64."""
    q, k, v = qkv(*sizes, dtype, device)
    if head_dim_v is not None:
        v = torch.randn(*k.shape[:3], head_dim_v, dtype=dtype, device=device)
    sinks = [torch.randn(q.shape[1], device=device).to(dtype)] if options.pop("sinks", 0) else []
    if options.pop("alibi", False):
        options["alibi_slopes"] = torch.rand(q.shape[1], device=device)
    with_lse = options.pop("return_lse", False)

    def call(fn):
        def outputs(q, k, v, *sinks):
            sink = sinks[0] if sinks else None
            result = fn(q, k, v, causal=causal, sinks=sink, return_lse=with_lse, **options)
            if not with_lse:
                return result
            out, lse = result
            return out, lse.masked_fill(lse == -torch.inf, 7.0)  # so that differences are finite

        return outputs

    names = "out lse dq dk dv dsinks".split()
    check(
        call(attention),
        call(attention_reference),
        [q, k, v, *sinks],
        reduction=k.shape[2] + q.shape[2] + max(q.shape[3], v.shape[3]),
        names=" ".join(n for n in names if with_lse or n != "lse" if sinks or n != "dsinks"),
        # A score is as wrong as softcap times its tanh, and a weight as its score.
        hardware=HARDWARE * (1 + (options.get("softcap") or 0)),
    )


def ids(*lengths, device="cpu", batch=1):
    """Rows of segment ids: 0 `lengths[0]` times, 1 `lengths[1]` times and so on."""
    row = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    return row.expand(batch, -1).to(device)


# (B, Hq, Hkv, T, S, D). Tiles are 32 to 128 here: windows within a tile, across tiles, over many
# tiles, of two keys and wider than all; T = S, T < S and T > S (rows that see no key).
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "sizes, window, causal",
    [
        ((1, 2, 1, 300, 300, 32), 40, True),
        ((2, 2, 2, 70, 70, 16), 2, True),
        ((1, 1, 1, 260, 390, 64), 200, True),
        ((1, 2, 1, 200, 70, 16), 33, True),
        ((1, 1, 1, 40, 40, 16), 10**12, True),
        ((1, 1, 1, 300, 300, 32), 40, False),
        ((1, 2, 1, 70, 300, 16), 140, False),
        ((1, 1, 1, 300, 70, 16), 20, False),
    ],
)
def test_window(sizes, window, causal, dtype, device):
    check_options(sizes, dtype, device, window=window, causal=causal)


def test_window_of_one_key(device):
    """Each query sees its own key alone, so that out is v and only v has a gradient."""
    q, k, v = qkv(1, 2, 1, 100, 130, 16, torch.float32, device)
    out, dq, dk, dv = run(lambda *x: attention(*x, window=1), [q, k, v], [torch.ones_like(q)])
    torch.testing.assert_close(out, v[:, :, 30:].expand_as(q), rtol=HARDWARE * out.is_cuda, atol=0)
    torch.testing.assert_close(dq, torch.zeros_like(q), rtol=0, atol=1e-5)
    torch.testing.assert_close(dk, torch.zeros_like(k), rtol=0, atol=1e-5)
    assert (dv[:, :, :30] == 0).all()
    torch.testing.assert_close(dv[:, :, 30:], torch.full_like(dv[:, :, 30:], 2.0))


@pytest.mark.parametrize("by", ["window", "segments"])
def test_blocks_out_of_sight_are_not_visited(by, device):
    """A weight of 0 times NaN is NaN: where a block is visited only to be masked, it shows."""
    q, k, v = qkv(1, 2, 1, 512, 512, 16, torch.float32, device)
    options = dict(window=64) if by == "window" else dict(segment_ids=ids(256, 256, device=device))
    far, near = slice(0, 128), slice(384, 512)  # more than a block and a window apart
    upstream = torch.randn_like(q)
    expected = run(lambda *x: attention(*x, **options), [q, k, v], [upstream])
    for x in (k, v):
        x[:, :, far] = torch.nan
    out, dq, _, _ = run(lambda *x: attention(*x, **options), [q, k, v], [upstream])
    for result, truth in ((out, expected[0]), (dq, expected[1])):
        assert torch.equal(result[:, :, near], truth[:, :, near])
    q, k, v = qkv(1, 2, 1, 512, 512, 16, torch.float32, device)
    q[:, :, near] = torch.nan
    _, _, dk, dv = run(lambda *x: attention(*x, **options), [q, k, v], [upstream])
    for result, truth in ((dk, expected[2]), (dv, expected[3])):
        assert torch.equal(result[:, :, far], truth[:, :, far])


# Gemma 2 (softcap 50, window), gpt-oss (sinks, window), MLA (192 and 128), and each option alone.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "sizes, head_dim_v, options",
    [
        ((1, 4, 2, 131, 131, 64), None, dict(softcap=2.0)),
        ((1, 2, 1, 70, 70, 256), None, dict(softcap=50.0, window=30, scale=0.3)),
        ((1, 4, 2, 70, 131, 32), None, dict(sinks=True)),
        ((2, 4, 2, 131, 70, 16), None, dict(sinks=True, return_lse=True)),
        ((1, 4, 1, 150, 150, 64), None, dict(sinks=True, window=40)),
        ((1, 2, 2, 131, 131, 32), None, dict(return_lse=True)),
        ((1, 2, 2, 131, 70, 32), None, dict(return_lse=True, causal=False)),
        ((2, 4, 2, 131, 131, 32), None, dict(alibi=True)),
        ((1, 3, 1, 40, 131, 32), None, dict(alibi=True, causal=False, softcap=3.0)),
        ((1, 2, 1, 70, 70, 192), 128, {}),
        ((1, 2, 1, 40, 70, 16), 100, dict(return_lse=True)),
        ((1, 2, 2, 70, 40, 80), 20, dict(causal=False)),
    ],
    ids=str,
)
def test_options(sizes, head_dim_v, options, dtype, device):
    check_options(sizes, dtype, device, head_dim_v, **options)


# Neighbours; neighbours shorter and longer than a block; gaps (0 1 0 1 …); one of queries that no
# key has and one of keys that no query has; ids that 32 bits do not tell apart.
SEGMENTS = {
    "short": (ids(3, 1, 60, 40, 26), None),
    "long": (ids(1, 200, 129), None),
    "gaps": (torch.arange(150)[None] % 3, None),
    "strangers": (ids(50, 20, 60), ids(40, 0, 90, 35)),
    "few queries": (ids(10, 20)[:, ::3] - 1, ids(100, 45) - 1),
    "wide": (torch.tensor([[5, 5 + 2**32]]).repeat_interleave(40, 1), None),
}


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("case", SEGMENTS)
def test_segments(case, causal, device):
    queries, keys = (x if x is None else x.to(device).expand(2, -1) for x in SEGMENTS[case])
    sizes = (2, 2, 1, queries.shape[1], (queries if keys is None else keys).shape[1], 16)
    pair = (queries, queries if keys is None else keys)
    q, k, v = qkv(*sizes, torch.float32, device)
    given = queries if keys is None else pair
    check(
        lambda *x: attention(*x, causal=causal, segment_ids=given),
        lambda *x: attention_reference(*x, causal, segment_ids=pair),
        [q, k, v],
        reduction=sum(sizes[3:]),
        names="out dq dk dv",
    )


@pytest.mark.parametrize("integers", [torch.int32, torch.int64])
def test_packed_sequences_are_as_if_alone(integers, path):
    lengths = [1, 70, 0, 33, 130]
    q, k, v = qkv(1, 4, 2, sum(lengths), sum(lengths), 16, torch.float32, path)
    bounds = torch.tensor([0, *lengths], device=path).cumsum(0).to(integers)

    def alone(q, k, v):
        pieces = [x.split(lengths, 2) for x in (q, k, v)]
        return torch.cat([attention_reference(*x, window=40) for x in zip(*pieces, strict=True)], 2)

    check(
        lambda q, k, v: attention(q, k, v, cu_seqlens=bounds, window=40),
        alone,
        [q, k, v],
        reduction=2 * sum(lengths) + 16,
        names="out dq dk dv",
    )


def test_positions_past_the_last_packed_sequence_disturb_no_other(device):
    q, k, v = qkv(1, 2, 1, 50, 50, 16, torch.float32, device)
    bounds = torch.tensor([0, 20, 35], dtype=torch.int32, device=device)
    padded = attention(q, k, v, cu_seqlens=bounds)
    exact = attention(*(x[:, :, :35] for x in (q, k, v)), cu_seqlens=bounds)
    assert torch.equal(padded[:, :, :35], exact)
    assert padded.isfinite().all()


@pytest.mark.parametrize("sink", [None, 0.5, float("-inf")])
def test_rows_that_see_no_key(sink, device):
    """They give 0, pass no gradient, and their log-sum-exp is the sink's."""
    q, k, v = qkv(1, 2, 1, 40, 10, 16, torch.float32, device)
    sinks = [] if sink is None else [torch.full((2,), sink, device=device)]

    def call(q, k, v, *sinks):
        out, lse = attention(q, k, v, sinks=sinks[0] if sinks else None, return_lse=True)
        return out, lse.nan_to_num(neginf=-1e4)

    upstream = [torch.ones_like(q), torch.ones(1, 2, 40, device=device)]
    out, lse, dq, _, _, *dsinks = run(call, [q, k, v, *sinks], upstream)
    assert (out[:, :, :30] == 0).all() and (out[:, :, 30:] != 0).all()
    assert (dq[:, :, :30] == 0).all() and (dq[:, :, 30:] != 0).any()
    expected = -1e4 if sink in (None, float("-inf")) else sink
    torch.testing.assert_close(lse[:, :, :30], torch.full_like(lse[:, :, :30], expected))
    if sink == 0.5:  # all of their log-sum-exp is the sink: a gradient of 1 each, for 30 rows
        assert (dsinks[0] > 30).all()
    elif sinks:
        assert (dsinks[0] == 0).all()


def test_segments_that_share_no_key_with_a_query(device):
    q, k, v = qkv(1, 2, 1, 70, 70, 16, torch.float32, device)
    pair = ids(30, 40, device=device), ids(0, 70, device=device)
    out, dq, dk, dv = run(
        lambda *x: attention(*x, causal=False, segment_ids=pair), [q, k, v], [torch.ones_like(q)]
    )
    assert (out[:, :, :30] == 0).all() and (dq[:, :, :30] == 0).all()
    torch.testing.assert_close(out[:, :, 30:], attention(q, k, v, causal=False)[:, :, 30:])
    assert dk.isfinite().all() and dv.isfinite().all()


def magnitudes(leaves, upstream, options):
    """What out, lse and the gradients would be if no term cancelled another, in fp64.

    Rounding errors are in proportion to these: a gradient that is 0 but for them, as a row's that
    sees one key, says nothing about its error.
    """
    q, k, v, sinks = (x.double() for x in leaves)
    dout, dlse = (x.double().abs() for x in upstream)
    options = options | dict(sinks=sinks)
    group = q.shape[1] // k.shape[1]
    eye = torch.eye(k.shape[2], dtype=v.dtype).expand(*k.shape[:2], -1, -1)
    weights = attention_reference(q, k, eye, **options)
    lse = attention_reference(q, k, v, **options, return_lse=True)[1]
    q, k, v = q.abs(), *(x.abs().repeat_interleave(group, 1) for x in (k, v))
    scale = options["scale"] or q.shape[-1] ** -0.5
    out = weights @ v
    delta = (dout * out).sum(-1) + dlse
    dscore = weights * (dout @ v.mT + delta[..., None]) * scale
    dsinks = (torch.exp(sinks[:, None] - lse).nan_to_num(0.0) * delta).sum((0, 2))
    dkeys = [(x.unflatten(1, (-1, group))).sum(2) for x in (dscore.mT @ q, weights.mT @ dout)]
    return [out, lse.nan_to_num(neginf=0.0).abs() + 1.0, dscore @ k, *dkeys, dsinks]


@st.composite
def configurations(draw):
    """(sizes, head dimension of v, options) with lengths of up to three blocks."""
    n_kv_heads, group, batch = (draw(st.integers(1, 2)) for _ in range(3))
    n_queries, n_keys = draw(st.integers(1, 150)), draw(st.integers(1, 150))
    options = dict(
        causal=draw(st.booleans()),
        window=draw(st.none() | st.integers(1, 160)),
        softcap=draw(st.none() | st.floats(0.5, 30.0)),
        scale=draw(st.none() | st.floats(0.05, 1.0)),
        alibi_slopes=draw(st.none() | st.just(torch.rand(n_kv_heads * group))),
        segment_ids=None,
    )
    if draw(st.booleans()):
        most = draw(st.integers(0, 4))
        rows = [torch.randint(0, most + 1, (batch, n)) for n in (n_queries, n_keys)]
        options["segment_ids"] = tuple(x.sort().values if draw(st.booleans()) else x for x in rows)
    sizes = (batch, n_kv_heads * group, n_kv_heads, n_queries, n_keys, draw(st.integers(1, 40)))
    return sizes, draw(st.integers(1, 40)), options


@settings(max_examples=50, deadline=None)
@given(configurations(), st.integers(0, 2**32))
def test_any_configuration(configuration, seed):
    (*sizes, head_dim), head_dim_v, options = configuration
    device = "cuda" if torch.cuda.is_available() else "cpu"
    q, k, _ = qkv(*sizes, head_dim, torch.float32, "cpu")
    torch.manual_seed(seed)
    v = torch.randn(*k.shape[:3], head_dim_v)
    leaves = [torch.randn_like(q), torch.randn_like(k), v, torch.randn(q.shape[1])]
    upstream = [torch.randn(*q.shape[:3], head_dim_v), torch.randn(q.shape[:3])]

    def call(fn, options):
        def outputs(q, k, v, sinks):
            return fn(q, k, v, sinks=sinks, return_lse=True, **options)

        return outputs

    truth = run(call(attention_reference, options), [x.double() for x in leaves], upstream)
    moved = {
        name: tuple(y.to(device) for y in x)
        if isinstance(x, tuple)
        else (x.to(device) if torch.is_tensor(x) else x)
        for name, x in options.items()
    }
    ours = run(
        call(attention, moved),
        [x.to(device) for x in leaves],
        [x.to(device) for x in upstream],
    )
    largest = head_dim**0.5 * 4.0 + (0.0 if options["alibi_slopes"] is None else sum(sizes[3:]))
    tolerance = 2 * EPSILON[torch.float32] * (sum(sizes) ** 0.5 + largest)
    labels = "out lse dq dk dv dsinks".split()
    sizes = magnitudes(leaves, upstream, options)
    for label, x, t, size in zip(labels, ours, truth, sizes, strict=True):
        error = (x.cpu().double() - t).norm()
        assert error <= tolerance * size.norm(), f"{label}: {error:.2e}"


@pytest.mark.cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [
        dict(window=7),
        dict(window=7, causal=False),
        dict(segment_ids=(ids(9, 11, batch=2), ids(9, 3, 11, batch=2))),
        dict(softcap=2.0, sinks=True),
        dict(alibi=True, return_lse=True),
        dict(sinks=True, window=5, return_lse=True),
    ],
    ids=str,
)
def test_cpu_path(options, dtype, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    check_options((2, 4, 2, 20, 23, 24), dtype, "cpu", 12, **options)


@pytest.mark.cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_documents_of_queries_and_keys_alike_on_a_cpu(dtype, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    same = ids(9, 11, batch=2)
    check_options((2, 4, 2, 20, 20, 24), dtype, "cpu", 12, segment_ids=(same, same))


def test_new_packed_lengths_trace_once(path):
    q, k, v = qkv(1, 2, 1, 40, 40, 16, torch.float32, path)
    sinks = torch.zeros(2, device=path)
    upstream = [torch.randn_like(q)]
    torch.compiler.reset()
    frames = CompileCounterWithBackend("aot_eager")
    traced = torch.compile(attention, backend=frames, fullgraph=True)
    for bounds in ([0, 20, 40], [0, 3, 40], [0, 0, 40]):
        options = dict(cu_seqlens=torch.tensor(bounds, device=path), window=9, softcap=3.0)
        found, truth = (
            run(
                lambda q, k, v, s, fn=fn, o=options: fn(q, k, v, sinks=s, **o),
                [q, k, v, sinks],
                upstream,
            )
            for fn in (traced, attention)
        )
        for a, b in zip(found, truth, strict=True):
            torch.testing.assert_close(a, b)
    assert frames.frame_count == 1


def test_opcheck(device):
    q, k, v = (x.requires_grad_() for x in qkv(2, 2, 1, 9, 12, 16, torch.float32, device))
    sinks, slopes = torch.randn(2, device=device, requires_grad=True), torch.rand(2, device=device)
    pair = ids(4, 5, device=device, batch=2), ids(4, 8, device=device, batch=2)
    tables = module.spans(pair)
    torch.library.opcheck(
        torch.ops.ponder.attention.default,
        (q, k, v, sinks, slopes, *tables, True, 5, 3.0, 0.25, True),
    )


def test_deterministic(device):
    """The gradients of all features repeat bit for bit."""
    q, k, v = qkv(1, 4, 2, 70, 70, 32, torch.bfloat16, device)
    segments = ids(30, 40, device=device)
    upstream = [torch.randn_like(q), torch.randn(1, 4, 70, device=device)]
    options = dict(window=30, softcap=5.0, segment_ids=segments, return_lse=True)

    def call(q, k, v, sinks):
        return attention(q, k, v, sinks=sinks, deterministic=True, **options)

    inputs = [q, k, v, torch.randn(4, device=device)]
    first, second = (run(call, inputs, upstream) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_new_segments_need_no_new_compilation(device):
    attention(*[torch.zeros(1, 1, 1, 16, device=device)] * 3)  # from here on kernels are jitted
    launches = []
    with pytest.MonkeyPatch.context() as patch:
        for name in module.KERNELS:
            patch.setitem(module.KERNELS, name, Recorder(name, launches))
        for bounds, window in (([0, 16], 1), ([0, 3, 32], 16), ([0, 7, 8, 33], 10**12)):
            q = torch.zeros(1, 2, bounds[-1], 64, dtype=torch.bfloat16, device=device)
            sinks = torch.zeros(2, device=device, requires_grad=True)
            slopes = torch.ones(2, device=device)
            options = dict(window=window, sinks=sinks, softcap=1.0, alibi_slopes=slopes)
            bounds = torch.tensor(bounds, device=device)
            attention(q, q, q, cu_seqlens=bounds, return_lse=True, **options)[1].sum().backward()
    assert len({compiled_as(*launch) for launch in launches}) == len(module.KERNELS)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(window=0), "window is 0; it must be a positive number of keys"),
        (dict(softcap=-2.0), "softcap is -2.0; it must be a positive number"),
        (dict(softcap=float("inf")), "softcap is inf"),
        (dict(sinks=torch.zeros(3)), r"sinks is \(3,\) .* for each of q's 4 heads"),
        (dict(sinks=torch.zeros(4, dtype=torch.int32)), "sinks is .* torch.int32"),
        (dict(alibi_slopes=torch.zeros(2, 4)), r"alibi_slopes is \(2, 4\)"),
        (dict(alibi_slopes=torch.zeros(4, requires_grad=True)), "alibi_slopes requires grad"),
        (dict(segment_ids=torch.zeros(2, 6).int()), r"queries are \(2, 6\); .* \(2, 5\)"),
        (dict(segment_ids=torch.zeros(2, 5).int()), r"keys are \(2, 5\); .* \(2, 7\), and a pair"),
        (dict(segment_ids=(torch.zeros(2, 5), torch.zeros(2, 7))), "segment_ids is torch.float32"),
        (dict(segment_ids=(torch.zeros(2, 5).int(),)), "segment_ids holds 1 tensors"),
        (dict(cu_seqlens=torch.tensor([0, 5])), r"one row .* q is \(2, 4, 5, 16\)"),
    ],
)
def test_unsupported_options_are_named(options, message, device):
    def place(x):
        return x.detach().to(device).requires_grad_(x.requires_grad) if torch.is_tensor(x) else x

    q, k = torch.ones(2, 4, 5, 16, device=device), torch.ones(2, 2, 7, 16, device=device)
    options = {
        name: tuple(map(place, x)) if isinstance(x, tuple) else place(x)
        for name, x in options.items()
    }
    with pytest.raises(ValueError, match=message):
        attention(q, k, k, **options)


def test_unsupported_packing_is_named(device):
    x = torch.ones(1, 2, 5, 16, device=device)
    bounds = torch.tensor([0, 5], device=device)
    with pytest.raises(ValueError, match="cu_seqlens and segment_ids are given; only one may be"):
        attention(x, x, x, cu_seqlens=bounds, segment_ids=torch.zeros(1, 5).int())
    for wrong, message in [
        (bounds[:1], r"cu_seqlens is \(1,\); it must be \(sequences \+ 1,\)"),
        (bounds.float(), "cu_seqlens is torch.float32 on .*; it must be int32 or int64"),
    ]:
        with pytest.raises(ValueError, match=message):
            attention(x, x, x, cu_seqlens=wrong)
