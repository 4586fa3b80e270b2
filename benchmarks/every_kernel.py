"""Every kernel once, forward and backward, on shapes with remainders: work for a memory checker.

`PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python -m
ponder.benchmarks.every_kernel [DTYPE ...]`, or racecheck. (PyTorch's allocator hands out parts of
large blocks, and a checker sees no step from one part into the next.) Small, as a checker makes a
kernel tens of times slower; what it computes is the tests' matter. With PONDER_TILES the kernels of
that file are among them.
"""

import sys
from collections.abc import Iterator

import torch
from torch import Tensor

from ponder import kernels
from ponder.benchmarks.measure import DEVICE, synchronize

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def calls(dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """(name, output) of each function that has a gradient."""

    def tensor(*shape: int) -> Tensor:
        return torch.randn(shape, device=DEVICE, dtype=dtype, requires_grad=True)

    def attention(head_dim: int, **options) -> Tensor:
        q, k = tensor(2, 4, 197, head_dim), tensor(2, 2, 197, head_dim)
        return kernels.attention(q, k, tensor(2, 2, 197, head_dim), **options)

    for head_dim in (32, 64, 80, 128, 256):
        yield f"attention {head_dim}", attention(head_dim, causal=head_dim != 80)
    for head_dim in (64, 128):  # the lengths that the kernels for Hopper take
        q, k, v = (tensor(2, 2, 196, head_dim) for _ in range(3))
        yield f"attention {head_dim}, two passes", kernels.attention(q, k, v)
        once = kernels.attention(q, k, v, deterministic=False)
        yield f"attention {head_dim}, one pass", once
    documents = torch.arange(197, device=DEVICE).expand(2, -1) // 50
    options = dict(window=70, segment_ids=documents, softcap=20.0, sinks=tensor(4))
    slopes = torch.rand(4, device=DEVICE)
    out, lse = attention(64, **options, alibi_slopes=slopes, return_lse=True)
    yield "attention with every option", out.float().sum() + lse.exp().sum()
    x, w_gate, w_up, w_down = tensor(70, 48), tensor(136, 48), tensor(136, 48), tensor(48, 136)
    for activation in ("silu", "gelu", "gelu_tanh", "relu", "relu2", "sigmoid", "tanh", "identity"):
        gated = kernels.gated_mlp(x, w_gate, w_up, w_down, activation=activation)
        plain = kernels.mlp(x, w_up, w_down, activation=activation, b_up=tensor(136))
        yield f"gated_mlp and mlp {activation}", gated + plain
    conv1d = tensor(48, 136).t(), tensor(48, 136).t(), tensor(136, 48).t()
    yield "gated_mlp, Conv1D's layout, recomputed", kernels.gated_mlp(x, *conv1d, recompute=True)
    for norm in (kernels.rms_norm, kernels.layer_norm):
        yield norm.__name__, norm(x, tensor(48))
        y, h = norm(x, tensor(48), tensor(48), residual=tensor(70, 48))
        yield f"{norm.__name__} with bias and residual", y + h
    angles = torch.randn(33, 16, device=DEVICE)
    turned = kernels.rotary(tensor(2, 4, 33, 32), tensor(2, 2, 33, 32), angles.cos(), angles.sin())
    yield "rotary", turned[0].sum() + turned[1].sum()
    targets = torch.randint(1000, (70,), device=DEVICE)
    for extra in ({}, dict(label_smoothing=0.1, z_loss=1e-4, softcap=30.0)):
        loss = kernels.linear_cross_entropy(x, tensor(1000, 48), targets, **extra)
        loss += kernels.cross_entropy(tensor(70, 1000), targets, **extra)
        yield f"linear_cross_entropy and cross_entropy {' '.join(extra)}", loss
    yield "softmax", kernels.softmax(tensor(7, 1003)) + kernels.softmax(tensor(7, 9001)).sum()
    yield "mse_loss", kernels.mse_loss(tensor(70, 48), tensor(70, 48))


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


def main() -> None:
    for dtype in [DTYPES[name] for name in sys.argv[1:] or DTYPES]:
        for name, output in calls(dtype):
            output.float().square().sum().backward()
            synchronize()
            print(f"{name} {dtype}", flush=True)
        without_gradient(dtype)
        synchronize()
        print(f"decode_attention, sample_tokens {dtype}", flush=True)


if __name__ == "__main__":
    main()
