"""linear_cross_entropy against the ways to a loss over a large vocabulary; peak_mib matters too."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from ponder import kernels
from ponder.benchmarks.comparison import Case, Setting, compiled, peer
from ponder.benchmarks.measure import DEVICE


def cases(setting: Setting) -> Iterator[Case]:
    sizes = setting.of(
        [(256, 32, 300)],
        [(2048, 256, 8192), (1024, 256, 50304)],
        [(32768, 768, 50304), (32768, 768, 131072)],
    )
    liger = peer("liger_kernel.transformers.functional", "liger_fused_linear_cross_entropy")
    cut = peer("cut_cross_entropy", "linear_cross_entropy")
    own = getattr(F, "linear_cross_entropy", None)  # from torch 2.13 on
    for tokens, width, vocabulary in sizes:
        targets = torch.randint(vocabulary, (tokens,), device=DEVICE)

        def eager(x, w, targets=targets):
            return F.cross_entropy(F.linear(x, w).float(), targets)

        implementations = {
            "ponder": lambda x, w, t=targets: kernels.linear_cross_entropy(x, w, t),
            "eager": eager,
        }
        if not setting.smoke:
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
            [
                setting.tensor(tokens, width),
                setting.tensor(vocabulary, width, scale=width**-0.5),
            ],
            eager,
            modes=("forward+backward",),
            flops=2 * tokens * width * vocabulary,
        )
