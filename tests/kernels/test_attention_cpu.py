"""Attention on a CPU in blocks: what it computes, what it keeps, and when it is taken."""

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
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch):
    """In fp32 too, which tells more of the arithmetic than bf16 does."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(module, "DTYPES", DTYPES)


@pytest.fixture
def calls(monkeypatch):
    """The queries of every block whose scores are computed, as they come."""
    seen, weights = [], module._weights

    def recorded(q, k, ids, block, scale, room):
        seen.append(block)
        return weights(q, k, ids, block, scale, room)

    monkeypatch.setattr(module, "_weights", recorded)
    return seen


# (B, Hq, Hkv, T, S, D). A block is 128 queries: less than one, one, two with a rest, four; groups
# of 1, 2 and 3 heads; T = S and T < S. The scores of a part of the rows at a time, or of all.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("scores", [1, 2**17, 2**30])
@pytest.mark.parametrize(
    "sizes",
    [
        (5, 2, 2, 17, 17, 16),
        (3, 4, 2, 128, 128, 32),
        (3, 6, 2, 130, 201, 20),
        (2, 2, 1, 512, 512, 16),
    ],
    ids=str,
)
def test_blocks(sizes, scores, causal, dtype, calls, monkeypatch):
    monkeypatch.setattr(module, "SCORES", scores)
    check_attention(qkv(*sizes, dtype, "cpu"), causal)
    assert calls


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "options",
    [
        dict(window=1),
        dict(window=40),
        dict(window=150, causal=False),
        dict(window=1000),
        dict(segment_ids=ids(3, 100, 60, 37, batch=3)),
        dict(segment_ids=ids(*[1] * 200, batch=3)),
        dict(segment_ids=ids(3, 100, 60, 37, batch=3).flip(1), causal=False, window=70),
    ],
    ids=["1", "40", "150, full", "1000", "segments", "of one token", "segments, full, 70"],
)
def test_what_a_query_sees(options, dtype, calls, monkeypatch):
    monkeypatch.setattr(module, "SCORES", 2**17)
    check_options((3, 4, 2, 200, 200, 24), dtype, "cpu", 12, **pairs(options))
    assert calls


def pairs(options):
    """The reference wants the ids of queries and keys; here they are the same tensor."""
    same = options.get("segment_ids")
    return options if same is None else {**options, "segment_ids": (same, same)}


def test_keys_out_of_sight_are_not_visited():
    """A weight of 0 times NaN is NaN: what is only masked shows."""
    q, k, v = qkv(1, 2, 1, 512, 512, 16, torch.float32, "cpu")
    upstream = torch.randn_like(q)
    expected = run(lambda *x: attention(*x, window=64), [q, k, v], [upstream])
    for x in (k, v):
        x[:, :, :128] = torch.nan
    out, dq, _, _ = run(lambda *x: attention(*x, window=64), [q, k, v], [upstream])
    for found, truth in ((out, expected[0]), (dq, expected[1])):
        assert torch.equal(found[:, :, 384:], truth[:, :, 384:])


@pytest.mark.parametrize("layout", ["positions first", "strided", "expanded"])
def test_any_layout(layout, calls):
    q, k, v = qkv(2, 4, 4, 140, 140, 16, torch.float32, "cpu")
    if layout == "positions first":
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    elif layout == "strided":
        q, k, v = (x.mT.contiguous().mT for x in (q, k, v))
    else:
        k, v = (x[:, :1].expand(-1, 4, -1, -1) for x in (k, v))
    check_attention([q, k, v], True)
    assert calls


@pytest.mark.parametrize("n_queries", [128, 129])
def test_memory(n_queries):
    """One block keeps its weights; several keep inputs alone, whatever the number of pairs."""
    inputs = [x.requires_grad_() for x in qkv(3, 4, 2, n_queries, 200, 16, torch.float32, "cpu")]
    kept = {}

    def pack(x):
        kept[x.data_ptr()] = x.numel()
        return x

    with saved_tensors_hooks(pack, lambda x: x):
        attention(*inputs)
    weights = 3 * 4 * n_queries * 200 if n_queries <= module.QUERIES else 0
    assert sum(kept.values()) == sum(x.numel() for x in inputs) + weights


def test_without_gradients_nothing_is_kept_and_bf16_is_the_same():
    inputs = qkv(3, 4, 2, 20, 20, 16, torch.bfloat16, "cpu")
    without = attention(*inputs)
    learning = attention(*(x.requires_grad_() for x in inputs))
    assert without.grad_fn is None and torch.equal(without, learning)


@pytest.mark.parametrize("learns", ["q", "k", "v"])
def test_gradient_of_one_input(learns):
    inputs = qkv(2, 4, 2, 150, 150, 16, torch.float32, "cpu")
    x = inputs["qkv".index(learns)].requires_grad_()
    (found,) = torch.autograd.grad(attention(*inputs).square().sum(), x)
    (truth,) = torch.autograd.grad(attention_reference(*inputs).square().sum(), x)
    torch.testing.assert_close(found, truth)


def test_no_rows(calls):
    inputs = [x.requires_grad_() for x in qkv(0, 4, 2, 20, 20, 16, torch.float32, "cpu")]
    out = attention(*inputs)
    out.sum().backward()
    assert out.shape == (0, 4, 20, 16) and inputs[1].grad.shape == inputs[1].shape


@pytest.mark.parametrize("n", [20, 150])
def test_autocast_and_checkpointing(n):
    """Under autocast the scores stay bf16 inside, and a recomputed forward gives the same bits."""
    inputs = [x.requires_grad_() for x in qkv(2, 2, 1, n, n, 16, torch.float32, "cpu")]
    with torch.autocast("cpu", torch.bfloat16):
        plain = attention(*inputs)
        again = checkpoint(attention, *inputs, use_reentrant=False)
    assert plain.dtype == again.dtype == torch.bfloat16
    truth = attention_reference(*(x.double() for x in inputs))
    assert relative_error(plain, truth) < 4 * EPSILON[torch.bfloat16]
    grads = [torch.autograd.grad(y.float().square().sum(), inputs) for y in (plain, again)]
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("sizes", [(2, 4, 2, 9, 12, 16), (2, 2, 2, 140, 140, 16)], ids=str)
@pytest.mark.parametrize("window", [None, 7])
def test_opcheck(sizes, window):
    q, k, v = (x.requires_grad_() for x in qkv(*sizes, torch.float32, "cpu"))
    keep = sizes[3] <= module.QUERIES and window is None
    op = torch.ops.ponder.attention_cpu.default
    torch.library.opcheck(op, (q, k, v, None, True, window, 0.25, keep))


def test_traces_whole_with_dynamic_lengths(calls):
    """torch.compile sees no graph break, one block or several, and the gradients survive."""
    traced = torch.compile(attention, backend="aot_eager", fullgraph=True, dynamic=True)
    for n in (100, 120, 150):
        inputs = qkv(2, 2, 1, n, n + 2, 16, torch.float32, "cpu")
        upstream = [torch.randn_like(inputs[0])]
        expected = run(attention_reference, inputs, upstream)
        for a, b in zip(run(traced, inputs, upstream), expected, strict=True):
            torch.testing.assert_close(a, b)
    assert calls


def test_a_second_derivative_is_refused():
    q, k, v = (x.requires_grad_() for x in qkv(1, 2, 2, 9, 9, 16, torch.float32, "cpu"))
    (dq,) = torch.autograd.grad(attention(q, k, v).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dq.sum().backward()


def test_function_transforms_take_pytorchs_own(calls):
    q, k, v = qkv(3, 2, 2, 9, 9, 16, torch.float32, "cpu")
    dq = torch.func.grad(lambda q: attention(q, k, v).square().sum())(q)
    assert not calls
    q.requires_grad_()
    (truth,) = torch.autograd.grad(attention_reference(q, k, v).square().sum(), q)
    torch.testing.assert_close(dq, truth)
