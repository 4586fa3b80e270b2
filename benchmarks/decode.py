"""decode_attention against SDPA: rows of their own, and samples that share a prompt.

For N samples behind a prefix of P positions with S of their own, SDPA must read N (P + S) positions
and this kernel P + N S: their ratio is the ideal speed-up.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ponder import kernels
from ponder.benchmarks.comparison import Case, Setting
from ponder.benchmarks.measure import DEVICE


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def cases(setting: Setting) -> Iterator[Case]:
    tensor = setting.tensor
    heads, kv_heads, dim = setting.of((4, 2, 32), (8, 4, 64), (32, 8, 128))
    for batch, length in setting.of(
        ((2, 64),), ((1, 4096), (64, 256)), ((1, 8192), (64, 2048), (256, 1024))
    ):
        q = tensor(batch, heads, 1, dim, grad=False)
        k, v = (tensor(batch, kv_heads, length, dim, grad=False) for _ in range(2))
        lengths = torch.full((batch,), length, device=DEVICE)
        yield Case(
            "decode",
            f"B{batch} H{heads}/{kv_heads} S{length} D{dim}",
            {
                "ponder": lambda q, k, v, n=lengths: kernels.decode_attention(q, k, v, n),
                "sdpa": _sdpa,
            },
            [q, k, v],
            _sdpa,
            modes=("forward",),
            nbytes={"forward": k.nbytes + v.nbytes},
        )
    prefix, own = setting.of((64, 32), (512, 64), (4096, 256))
    for samples in setting.of((3,), (16, 64), (16, 64, 256)):
        q = tensor(samples, heads, 1, dim, grad=False)
        shared = [tensor(1, kv_heads, prefix, dim, grad=False) for _ in range(2)]
        cache = [tensor(samples, kv_heads, own, dim, grad=False) for _ in range(2)]
        lengths = torch.full((samples,), own, device=DEVICE)

        def ours(q, k, v, *prefix, lengths=lengths):
            return kernels.decode_attention(q, k, v, lengths, prefix=prefix)

        # What a user without a shared prefix has: caches that hold it once a sample.
        whole = [
            torch.cat([p.expand(samples, -1, -1, -1), c], 2)
            for p, c in zip(shared, cache, strict=True)
        ]

        def reference(q, k, v, *prefix):
            pairs = zip(prefix, (k, v), strict=True)
            return _sdpa(q, *(torch.cat([p.expand(len(q), -1, -1, -1), c], 2) for p, c in pairs))

        yield Case(
            "decode",
            f"N{samples} samples, prefix {prefix}, own {own}, H{heads}/{kv_heads} D{dim}",
            {
                "ponder": ours,
                "sdpa over expanded caches": lambda q, *rest, whole=whole: _sdpa(q, *whole),
            },
            [q, *cache, *shared],
            reference,
            modes=("forward",),
            nbytes={"forward": sum(x.nbytes for x in (*cache, *shared))},
        )
