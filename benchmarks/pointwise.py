"""What memory limits: norms, rotary, softmax, cross-entropy. The ceiling is a copy's bytes/s.

Bytes are the least that must move: each input read and each output written once in the forward
pass, and in the backward pass what it cannot do without read again. On a CPU a tensor has 16 to 26
MB: a larger one gets its memory anew, page by page, at every call, whoever computes it.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ponder import kernels
from ponder.benchmarks.comparison import Case, Setting, compiled, peer
from ponder.benchmarks.measure import DEVICE

LIGER = "liger_kernel.transformers.functional"


def _case(
    name: str,
    ours: Callable,
    eager: Callable,
    liger: Callable | None,
    inputs: list[Tensor],
    passes: tuple[int, int],
    setting: Setting,
) -> Case:
    """passes: how often the first input's bytes move in the forward, and in the backward pass."""
    implementations = {"ponder": ours, "eager": eager}
    if not setting.smoke:
        implementations["torch.compile"] = compiled(eager)
    if liger:
        implementations["liger"] = liger
    forward, backward = (count * inputs[0].nbytes for count in passes)
    return Case(
        "pointwise",
        name,
        implementations,
        inputs,
        eager,
        nbytes={"forward": forward, "forward+backward": forward + backward},
    )


def cases(setting: Setting) -> Iterator[Case]:
    yield from _norms(setting)
    yield from _rotary(setting)
    yield from _rows(setting)


def _norms(setting: Setting) -> Iterator[Case]:
    tensor = setting.tensor
    rms, layer = peer(LIGER, "liger_rms_norm"), peer(LIGER, "liger_layer_norm")
    added = peer(LIGER, "liger_fused_add_rms_norm")
    gpu = [(65536, width) for width in (768, 2048, 4096)]
    for tokens, width in setting.of([(64, 96)], [(16384, 256), (4096, 1024)], gpu):
        x, residual, weight, bias = (
            tensor(tokens, width),
            tensor(tokens, width),
            tensor(width),
            tensor(width),
        )
        shape = f"M{tokens} C{width}"
        yield _case(
            f"rms_norm {shape}",
            kernels.rms_norm,
            lambda x, w: F.rms_norm(x, w.shape, w, 1e-6),
            rms and (lambda x, w: rms(x, w, 1e-6)),
            [x, weight],
            (2, 3),  # y = f(x); dx = f(x, dy)
            setting,
        )

        def eager(x, r, w):
            h = x + r
            return F.rms_norm(h, w.shape, w, 1e-6), h

        yield _case(
            f"rms_norm with residual {shape}",
            lambda x, r, w: kernels.rms_norm(x, w, residual=r),
            eager,
            added and (lambda x, r, w: added(x, r, w, 1e-6)),
            [x, residual, weight],
            (4, 4),  # y, h = f(x, r); dx = dr = f(h, dy, dh)
            setting,
        )
        yield _case(
            f"layer_norm {shape}",
            kernels.layer_norm,
            lambda x, w, b: F.layer_norm(x, w.shape, w, b),
            layer and (lambda x, w, b: layer(x, w, b, 1e-5)),
            [x, weight, bias],
            (2, 3),
            setting,
        )


def _rotary(setting: Setting) -> Iterator[Case]:
    tensor = setting.tensor
    batch, heads, length, dim = setting.of((1, 2, 64, 32), (8, 8, 1024, 64), (8, 16, 4096, 128))
    liger, liger_norm = peer(LIGER, "liger_rope"), peer(LIGER, "liger_rms_norm")
    # As a model has them: (B, T, H, D) in memory.
    q, k = (tensor(batch, length, heads, dim).detach().transpose(1, 2) for _ in range(2))
    q, k, weights = q.requires_grad_(), k.requires_grad_(), [tensor(dim), tensor(dim)]
    angle = torch.outer(
        torch.arange(length, device=DEVICE), 1e4 ** -torch.linspace(0, 1, dim // 2, device=DEVICE)
    )
    cos, sin = angle.cos(), angle.sin()
    wide_cos, wide_sin = (torch.cat((x, x), -1)[None] for x in (cos, sin))

    def eager(q, k):
        def turn(x):
            a, b = x.chunk(2, -1)
            half = torch.cat((-b, a), -1)
            return (x * wide_cos[:, None] + half * wide_sin[:, None]).to(x.dtype)

        return turn(q), turn(k)

    def after_norms(turn: Callable, norm: Callable) -> Callable:
        def call(q, k, *weights):
            # In memory's order: Liger would copy another.
            heads = (norm(x.transpose(1, 2), w) for x, w in zip((q, k), weights, strict=True))
            return turn(*(x.transpose(1, 2) for x in heads))

        return call

    shape = f"B{batch} H{heads} T{length} D{dim}"
    yield _case(
        f"rotary {shape}",
        lambda q, k: kernels.rotary(q, k, cos, sin),
        eager,
        liger and (lambda q, k: liger(q, k, wide_cos, wide_sin)),
        [q, k],
        (4, 4),  # q and k, read and written
        setting,
    )
    yield _case(
        f"rotary with QK-norm {shape}",
        lambda q, k, a, b: kernels.rotary(q, k, cos, sin, q_norm=a, k_norm=b),
        after_norms(eager, lambda x, w: F.rms_norm(x, w.shape, w, 1e-6)),
        liger
        and liger_norm
        and after_norms(
            lambda q, k: liger(q, k, wide_cos, wide_sin), lambda x, w: liger_norm(x, w, 1e-6)
        ),
        [q, k, *weights],
        (4, 6),  # dx = f(x, dy)
        setting,
    )


def _rows(setting: Setting) -> Iterator[Case]:
    softmax = peer(LIGER, "liger_softmax")
    loss = peer(LIGER, "liger_cross_entropy")
    gpu = (65536, 1024), (8192, 32768)
    for rows, width in setting.of(((16, 100),), ((4096, 1024), (128, 32768)), gpu):
        yield _case(
            f"softmax M{rows} C{width}",
            kernels.softmax,
            lambda x: torch.softmax(x, -1),
            softmax,
            [setting.tensor(rows, width)],
            (2, 3),  # y = f(x); dx = f(y, dy)
            setting,
        )
    gpu = (8192, 50304), (4096, 131072)
    for rows, width in setting.of(((16, 100),), ((512, 8192), (128, 50304)), gpu):
        targets = torch.randint(width, (rows,), device=DEVICE)
        yield _case(
            f"cross_entropy M{rows} V{width}",
            lambda x, t=targets: kernels.cross_entropy(x, t),
            lambda x, t=targets: F.cross_entropy(x.float(), t),
            loss and (lambda x, t=targets: loss(x, t)),
            [setting.tensor(rows, width)],
            (1, 2),  # loss = f(x); dx = f(x)
            setting,
        )
