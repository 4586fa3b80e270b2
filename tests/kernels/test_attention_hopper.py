"""The kernels for Hopper, on every device. (A file of their own: on a GPU one that never ends takes
no other's tests along.)"""

import importlib

import pytest
import torch

from ponder.kernels import _attention_tiles, attention
from ponder.kernels._attention_tiles import SPECIALIZED_TILES, Tiles
from ponder.kernels.attention import attention_reference

from .numerics import DTYPES, EPSILON, check, relative_error, run
from .test_attention import qkv

module = importlib.import_module("ponder.kernels.attention")
DTYPES = [dtype for dtype in DTYPES if dtype != torch.float32]

# (B, Hq, Hkv, T, S, D, causal), as in test_attention; T is what these kernels take.
CASES = [
    (2, 4, 2, 132, 130, 64, True),
    (1, 4, 1, 72, 131, 80, True),
    (1, 2, 1, 132, 70, 96, True),
    (1, 2, 1, 132, 70, 96, False),
    (3, 4, 2, 4, 67, 64, True),
]


@pytest.fixture
def hopper(device, monkeypatch):
    """The kernels for Hopper are chosen, with tiles of which a small input has several."""
    if device == "cuda" and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("this GPU has no such kernels")
    block = {"forward": (128, 64), "backward_q": (128, 64), "delta": (64, 16)}
    found = {
        (name, dim): Tiles(*block.get(name, (64, 128)), tiles.num_warps, 2, specialized=True)
        for (name, dim), tiles in SPECIALIZED_TILES.items()
    }
    chip = module.capability(torch.device(device))
    monkeypatch.setattr(_attention_tiles, "measured", lambda: (chip, found))
    launched, kernel = [], module._kernel
    monkeypatch.setattr(module, "_kernel", lambda *x: launched.append(x) or kernel(*x))
    return lambda: [name for name, tiles in launched if tiles.specialized]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_specialized_kernels(case, deterministic, dtype, device, hopper):
    *sizes, causal = case
    inputs = qkv(*sizes, dtype, device)

    def seen(out, lse):  # a query that sees no key has -inf, whose error is no number
        return out, lse.masked_fill(lse.isinf(), 0.0)

    options = dict(causal=causal, return_lse=True)
    check(
        lambda *x: seen(*attention(*x, **options, deterministic=deterministic)),
        lambda *x: seen(*attention_reference(*x, **options)),
        inputs,
        reduction=inputs[1].shape[2] + inputs[0].shape[2] + inputs[0].shape[3],
        names="out lse dq dk dv",
    )
    backward = ["backward_q", "backward_kv"] if deterministic else ["backward"]
    assert hopper() == ["forward", "delta", *backward]


def test_one_pass_where_keys_past_the_last_would_be_infinite(device, hopper):
    """Weights exp2(0 - lse) of keys that are not there, where all true scores are far below 0."""
    q, k, v = qkv(1, 1, 1, 64, 70, 64, torch.bfloat16, device)
    inputs = [q.abs() * 8, -k.abs() * 8, v]
    dout = [torch.randn_like(q)]
    grads = run(lambda *x: attention(*x, causal=False, deterministic=False), inputs, dout)
    truth = run(lambda *x: attention_reference(*x, False), [x.double() for x in inputs], dout)
    assert hopper()[-1] == "backward"
    # Where one key has nearly all the weight, dp − delta cancels, and delta is of the rounded out:
    # in fp64 that rounding alone puts dq off by 0.009 to 0.010.
    for a, b in zip(grads, truth, strict=True):
        assert relative_error(a, b) < 8 * EPSILON[torch.bfloat16]


@pytest.mark.parametrize("deterministic", [True, False])
def test_specialized_kernels_take_expanded_gradients(deterministic, device, hopper):
    """The sum over heads gives all of them the same dout, with a stride of 0."""
    inputs = qkv(1, 4, 2, 68, 68, 64, torch.bfloat16, device)
    leaves = [x.requires_grad_() for x in inputs]
    results = []
    for fn in (lambda *x: attention(*x, deterministic=deterministic), attention_reference):
        out = fn(*leaves).sum(1)
        weight = torch.linspace(-1, 1, out.numel(), device=device).view_as(out).bfloat16()
        results.append(torch.autograd.grad(out, leaves, weight))
    assert "delta" in hopper()
    for a, b in zip(*results, strict=True):
        assert relative_error(a, b) < 8 * EPSILON[torch.bfloat16]


@pytest.mark.parametrize(
    "change",
    [dict(sinks=torch.zeros(2)), dict(window=9), dict(softcap=5.0)],
    ids=lambda change: next(iter(change)),
)
def test_specialized_kernels_leave_options_to_the_others(change, device, hopper):
    inputs = qkv(1, 2, 1, 16, 16, 64, torch.bfloat16, device)
    change = {k: x.to(device) if torch.is_tensor(x) else x for k, x in change.items()}
    out = attention(*inputs, **change)
    assert relative_error(out, attention_reference(*inputs, **change)) < 4 * EPSILON[torch.bfloat16]
    assert hopper() == []
