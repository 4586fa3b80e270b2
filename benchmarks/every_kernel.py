"""Every kernel once, forward and backward, on shapes with remainders: work for a memory checker.

`PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python -m
ponder.benchmarks.every_kernel [DTYPE ...]`, or racecheck. (PyTorch's allocator hands out parts of
large blocks, and a checker sees no step from one part into the next.) Small, as a checker makes a
kernel tens of times slower; what it computes is the tests' matter. With PONDER_TILES the kernels of
that file are among them. `--processes N` shares them out among N processes, for the sake of what
compiles them: a core each.
"""

import argparse
import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ponder import kernels
from ponder.benchmarks.measure import DEVICE, side_by_side, synchronize

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def calls(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """(name, its output) of each function that has a gradient; to be called before the next."""

    def tensor(*shape: int) -> Tensor:
        return torch.randn(shape, device=DEVICE, dtype=dtype, requires_grad=True)

    def attention(head_dim: int, **options) -> Tensor:
        q, k = tensor(2, 4, 197, head_dim), tensor(2, 2, 197, head_dim)
        return kernels.attention(q, k, tensor(2, 2, 197, head_dim), **options)

    for head_dim in (32, 64, 80, 128, 256):
        yield f"attention {head_dim}", lambda: attention(head_dim, causal=head_dim != 80)

    def hopper(head_dim: int, deterministic: bool) -> Tensor:  # lengths that its kernels take
        q, k, v = (tensor(2, 2, 196, head_dim) for _ in range(3))
        return kernels.attention(q, k, v, deterministic=deterministic)

    for head_dim in (64, 128):
        yield f"attention {head_dim}, two passes", lambda: hopper(head_dim, True)
        yield f"attention {head_dim}, one pass", lambda: hopper(head_dim, False)

    def every_option() -> Tensor:
        documents = torch.arange(197, device=DEVICE).expand(2, -1) // 50
        options = dict(window=70, segment_ids=documents, softcap=20.0, sinks=tensor(4))
        slopes = torch.rand(4, device=DEVICE)
        out, lse = attention(64, **options, alibi_slopes=slopes, return_lse=True)
        return out.float().sum() + lse.exp().sum()

    yield "attention with every option", every_option

    def mlps(rows: int, width: int, inner: int, activation: str) -> Tensor:
        x, w_gate, w_up, w_down = (
            tensor(*shape) for shape in ((rows, width), *[(inner, width)] * 2, (width, inner))
        )
        gated = kernels.gated_mlp(x, w_gate, w_up, w_down, activation=activation)
        return gated + kernels.mlp(x, w_up, w_down, activation=activation, b_up=tensor(inner))

    for activation in ("silu", "gelu", "gelu_tanh", "relu", "relu2", "sigmoid", "tanh", "identity"):
        yield f"mlp {activation}", lambda: mlps(70, 48, 136, activation)
    # On 132 processors: the widest tiles, by TMA, and those between.
    for inner in (2056, 1792):
        yield f"mlp silu, {inner} units", lambda: mlps(1030, 64, inner, "silu")

    def recomputed() -> Tensor:
        conv1d = tensor(48, 136).t(), tensor(48, 136).t(), tensor(136, 48).t()
        return kernels.gated_mlp(tensor(70, 48), *conv1d, recompute=True)

    yield "gated_mlp, Conv1D's layout, recomputed", recomputed

    def added(norm: Callable) -> Tensor:
        y, h = norm(tensor(70, 48), tensor(48), tensor(48), residual=tensor(70, 48))
        return y + h

    for norm in (kernels.rms_norm, kernels.layer_norm):
        yield norm.__name__, lambda: norm(tensor(70, 48), tensor(48))
        yield f"{norm.__name__} with bias and residual", lambda: added(norm)

    def rotary(**norms: Tensor) -> Tensor:
        angles = torch.randn(33, 16, device=DEVICE)
        q, k = tensor(2, 4, 33, 32), tensor(2, 2, 33, 32)
        turned = kernels.rotary(q, k, angles.cos(), angles.sin(), **norms)
        return turned[0].sum() + turned[1].sum()

    yield "rotary", rotary
    yield "rotary with QK-norm", lambda: rotary(q_norm=tensor(32), k_norm=tensor(32))

    def losses(**extra) -> Tensor:
        targets = torch.randint(1000, (70,), device=DEVICE)
        loss = kernels.linear_cross_entropy(tensor(70, 48), tensor(1000, 48), targets, **extra)
        return loss + kernels.cross_entropy(tensor(70, 1000), targets, **extra)

    for extra in ({}, dict(label_smoothing=0.1, z_loss=1e-4, softcap=30.0)):
        name = " ".join(["linear_cross_entropy and cross_entropy", *extra])
        yield name, lambda: losses(**extra)
    rows = ((7, 1003), (7, 9001))
    yield "softmax", lambda: sum(kernels.softmax(tensor(*shape)).square().sum() for shape in rows)
    yield "mse_loss", lambda: kernels.mse_loss(tensor(70, 48), tensor(70, 48))


@torch.no_grad()
def without_gradient(dtype: torch.dtype) -> None:
    """The functions of inference."""

    def tensor(*shape: int) -> Tensor:
        return torch.randn(shape, device=DEVICE, dtype=dtype)

    q, lengths = tensor(4, 4, 2, 64), torch.tensor([2, 129, 700, 31], device=DEVICE)
    cache = tensor(4, 2, 704, 64), tensor(4, 2, 704, 64)
    kernels.decode_attention(q, *cache, lengths)
    prefix = tensor(2, 2, 600, 64), tensor(2, 2, 600, 64)
    options = dict(window=400, softcap=20.0, sinks=tensor(4))
    kernels.decode_attention(q, *cache, lengths, prefix=prefix, **options)
    pages = torch.randperm(4 * 44, device=DEVICE).int().view(4, 44)
    paged = tensor(176, 2, 16, 64), tensor(176, 2, 16, 64)
    kernels.decode_attention(q, *paged, lengths, block_table=pages)
    numbers = torch.arange(5, device=DEVICE)
    filters = dict(temperature=0.8, top_k=50, top_p=0.9, min_p=0.01)
    kernels.sample_tokens(tensor(5, 1003), **filters, seeds=numbers, positions=numbers)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("dtypes", nargs="*", default=list(DTYPES), metavar="DTYPE")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--part", type=int, help="what this one of the processes does")
    args = parser.parse_args()
    if args.processes > 1 and args.part is None:
        return side_by_side("ponder.benchmarks.every_kernel", args.processes)
    for dtype in [DTYPES[name] for name in args.dtypes]:
        for i, (name, call) in enumerate(calls(dtype)):
            if args.part in (None, i % args.processes):
                call().float().square().sum().backward()
                synchronize()
                print(f"{name} {dtype}", flush=True)
        if args.part in (None, args.processes - 1):
            without_gradient(dtype)
            synchronize()
            print(f"decode_attention, sample_tokens {dtype}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
