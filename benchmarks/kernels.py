"""Every kernel against the fastest that a user could choose instead, on a GPU.

`python -m ponder.benchmarks.kernels [attention mlp loss norm decode]`. Peers: PyTorch's own
operations (each backend of scaled_dot_product_attention by itself), torch.compile of the plain
expression, FlexAttention, and Liger where it is installed. Errors are against fp64 on a slice, or
fp32 where fp64 would take minutes. On a machine without a GPU there is nothing to compare: the
functions are PyTorch's own there.
"""

import sys
from collections.abc import Callable, Iterator
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ponder import kernels
from ponder.benchmarks.measure import DEVICE, Row, milliseconds, rows, write

BF16 = torch.bfloat16


@cache
def matmul_ceiling() -> float:
    """bf16 FLOP/s of torch's own large matrix product, measured now."""
    n = 8192
    a, b = (torch.randn(n, n, device=DEVICE, dtype=BF16) for _ in range(2))
    times = milliseconds({"matmul": lambda: a @ b}, repeats=20)["matmul"]
    return 2 * n**3 / (sorted(times)[10] / 1e3)


@cache
def copy_ceiling() -> float:
    """Bytes/s of a large device-to-device copy, reads and writes both counted, measured now."""
    a = torch.randn(1 << 28, device=DEVICE)
    b = torch.empty_like(a)
    times = milliseconds({"copy": lambda: b.copy_(a)}, repeats=20)["copy"]
    return 2 * a.nbytes / (sorted(times)[10] / 1e3)


