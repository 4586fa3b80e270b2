"""Every kernel once, forward and backward, on shapes with remainders: work for a memory checker.

`compute-sanitizer --tool memcheck python -m ponder.benchmarks.every_kernel`, or racecheck or
initcheck. Small, as a checker makes a kernel tens of times slower; what it computes is the tests'
matter.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from ponder import kernels
from ponder.benchmarks.measure import DEVICE, synchronize

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def calls(dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """(name, output) of each function that has a gradient."""

    def tensor(*shape: int) -> Tensor:
        return torch.randn(shape, device=DEVICE, dtype=dtype, requires_grad=True)

    for head_dim, causal in ((64, True), (80, False), (128, True)):
        q, k, v = (
            tensor(2, 4, 197, head_dim),
            tensor(2, 2, 197, head_dim),
            tensor(2, 2, 197, head_dim),
        )
        yield f"attention {head_dim}", kernels.attention(q, k, v, causal=causal)
    x, w_gate, w_up, w_down = tensor(70, 48), tensor(136, 48), tensor(136, 48), tensor(48, 136)
    for activation in ("silu", "gelu", "relu", "relu2"):
        yield (
            f"gated_mlp {activation}",
            kernels.gated_mlp(x, w_gate, w_up, w_down, activation=activation),
        )
        yield f"mlp {activation}", kernels.mlp(x, w_up, w_down, activation=activation)
    yield "rms_norm", kernels.rms_norm(x, tensor(48))
    yield "rms_norm and residual", sum(kernels.rms_norm(x, tensor(48), residual=tensor(70, 48)))
    angles = torch.randn(33, 16, device=DEVICE)
    turned = kernels.rotary(tensor(2, 4, 33, 32), tensor(2, 2, 33, 32), angles.cos(), angles.sin())
    yield "rotary", turned[0].sum() + turned[1].sum()
    targets = torch.randint(1000, (70,), device=DEVICE)
    yield "linear_cross_entropy", kernels.linear_cross_entropy(x, tensor(1000, 48), targets)
    yield "cross_entropy", kernels.cross_entropy(tensor(70, 1000), targets)


@torch.no_grad()
def without_gradient(dtype: torch.dtype) -> None:
    """The functions of inference."""
    q = torch.randn(3, 4, 2, 64, device=DEVICE, dtype=dtype)
    cache = torch.randn(2, 3, 2, 700, 64, device=DEVICE, dtype=dtype)
    lengths = torch.tensor([2, 129, 700], device=DEVICE)
    kernels.decode_attention(q, *cache, lengths)
    logits = torch.randn(5, 1003, device=DEVICE, dtype=dtype)
    numbers = torch.arange(5, device=DEVICE)
    kernels.sample_tokens(
        logits, temperature=0.8, top_k=50, top_p=0.9, min_p=0.01, seeds=numbers, positions=numbers
    )


def main() -> None:
    for dtype in DTYPES:
        for name, output in calls(dtype):
            output.float().square().sum().backward()
            synchronize()
            print(f"{name} {dtype}", flush=True)
        without_gradient(dtype)
        synchronize()
        print(f"decode_attention, sample_tokens {dtype}", flush=True)


if __name__ == "__main__":
    main()
