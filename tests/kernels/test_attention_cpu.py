"""Attention on a CPU in C: what it computes, what it keeps, and when it is taken."""

import importlib

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from ponder.kernels import attention
from ponder.kernels.attention import attention_reference

from .numerics import EPSILON, relative_error, run
from .test_attention import check_attention, qkv
from .test_attention_options import check_options, ids

module = importlib.import_module("ponder.kernels._attention_cpu")
FP32, BF16 = DTYPES = [torch.float32, torch.bfloat16]


pytestmark = pytest.mark.cpu


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch):
    """Threads for the least work, too."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(module, "SHARE", 1)


@pytest.fixture
def calls(monkeypatch):
    """The names of the functions in C that are called, as they come."""
    seen, was = [], module._run
    monkeypatch.setattr(module, "_run", lambda name, *given: (seen.append(name), was(name, *given)))
    return seen


# (B, Hq, Hkv, T, S, D). A block is 64 queries, or 32 keys; with AVX-512 32, or 64: less than one,
# one, several with a rest or without; groups of 1, 2 and 3 heads; T = S, T < S and T > S, where
# some queries see no key. Head dimensions of whole vectors, of less than one, of some with a rest.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "sizes",
    [
        (5, 2, 2, 17, 17, 16),
        (1, 1, 1, 2, 5, 2),
        (3, 4, 2, 128, 128, 32),
        (3, 6, 2, 130, 201, 20),
        (2, 3, 1, 201, 130, 36),
        (1, 2, 1, 65, 33, 256),
        (2, 2, 1, 512, 512, 16),
    ],
    ids=str,
)
def test_sizes(sizes, causal, dtype, calls):
    check_attention(qkv(*sizes, dtype, "cpu"), causal)
    assert calls == ["attention", "attention_backward"]


SEGMENTS = ids(3, 100, 60, 37, batch=3)
FAR = 2**32 * SEGMENTS + 1  # alike in their lower 32 bits


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "options",
    [
        dict(window=2),
        dict(window=40),
        dict(window=150, causal=False),
        dict(window=1000),
        dict(segment_ids=SEGMENTS),
        dict(segment_ids=FAR),
        dict(segment_ids=ids(*[2] * 100, batch=3).int()),
        dict(segment_ids=SEGMENTS.flip(1), causal=False, window=70),
        dict(segment_ids=(SEGMENTS, SEGMENTS.flip(1)), causal=False),
        dict(segment_ids=(SEGMENTS, SEGMENTS + 1)),
    ],
    ids=["2", "40", "150, full", "1000", "segments", "far apart", "of two tokens"]
    + ["segments, full, 70", "another order", "some see none"],
)
def test_what_a_query_sees(options, dtype, calls):
    check_options((3, 4, 2, 200, 200, 24), dtype, "cpu", 12, **pairs(options))
    assert calls


def pairs(options):
    """The reference wants the ids of queries and keys."""
    same = options.get("segment_ids")
    return {**options, "segment_ids": (same, same)} if torch.is_tensor(same) else options


@pytest.mark.parametrize("options", [dict(window=1), dict(segment_ids=torch.arange(70)[None])])
def test_one_key(options):
    """Its weight is 1: out is v, and q and k have no gradient but for rounding."""
    q, k, v = qkv(1, 2, 2, 70, 70, 16, FP32, "cpu")
    out, dq, dk, dv = run(lambda *x: attention(*x, **options), [q, k, v], [torch.ones_like(q)])
    torch.testing.assert_close(out, v)
    torch.testing.assert_close(dv, torch.ones_like(v))
    for x in (dq, dk):
        torch.testing.assert_close(x, torch.zeros_like(q), rtol=0, atol=1e-5)


def test_keys_out_of_sight_are_not_visited():
    """A weight of 0 times NaN is NaN: what is only masked shows."""
    q, k, v = qkv(1, 2, 1, 512, 512, 16, FP32, "cpu")
    upstream = torch.randn_like(q)
    expected = run(lambda *x: attention(*x, window=64), [q, k, v], [upstream])
    for x in (k, v):
        x[:, :, :128] = torch.nan
        x[:, :, 480:] = torch.nan
    out, dq, _, _ = run(lambda *x: attention(*x, window=64), [q, k, v], [upstream])
    for found, truth in ((out, expected[0]), (dq, expected[1])):
        assert torch.equal(found[:, :, 192:480], truth[:, :, 192:480])
        assert found[:, :, 480:].isnan().all()


def test_documents_apart_are_not_visited():
    q, k, v = qkv(1, 2, 1, 512, 512, 16, FP32, "cpu")
    options, upstream = dict(segment_ids=ids(200, 312)), torch.randn_like(q)
    expected = run(lambda *x: attention(*x, **options), [q, k, v], [upstream])
    for x in (k, v):
        x[:, :, :192] = torch.nan  # whole blocks of the first
    found = run(lambda *x: attention(*x, **options), [q, k, v], [upstream])
    for x, truth in zip(found, expected, strict=True):
        assert torch.equal(x[:, :, 256:], truth[:, :, 256:])
    assert found[0][:, :, 1:200].isnan().all()


def test_queries_that_no_visited_block_is_for_see_nothing():
    """Whatever the memory held that their sums would be in."""
    q, k, v = qkv(1, 1, 1, 128, 128, 16, FP32, "cpu")
    queries, keys = ids(64, 32, 32), ids(96, 32)
    queries[:, 64:96], keys[:, 96:] = 5, 2  # of 64 queries the last 32 alone have keys
    before = torch.are_deterministic_algorithms_enabled()
    try:
        torch.use_deterministic_algorithms(True)  # new memory is NaN
        found = run(lambda *x: attention(*x, segment_ids=(queries, keys)), [q, k, v], [v])
    finally:
        torch.use_deterministic_algorithms(before)
    assert not found[0][:, :, 64:96].any() and not found[1][:, :, 64:96].any()
    assert all(x.isfinite().all() for x in found) and found[0][:, :, 96:].all()


def test_large_scores_in_bf16():
    """Scores of a standard deviation of 30 are as exact as the numbers that they come from."""
    q, k, v = qkv(1, 2, 1, 150, 150, 32, BF16, "cpu")
    truth = attention_reference(*(x.double() for x in (q * 30, k, v)))
    assert relative_error(attention(q * 30, k, v), truth) < 2 * EPSILON[BF16]


def test_scores_near_the_lowest_number():
    """They are scores like any other: the softmax is of what they differ by."""
    q, k, v = qkv(1, 1, 1, 40, 40, 2, FP32, "cpu")
    q, k = torch.full_like(q, 1e18), torch.full_like(k, -1e18)
    k[0, 0, 3] *= 1 - 1e-6
    inputs = [x.double() for x in (q, k, v)]
    assert attention_reference(*inputs)[0, 0, 1].isclose(v[0, 0, :2].mean(0).double()).all()
    torch.testing.assert_close(
        attention(q, k, v, scale=0.5), attention_reference(q, k, v, scale=0.5)
    )


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_no_number_stays_with_its_query(dtype, value):
    q, k, v = qkv(1, 2, 1, 70, 70, 16, dtype, "cpu")
    q[0, 1, 40, 3] = value
    out, truth = attention(q, k, v), attention_reference(q.double(), k.double(), v.double())
    assert torch.equal(out.isfinite(), truth.isfinite()) and not out[0, 1, 40].isfinite().any()


@pytest.mark.parametrize("layout", ["positions first", "fused", "strided", "expanded"])
def test_any_layout(layout, calls):
    q, k, v = qkv(2, 4, 4, 140, 140, 16, FP32, "cpu")
    if layout == "positions first":
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    elif layout == "fused":
        q, k, v = (x.transpose(1, 2) for x in torch.randn(2, 140, 3, 4, 16).unbind(2))
    elif layout == "strided":
        q, k, v = (x.mT.contiguous().mT for x in (q, k, v))
    else:
        k, v = (x[:, :1].expand(-1, 4, -1, -1) for x in (k, v))
    out = attention(q, k, v)
    assert layout == "strided" or out.stride() == torch.empty_like(q).stride()
    check_attention([q, k, v], True)
    assert calls


def test_the_same_bits_whatever_the_threads_and_the_batch():
    inputs = qkv(3, 6, 2, 150, 170, 24, BF16, "cpu")
    upstream = torch.randn_like(inputs[0])
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(run(attention, inputs, [upstream]))
    finally:
        torch.set_num_threads(before)
    found.append(run(attention, [x[1:2] for x in inputs], [upstream[1:2]]))
    for other in found[1:3]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
    assert all(torch.equal(a[1:2], b) for a, b in zip(found[0], found[3], strict=True))


def test_memory():
    """Inputs, the output and a number for each query of each head, whatever the number of keys."""
    inputs = [x.requires_grad_() for x in qkv(3, 4, 2, 128, 200, 16, FP32, "cpu")]
    kept = {}

    def pack(x):
        kept[x.data_ptr()] = x.numel()
        return x

    with saved_tensors_hooks(pack, lambda x: x):
        attention(*inputs)
    assert sum(kept.values()) == sum(x.numel() for x in [*inputs, inputs[0]]) + 3 * 4 * 128


@pytest.mark.parametrize("learns", ["q", "k", "v"])
def test_gradient_of_one_input(learns):
    inputs = qkv(2, 4, 2, 150, 150, 16, FP32, "cpu")
    x = inputs["qkv".index(learns)].requires_grad_()
    (found,) = torch.autograd.grad(attention(*inputs).square().sum(), x)
    (truth,) = torch.autograd.grad(attention_reference(*inputs).square().sum(), x)
    torch.testing.assert_close(found, truth)


@pytest.mark.parametrize("empty", ["batch", "queries", "keys"])
def test_empty(empty, calls):
    batch, n_queries, n_keys = (0 if empty == x else 5 for x in ("batch", "queries", "keys"))
    inputs = qkv(batch, 2, 1, n_queries, n_keys, 16, FP32, "cpu")
    for found, like in zip(
        run(attention, inputs, [torch.ones_like(inputs[0])]), [inputs[0], *inputs], strict=True
    ):
        assert found.shape == like.shape and not found.any()
    assert bool(calls) == (empty != "queries")


@pytest.mark.parametrize("n", [20, 150])
def test_autocast_and_checkpointing(n):
    """A recomputed forward gives the same bits."""
    inputs = [x.requires_grad_() for x in qkv(2, 2, 1, n, n, 16, FP32, "cpu")]
    with torch.autocast("cpu", BF16):
        plain = attention(*inputs)
        again = checkpoint(attention, *inputs, use_reentrant=False)
    assert plain.dtype == again.dtype == BF16
    truth = attention_reference(*(x.double() for x in inputs))
    assert relative_error(plain, truth) < 4 * EPSILON[BF16]
    grads = [torch.autograd.grad(y.float().square().sum(), inputs) for y in (plain, again)]
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("sizes", [(2, 4, 2, 9, 12, 16), (2, 2, 2, 140, 140, 16)], ids=str)
@pytest.mark.parametrize("window", [None, 7])
def test_opcheck(sizes, window):
    q, k, v = (x.requires_grad_() for x in qkv(*sizes, FP32, "cpu"))
    op = torch.ops.ponder.attention_cpu.default
    torch.library.opcheck(op, (q, k, v, None, None, True, window, 0.25))


def test_traces_whole_with_dynamic_lengths(calls):
    """torch.compile sees no graph break, and the gradients survive."""
    traced = torch.compile(attention, backend="aot_eager", fullgraph=True, dynamic=True)
    for n in (100, 120, 150):
        inputs = qkv(2, 2, 1, n, n + 2, 16, FP32, "cpu")
        upstream = [torch.randn_like(inputs[0])]
        expected = run(attention_reference, inputs, upstream)
        for a, b in zip(run(traced, inputs, upstream), expected, strict=True):
            torch.testing.assert_close(a, b)
    assert calls


def test_a_second_derivative_is_refused():
    q, k, v = (x.requires_grad_() for x in qkv(1, 2, 2, 9, 9, 16, FP32, "cpu"))
    with pytest.raises(RuntimeError, match="no second derivative, which create_graph=True"):
        torch.autograd.grad(attention(q, k, v).sum(), q, create_graph=True)


def test_pytorchs_own_is_taken_elsewhere(calls, monkeypatch):
    """By function transforms, for one query and what C does not know, and without a compiler."""
    q, k, v = qkv(3, 2, 2, 9, 9, 16, FP32, "cpu")
    dq = torch.func.grad(lambda q: attention(q, k, v).square().sum())(q)
    q.requires_grad_()
    (truth,) = torch.autograd.grad(attention_reference(q, k, v).square().sum(), q)
    torch.testing.assert_close(dq, truth)
    odd = [x[..., :15].bfloat16() for x in (q, k, v)]
    for given in (odd, [x.half() for x in (q, k, v)], [x.double() for x in (q, k, v)]):
        truth = attention_reference(*(x.double() for x in given))
        assert relative_error(attention(*given), truth) < torch.finfo(given[0].dtype).eps
    attention(q[:, :, :1], k, v)
    monkeypatch.setattr(module, "threaded_library", lambda source: None)
    torch.testing.assert_close(attention(q, k, v), attention_reference(q, k, v))
    assert not calls
