"""A NaN in an input shows in every output that depends on it, and in no other row.

A GPU's maximum of NaN and a number is the number, which the interpreter does not imitate in every
version of Triton: so these are for the kernels as they were compiled, too (`make ptx`).
"""

import pytest
import torch

from ponder import kernels
from ponder.kernels._activations import ACTIVATIONS

ROWS, WRONG = 37, 20


def with_nan(*shape: int, at: tuple[int, ...], device: str) -> torch.Tensor:
    x = torch.randn(shape, device=device)
    x[at] = torch.nan
    return x


def wrong_rows(y: torch.Tensor) -> list[int]:
    """The rows of y that hold a NaN; if they hold one they hold nothing else."""
    y = y.reshape(ROWS, -1)
    rows = y.isnan().any(1)
    assert torch.equal(rows, y.isnan().all(1)), "rows are NaN in part"
    return rows.nonzero().flatten().tolist()


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_mlp(activation, gated, way):
    x = with_nan(ROWS, 48, at=(WRONG, 7), device=way)
    inner = [torch.randn(272, 48, device=way) for _ in range(1 + gated)]
    fn = kernels.gated_mlp if gated else kernels.mlp
    y = fn(x, *inner, torch.randn(48, 272, device=way), activation=activation)
    assert wrong_rows(y) == [WRONG]


@pytest.mark.parametrize("width", [40, 9001])  # in one tile, and in several
def test_softmax_and_losses(width, device):
    x = with_nan(ROWS, width, at=(WRONG, 7), device=device)
    targets = torch.arange(ROWS, device=device)
    assert wrong_rows(kernels.softmax(x)) == [WRONG]
    for options in ({}, dict(softcap=3.0), dict(label_smoothing=0.1), dict(z_loss=1.0)):
        loss = kernels.cross_entropy(x, targets, reduction="none", **options)
        assert wrong_rows(loss) == [WRONG]
    h, weight = with_nan(ROWS, 16, at=(WRONG, 3), device=device), torch.randn(width, 16)
    weight = weight.to(device)
    loss = kernels.linear_cross_entropy(h, weight, targets, reduction="none")
    assert wrong_rows(loss) == [WRONG]
    assert kernels.mse_loss(x, torch.zeros_like(x)).isnan()


def test_norms_and_rotary(way):
    x, weight = with_nan(ROWS, 16, at=(WRONG, 3), device=way), torch.ones(16, device=way)
    for norm in (kernels.rms_norm, kernels.layer_norm):
        assert wrong_rows(norm(x, weight)) == [WRONG]
    angles = torch.randn(ROWS, 8, device=way)
    for y in kernels.rotary(
        x[None, None], x[None, None], angles.cos(), angles.sin(), q_norm=weight, k_norm=weight
    ):
        assert wrong_rows(y) == [WRONG]


@pytest.mark.parametrize("options", [{}, dict(softcap=5.0), dict(window=8)], ids=str)
@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_attention(where, options, device):
    """(Where PyTorch computes it with a mask, the NaN of a masked key is in all rows.)"""
    inputs = {name: torch.randn(1, 1, ROWS, 32, device=device) for name in "qkv"}
    inputs[where][0, 0, WRONG, 3] = torch.nan
    y = kernels.attention(**inputs, causal=True, **options)[0, 0].isnan().any(1)
    end = WRONG + 1 if where == "q" else min(ROWS, WRONG + options.get("window", ROWS))
    assert y[WRONG:end].all()
    if where != "v":  # whose NaN times a weight of 0 is NaN, as in PyTorch
        assert not y[:WRONG].any() and not y[end:].any()


@pytest.mark.parametrize("place", [2, 600])  # in different splits
@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_decode_attention(where, place, device):
    inputs = {"q": torch.randn(3, 2, 1, 64, device=device)}
    inputs |= {name: torch.randn(3, 2, 700, 64, device=device) for name in "kv"}
    inputs[where][1, 0, 0 if where == "q" else place, 3] = torch.nan
    lengths = torch.tensor([700, 700, 1], device=device)
    y = kernels.decode_attention(*inputs.values(), lengths)
    assert y.isnan().any(-1).nonzero().tolist() == [[1, 0, 0]]
