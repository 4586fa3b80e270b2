"""linear_cross_entropy against the ways to a loss over a large vocabulary; peak_mib matters too."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from ponder import kernels
from ponder.benchmarks.comparison import Case, compiled, peer, tensor
from ponder.benchmarks.measure import DEVICE


def cases(smoke: bool) -> Iterator[Case]:
    tokens, width = (256, 32) if smoke else (32768, 768)
    liger = peer("liger_kernel.transformers.functional", "liger_fused_linear_cross_entropy")
    cut = peer("cut_cross_entropy", "linear_cross_entropy")
    own = getattr(F, "linear_cross_entropy", None)  # from torch 2.13 on
    for vocabulary in (300,) if smoke else (50304, 131072):
        targets = torch.randint(vocabulary, (tokens,), device=DEVICE)

        def eager(x, w, targets=targets):
            return F.cross_entropy(F.linear(x, w).float(), targets)

        implementations = {
            "ponder": lambda x, w, t=targets: kernels.linear_cross_entropy(x, w, t),
            "eager": eager,
        }
        if not smoke:
            implementations["torch.compile"] = compiled(eager)
        if own:
            implementations["torch linear_cross_entropy"] = lambda x, w, t=targets: own(x, w, t)
        if liger:
            implementations["liger"] = lambda x, w, t=targets: liger(x, w, t)
        if cut:
            implementations["cut-cross-entropy"] = lambda x, w, t=targets: cut(x, w, t)
        yield Case(
            "losses",
            f"linear_cross_entropy M{tokens} C{width} V{vocabulary}",
            implementations,
            [tensor(tokens, width), tensor(vocabulary, width, scale=width**-0.5)],
            eager,
            modes=("forward+backward",),
            flops=2 * tokens * width * vocabulary,
        )
