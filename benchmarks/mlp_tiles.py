"""The widest tile of the MLPs' products, forward and backward, against others: part of tiles.py.

In bf16, 8192 rows, SwiGLU and relu² of GPT-2's width and of 2048.
"""

import importlib
import statistics
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ponder.benchmarks.measure import DEVICE, milliseconds
from ponder.kernels._gemm import Tile, Tiles

module = importlib.import_module("ponder.kernels.mlp")
_table = module._tiles
HOPPER = [
    Tile(*shape, num_warps=warps, num_stages=stages, tma=True, width=width, flat=flat)
    for shape, warps, stages, width, flat in (
        ((128, 256, 64), 8, 3, 64, True),
        ((128, 256, 64), 8, 3, 128, True),
        ((128, 256, 64), 8, 4, 64, True),
        ((128, 256, 64), 8, 4, 128, True),
        ((128, 256, 64), 8, 3, 32, True),
        ((128, 256, 64), 8, 3, 64, False),
        ((128, 256, 64), 8, 4, 64, False),
        ((128, 256, 64), 8, 4, 128, False),
        ((128, 128, 64), 8, 4, 64, True),
        ((128, 128, 64), 4, 4, 64, True),
        ((128, 128, 128), 8, 3, 64, True),
        ((256, 128, 64), 8, 3, 64, True),
        ((64, 256, 64), 4, 4, 64, True),
        ((64, 256, 64), 4, 4, 64, False),
    )
]
INTERPRETED = [Tile(32, 64, 32, num_warps=4, num_stages=1, tma=True)]


def take(direction: bool, tile: Tile | None) -> None:
    """Let the kernel, of the backward or not, take this tile where the table has its widest."""

    def tiles(device_capability: int, itemsize: int, backward: bool) -> Tiles:
        found = _table(device_capability, itemsize, backward)
        if tile is None or backward != direction:
            return found
        return Tiles((tile, *found.by_size[1:]), found.unaligned)

    module._tiles = tiles


def candidates(smoke: bool) -> Iterator[tuple[bool, Tile]]:
    chip = module.capability(torch.device(DEVICE))
    for backward in (False, True):
        for tile in HOPPER if chip in (90, 100, 103) else INTERPRETED * smoke:
            yield backward, tile


def problems(smoke: bool) -> Iterator[tuple[str, str, Tensor, list[Tensor]]]:
    """(name, activation, x, weights), gated and plain."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float16
    for width in (64,) if smoke else (768, 2048):
        for gated in (True, False):
            inner = max(128, width * 8 // 3 // 128 * 128) if gated else 4 * width
            x = torch.randn(256 if smoke else 8192, width, device=DEVICE).to(dtype)
            shapes = [(inner, width)] * (1 + gated) + [(width, inner)]
            weights = [torch.randn(s, device=DEVICE) * s[1] ** -0.5 for s in shapes]
            name = f"{'gated' if gated else 'plain'} C{width}"
            yield name, "silu" if gated else "relu2", x, [w.to(dtype) for w in weights]


def forward(x: Tensor, weights: list[Tensor], activation: str) -> tuple[Tensor, ...]:
    gate = weights[0] if len(weights) == 3 else None
    return module._mlp(x, gate, *weights[-2:], None, None, None, activation, True)


def backward_of(x: Tensor, weights: list[Tensor], activation: str) -> Callable:
    """The backward kernel alone, as a call; x stands for the gradient of the output."""
    _, gate, up = forward(x, weights, activation)
    gated = len(weights) == 3
    same = module._up_is_hidden(gated, activation)
    return lambda: module._mlp_backward(x, weights[-1], gate, up, activation, gated, same)


def error_of(backward: bool, tile: Tile, smoke: bool) -> float:
    """The largest relative error of what the kernel writes, on all problems."""
    errors = []
    for _, activation, x, weights in problems(smoke):
        take(backward, tile)
        y, *_ = forward(x, weights, activation)
        written = [t for t in backward_of(x, weights, activation)() if t.numel()]
        # The truth in fp32: y, the gradients of the pre-activations, and what the product takes.
        wide = [w.float() for w in weights]
        inner = [(x.float() @ w.t()).requires_grad_() for w in wide[:-1]]
        act = module.ACTIVATIONS[activation]
        hidden = act(inner[0]) * inner[1] if len(inner) == 2 else act(inner[0])
        truth = hidden @ wide[-1].t()
        wanted = [truth, *torch.autograd.grad(truth, inner, x.float())]
        if not module._up_is_hidden(len(inner) == 2, activation):
            wanted.append(hidden)
        for a, b in zip((y, *written), wanted, strict=True):
            errors.append((a.float() - b).norm() / b.norm())
    return torch.stack(errors).max().item()  # NaN if one is, where Python's max may drop it


def best(backward: bool, tiles: list[Tile], smoke: bool, gain: float) -> Tile | None:
    """The tile that beats the table's, if one does."""
    options = {"ponder": None} | {str(tile): tile for tile in tiles}
    ratios: dict[str, list[float]] = {key: [] for key in options}
    for name, activation, x, weights in problems(smoke):
        take(backward, None)
        call = backward_of(x, weights, activation)
        works = {}
        for key, tile in options.items():

            def work(tile=tile, call=call, x=x, weights=weights, activation=activation):
                take(backward, tile)
                call() if backward else forward(x, weights, activation)

            works[key] = work
        counts = dict(repeats=2, warmup=1) if smoke else dict(repeats=15, warmup=2)
        series = milliseconds(works, **counts, queued=True)
        medians = {key: statistics.median(values) for key, values in series.items()}
        kind = "backward" if backward else "forward"
        for key, value in medians.items():
            print(f"mlp {kind:8} {name:12} {value:8.3f} ms  {key}")
            ratios[key].append(value / medians["ponder"])
    take(backward, None)
    means = {key: statistics.geometric_mean(values) for key, values in ratios.items()}
    winner = min(means, key=lambda key: means[key])
    print(f"mlp backward={backward}: {winner}, {means[winner]:.3f} of the time before", flush=True)
    return options[winner] if means[winner] < gain else None
