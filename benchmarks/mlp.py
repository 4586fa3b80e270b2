"""gated_mlp and mlp against eager PyTorch, torch.compile and Liger.

`autotuned` has torch.compile's "max-autotune" instead, which compiles for a minute and more a case.

The ceiling of the roofline column is the FLOP/s of the same products alone, by torch's own matrix
product: forward, and all of them backward.
"""

from collections.abc import Callable, Iterator

import torch.nn.functional as F
from torch import Tensor

from ponder import kernels
from ponder.benchmarks.comparison import Case, Setting, compiled, peer
from ponder.benchmarks.measure import milliseconds


def _gated(x: Tensor, g: Tensor, u: Tensor, d: Tensor) -> Tensor:
    return F.linear(F.silu(F.linear(x, g)) * F.linear(x, u), d)


def _relu2(x: Tensor, u: Tensor, d: Tensor) -> Tensor:
    return F.linear(F.relu(F.linear(x, u)).square(), d)


def _products(inputs: list[Tensor]) -> Callable[[], None]:
    """The matrix products of a forward and backward pass, with nothing between them."""
    x, *inner, down = (t.detach() for t in inputs)
    hidden = F.linear(x, inner[0])

    def work() -> None:
        for weight in inner:
            F.linear(x, weight)
            hidden @ weight  # dx
            hidden.T @ x  # dweight
        F.linear(hidden, down)
        x @ down  # dhidden
        x.T @ hidden  # ddown

    return work


def cases(setting: Setting) -> Iterator[Case]:
    return _cases("mlp", setting)


def autotuned(setting: Setting) -> Iterator[Case]:
    return _cases("mlp_autotuned", setting)


def _cases(benchmark: str, setting: Setting) -> Iterator[Case]:
    swiglu = peer("liger_kernel.transformers.functional", "liger_swiglu")
    relu2 = peer("liger_kernel.transformers.functional", "liger_relu_squared")
    for tokens in setting.of((128,), (2048,), (8192, 65536)):
        for width in setting.of((64,), (128, 256, 768), (768, 1024, 2048, 4096)):
            for gated in (True, False):
                inner = width * 8 // 3 // 128 * 128 if gated else 4 * width
                shapes = [(inner, width)] * (1 + gated) + [(width, inner)]
                inputs = [setting.tensor(tokens, width)]
                inputs += [setting.tensor(*s, scale=s[1] ** -0.5) for s in shapes]
                eager = _gated if gated else _relu2
                implementations = {
                    "ponder": kernels.gated_mlp
                    if gated
                    else lambda x, u, d: kernels.mlp(x, u, d, activation="relu2"),
                    "eager": eager,
                }
                if benchmark == "mlp_autotuned":
                    mode = "max-autotune-no-cudagraphs"
                    own = implementations["ponder"]
                    implementations = {"ponder": own}
                    if not setting.smoke:
                        implementations["torch.compile"] = compiled(eager, mode=mode)
                elif not setting.smoke:
                    implementations["torch.compile"] = compiled(eager)
                if gated and swiglu:
                    implementations["liger"] = lambda x, g, u, d: F.linear(
                        swiglu(F.linear(x, g), F.linear(x, u)), d
                    )
                if not gated and relu2:
                    implementations["liger"] = lambda x, u, d: F.linear(relu2(F.linear(x, u)), d)
                flops = 2 * tokens * width * inner * len(shapes)

                def ceiling(inputs=inputs, flops=flops) -> float:
                    work = {"products": _products(inputs)}
                    times = milliseconds(work, repeats=10, queued=True)["products"]
                    return 3 * flops / (sorted(times)[5] / 1e3)

                yield Case(
                    benchmark,
                    f"{'gated silu' if gated else 'relu2'} M{tokens} C{width} F{inner}",
                    implementations,
                    inputs,
                    eager,
                    modes=("forward+backward",),
                    flops=flops,
                    ceiling=ceiling,
                )
