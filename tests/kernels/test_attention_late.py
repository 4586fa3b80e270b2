"""Kernels whose products run under exponentials, as on Hopper: in another order, the same bits."""

import importlib
from dataclasses import replace

import pytest
import torch

from ponder.kernels import attention

from .test_attention import qkv

module = importlib.import_module("ponder.kernels.attention")


@pytest.fixture
def late(monkeypatch):
    """Chooses whether kernels are late, with tiles of which a small input has several."""
    choose = module.choose

    def set_late(late: bool) -> None:
        def chosen(name, *args):
            tiles = choose(name, *args)
            if name == "forward":
                tiles = replace(tiles, block_t=32, block_s=32)
            return replace(tiles, late=late, specialized=False) if tiles else None

        monkeypatch.setattr(module, "choose", chosen)

    return set_late


@pytest.mark.parametrize(
    "sizes, options",
    [
        ((2, 4, 2, 100, 100, 64), dict()),
        ((1, 2, 1, 70, 131, 48), dict(causal=False)),
        ((1, 2, 1, 40, 70, 128), dict(softcap=20.0)),
        ((1, 2, 1, 20, 7, 32), dict()),  # queries that see no key
        ((1, 2, 1, 150, 150, 32), dict(window=40)),
        ((1, 2, 2, 150, 150, 32), dict(window=9, causal=False, softcap=20.0)),
        ((1, 2, 1, 130, 130, 32), dict(segments=True, sinks=True)),
        ((1, 2, 1, 90, 130, 32), dict(alibi=True)),
    ],
    ids=str,
)
def test_late_weights_make_the_same_bits(sizes, options, late, device):
    torch.manual_seed(0)
    q, k, v = qkv(*sizes, torch.float16, device)
    options = dict(options)
    heads, length = q.shape[1], q.shape[2]
    if options.pop("segments", False):
        ids = torch.arange(length, device=device) // 45
        options["segment_ids"] = ids[None], ids[None]
    if options.pop("sinks", False):
        options["sinks"] = torch.randn(heads, device=device)
    if options.pop("alibi", False):
        options["alibi_slopes"] = torch.rand(heads, device=device)
    found = []
    for choice in (False, True):
        late(choice)
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out, lse = attention(*leaves, return_lse=True, **options)
        found.append([out, lse, *torch.autograd.grad(out, leaves, out.detach())])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_values_that_nobody_sees_do_not_matter(late, device):
    """Not in the first step, where there are no weights yet, nor behind the last key."""
    late(True)
    q, k, v = qkv(1, 1, 1, 64, 64, 32, torch.float16, device)
    ids = torch.arange(64, device=device)[None] // 32
    segments = ids + 1, ids  # of the second block of queries no key is there
    v[:, :, :32] = torch.nan
    out = attention(q, k, v, causal=False, segment_ids=segments)
    assert out[:, :, :32].isfinite().all() and not out[:, :, 32:].any()
