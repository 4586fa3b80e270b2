"""The tiles of attention's kernels against each other: how _attention_tiles.py is to be chosen.

`python -m ponder.benchmarks tiles`, on a GPU. In each case one kernel takes other tiles and the
rest keep theirs; "ponder" is what the table says today. To be looked at by a person, who then
changes the table: a tile that wins by less than the noise is no reason to.
"""

import importlib
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ponder import kernels
from ponder.benchmarks.comparison import Case, tensor
from ponder.kernels._attention_tiles import SPECIALIZED_TILES, Tiles

module = importlib.import_module("ponder.kernels.attention")

PLAIN = [
    Tiles(*numbers)
    for numbers in (
        (128, 128, 8, 2),
        (128, 128, 8, 3),
        (128, 64, 8, 3),
        (128, 64, 4, 3),
        (64, 128, 8, 2),
        (64, 128, 4, 2),
        (64, 64, 4, 3),
    )
]
SPECIALIZED = {
    "forward": [
        Tiles(*shape, 4, stages, specialized=True)
        for shape in ((128, 128), (128, 64))
        for stages in (2, 3)
    ],
    "backward_kv": [Tiles(64, 128, 4, stages, specialized=True) for stages in (2, 3)],
}
_choose = module.choose
_taken: dict[str, Tiles] = {}


def _chosen(name: str, *rest) -> Tiles:
    return _taken.get(name) or _choose(name, *rest)


def _attention(causal: bool, taken: dict[str, Tiles]) -> Callable[..., Tensor]:
    def call(q, k, v):
        _taken.clear()
        _taken.update(taken)  # for the backward pass too, which follows at once
        return kernels.attention(q, k, v, causal=causal)

    return call


def _fits(call: Callable, inputs: list[Tensor]) -> bool:
    """Whether the kernels compile and find room on this GPU."""
    try:
        torch.autograd.grad(call(*inputs).sum(), inputs)
    except Exception as error:  # of Triton's own kinds, which differ between its versions
        print(f"  left out: {type(error).__name__} {str(error).splitlines()[0][:80]}")
        return False
    return True


def cases(smoke: bool) -> Iterator[Case]:
    module.choose = _chosen
    batch, heads, length = (1, 1, 128) if smoke else (4, 16, 4096)
    for dim in (64, 128):
        for causal in (True, False):
            inputs = [tensor(batch, heads, length, dim) for _ in range(3)]
            whole = {n: t for (n, d), t in SPECIALIZED_TILES.items() if d == dim}
            trials = [(name, {name: t}) for name in module.KERNELS for t in PLAIN]
            trials += [(name, {name: t}) for name, ts in SPECIALIZED.items() for t in ts]
            for kernel in module.KERNELS:
                calls = {"ponder": _attention(causal, {})}
                if kernel in whole:
                    calls["all specialized"] = _attention(causal, whole)
                for name, taken in trials:
                    if name == kernel and not smoke:
                        t = taken[name]
                        kind = " specialized" if t.specialized else ""
                        label = f"{t.block_t}x{t.block_s} w{t.num_warps} s{t.num_stages}{kind}"
                        call = _attention(causal, taken)
                        if _fits(call, inputs):
                            calls[label] = call
                yield Case(
                    "tiles",
                    f"{kernel} B{batch} H{heads} T{length} D{dim} {'causal' if causal else 'full'}",
                    calls,
                    inputs,
                    lambda q, k, v, c=causal: F.scaled_dot_product_attention(q, k, v, is_causal=c),
                    modes=("forward",) if kernel == "forward" else ("forward+backward",),
                    flops=4 * batch * heads * length * length * dim * (0.5 if causal else 1.0),
                    backward=2.5,
                    part=lambda inputs: [x[:1, :1] for x in inputs],
                )
    _taken.clear()
    module.choose = _choose