def relative(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def forward_backward(f: Callable[..., Tensor], inputs: list[Tensor]) -> Callable[[], None]:
    """A call of f and of its backward with a fixed upstream gradient."""
    upstream = torch.randn_like(f(*inputs))

    def work() -> None:
        torch.autograd.grad(f(*inputs), inputs, upstream)

    return work


def attention() -> Iterator[Row]:
    shapes = [(32768 // t, t) for t in (1024, 2048, 4096, 8192, 16384)]
    for dim in (64, 128):
        heads = 2048 // dim
        for causal in (True, False):
            for batch, length in shapes:
                shape = (batch, heads, length, dim)
                q, k, v = (
                    torch.randn(shape, device=DEVICE, dtype=BF16, requires_grad=True)
                    for _ in range(3)
                )

                def sdpa(backend):
                    def call(q, k, v, backend=backend, causal=causal):
                        with sdpa_kernel(backend):
                            return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

                    return call

                peers = {
                    "ponder": lambda q, k, v, c=causal: kernels.attention(q, k, v, causal=c),
                    "sdpa flash": sdpa(SDPBackend.FLASH_ATTENTION),
                    "sdpa cudnn": sdpa(SDPBackend.CUDNN_ATTENTION),
                    "flex_attention": _flex(causal, length),
                }
                with torch.no_grad():
                    part = [x[:1, :1] for x in (q, k, v)]
                    truth = F.scaled_dot_product_attention(
                        *(x.double() for x in part), is_causal=causal
                    )
                    errors = {n: relative(f(q, k, v)[:1, :1], truth) for n, f in peers.items()}
                flops = 4 * batch * heads * length * length * dim * (0.5 if causal else 1.0)
                name = f"B{batch} H{heads} T{length} D{dim} {'causal' if causal else 'full'}"
                for mode, factor in (("forward", 1.0), ("forward+backward", 3.5)):
                    if mode == "forward":
                        works = {n: _quiet(lambda f=f: f(q, k, v)) for n, f in peers.items()}
                    else:
                        works = {n: forward_backward(f, [q, k, v]) for n, f in peers.items()}
                    yield from rows(
                        "attention",
                        f"{name} {mode}",
                        "bf16",
                        works,
                        flops=factor * flops,
                        ceiling=matmul_ceiling(),
                        errors=errors,
                        allowed=1e-2,
                    )


@cache
def _compiled_flex():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


@cache
def _flex(causal: bool, length: int):
    from torch.nn.attention.flex_attention import create_block_mask

    mask = None
    if causal:
        mask = create_block_mask(
            lambda b, h, i, j: i >= j, None, None, length, length, device=DEVICE
        )
    return lambda q, k, v: _compiled_flex()(q, k, v, block_mask=mask)


def _quiet(f: Callable[[], object]) -> Callable[[], object]:
    def work() -> None:
        with torch.no_grad():
            f()

    return work


def mlp() -> Iterator[Row]:
    def eager_gated(x, g, u, d):
        return F.linear(F.silu(F.linear(x, g)) * F.linear(x, u), d)

    def eager_relu2(x, u, d):
        return F.linear(F.relu(F.linear(x, u)).square(), d)

    for width in (768, 1024, 2048, 4096):
        for tokens in (8192, 65536):
            for gated in (True, False):
                inner = width * 8 // 3 // 128 * 128 if gated else 4 * width
                sizes = [(tokens, width), (inner, width), (width, inner)]
                if gated:
                    sizes.insert(1, (inner, width))
                inputs = [torch.randn(s, device=DEVICE, dtype=BF16) / s[-1] ** 0.5 for s in sizes]
                inputs = [x.requires_grad_() for x in inputs]
                eager = eager_gated if gated else eager_relu2
                if gated:
                    ours = kernels.gated_mlp
                else:

                    def ours(x, u, d):
                        return kernels.mlp(x, u, d, activation="relu2")

                peers = {
                    "ponder": ours,
                    "eager": eager,
                    "torch.compile": torch.compile(eager, mode="max-autotune-no-cudagraphs"),
                }
                with torch.no_grad():
                    part = [inputs[0][:256], *inputs[1:]]
                    truth = eager(*(x.double() for x in part))
                    errors = {n: relative(f(*part), truth) for n, f in peers.items()}
                matrices = (3 if gated else 2) * width * inner
                kind = "gated silu" if gated else "relu2"
                yield from rows(
                    "mlp",
                    f"{kind} M{tokens} C{width} F{inner} forward+backward",
                    "bf16",
                    {n: forward_backward(f, inputs) for n, f in peers.items()},
                    flops=6 * tokens * matrices,
                    ceiling=matmul_ceiling(),
                    errors=errors,
                    allowed=2e-2,
                )


def loss() -> Iterator[Row]:
    tokens, width = 32768, 768
    for vocabulary in (50304, 131072):
        x = torch.randn(tokens, width, device=DEVICE, dtype=BF16, requires_grad=True)
        w = torch.randn(vocabulary, width, device=DEVICE, dtype=BF16) / width**0.5
        w.requires_grad_()
        t = torch.randint(vocabulary, (tokens,), device=DEVICE)

        def eager(x, w, t=t):
            return F.cross_entropy(F.linear(x, w).float(), t)

        peers = {
            "ponder": lambda x, w, t=t: kernels.linear_cross_entropy(x, w, t),
            "eager": eager,
            "torch.compile": torch.compile(eager),
        }
        if hasattr(F, "linear_cross_entropy"):
            peers["torch linear_cross_entropy"] = lambda x, w, t=t: F.linear_cross_entropy(x, w, t)
        try:
            from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

            liger = LigerFusedLinearCrossEntropyLoss()
            peers["liger"] = lambda x, w, t=t: liger(w, x, t)
        except ImportError:
            pass
        with torch.no_grad():
            truth = eager(x.float(), w.float())
            errors = {n: relative(f(x, w), truth) for n, f in peers.items()}
        yield from rows(
            "loss",
            f"linear_cross_entropy M{tokens} C{width} V{vocabulary} forward+backward",
            "bf16",
            {n: forward_backward(f, [x, w]) for n, f in peers.items()},
            flops=6 * tokens * width * vocabulary,
            ceiling=matmul_ceiling(),
            errors=errors,
            allowed=1e-3,
        )


def norm() -> Iterator[Row]:
    tokens = 65536
    for width in (768, 2048, 4096):
        x = torch.randn(tokens, width, device=DEVICE, dtype=BF16, requires_grad=True)
        w = torch.ones(width, device=DEVICE, dtype=BF16, requires_grad=True)

        def eager(x, w):
            return F.rms_norm(x, w.shape, w, 1e-6)

        peers = {
            "ponder": lambda x, w: kernels.rms_norm(x, w),
            "eager": eager,
            "torch.compile": torch.compile(eager),
        }
        with torch.no_grad():
            truth = eager(x.double(), w.double())
            errors = {n: relative(f(x, w), truth) for n, f in peers.items()}
        for mode, passes in (("forward", 2), ("forward+backward", 5)):
            if mode == "forward":
                works = {n: _quiet(lambda f=f: f(x, w)) for n, f in peers.items()}
            else:
                works = {n: forward_backward(f, [x, w]) for n, f in peers.items()}
            yield from rows(
                "norm",
                f"rms_norm M{tokens} C{width} {mode}",
                "bf16",
                works,
                nbytes=passes * x.nbytes,
                ceiling=copy_ceiling(),
                errors=errors,
                allowed=1e-2,
            )


def decode() -> Iterator[Row]:
    heads, kv_heads, dim = 32, 8, 128
    for batch, length in ((1, 8192), (64, 2048), (256, 1024)):
        q = torch.randn(batch, heads, 1, dim, device=DEVICE, dtype=BF16)
        k, v = (
            torch.randn(batch, kv_heads, length, dim, device=DEVICE, dtype=BF16) for _ in range(2)
        )
        lengths = torch.full((batch,), length, device=DEVICE)

        def sdpa(q, k, v):
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

        peers = {
            "ponder": lambda q, k, v, n=lengths: kernels.decode_attention(q, k, v, n),
            "sdpa": sdpa,
        }
        truth = sdpa(*(x.double() for x in (q, k, v)))
        yield from rows(
            "decode",
            f"B{batch} H{heads}/{kv_heads} S{length} D{dim}",
            "bf16",
            {n: _quiet(lambda f=f: f(q, k, v)) for n, f in peers.items()},
            nbytes=k.nbytes + v.nbytes,
            ceiling=copy_ceiling(),
            errors={n: relative(f(q, k, v), truth) for n, f in peers.items()},
            allowed=1e-2,
        )


GROUPS = {f.__name__: f for f in (attention, mlp, loss, norm, decode)}


def run(groups: list[str] | None = None) -> list[Row]:
    if DEVICE != "cuda":
        print("kernels: no GPU here, so there is nothing to compare")
        return []
    return [row for name in groups or GROUPS for row in GROUPS[name]()]


if __name__ == "__main__":
    for group in sys.argv[1:] or GROUPS:
        write(run([group]))
