"""What a call costs before the device works: many calls on tiny tensors, divided by their number.

A row's milliseconds are those of one call. Python's part shows where the kernel itself is shorter.
"""

import time
from collections.abc import Callable, Collection, Iterator

import torch
import torch.nn.functional as F

from ponder import kernels
from ponder.benchmarks.comparison import Setting
from ponder.benchmarks.measure import DEVICE, Row, left_out_if_it_fails, row, synchronize

CALLS = 200


def _microseconds(work: Callable[[], object], repeats: int) -> list[float]:
    """Of one call, in each of so many series."""
    work()
    found = []
    for _ in range(repeats):
        synchronize()
        start = time.perf_counter()
        for _ in range(CALLS):
            work()
        found.append(1e6 * (time.perf_counter() - start) / CALLS)
        synchronize()
    return found


def _pairs() -> Iterator[tuple[str, Callable, Callable]]:
    tensor = Setting().tensor
    x, w, inner, down = tensor(8, 64), tensor(64), tensor(128, 64), tensor(64, 128)
    q = tensor(1, 2, 16, 64)
    targets = torch.arange(8, device=DEVICE)
    yield "rms_norm", lambda: kernels.rms_norm(x, w), lambda: F.rms_norm(x, w.shape, w)
    yield "softmax", lambda: kernels.softmax(x), lambda: torch.softmax(x, -1)
    yield (
        "attention",
        lambda: kernels.attention(q, q, q),
        lambda: F.scaled_dot_product_attention(q, q, q, is_causal=True),
    )
    yield (
        "mlp",
        lambda: kernels.mlp(x, inner, down, activation="relu2"),
        lambda: F.linear(F.relu(F.linear(x, inner)).square(), down),
    )
    yield (
        "cross_entropy",
        lambda: kernels.cross_entropy(x, targets),
        lambda: F.cross_entropy(x, targets),
    )


def run(
    smoke: bool, only: str = "", there: Collection[tuple[str, str, str]] = ()
) -> Iterator[list[Row]]:
    """The rows of each case that is not `there`: (benchmark, case, dtype)."""
    for name, ours, eager in _pairs():
        for gradient in (False, True):
            case = f"{name} call, {'with' if gradient else 'without'} gradient"
            if only not in case or ("overhead", case, "bf16") in there:
                continue
            rows = []
            for implementation, call in (("ponder", ours), ("eager", eager)):

                def work(call=call, gradient=gradient):
                    with torch.set_grad_enabled(gradient):
                        return call()

                with left_out_if_it_fails(f"overhead {case}", implementation):
                    times = [t / 1e3 for t in _microseconds(work, 3 if smoke else 20)]
                    rows.append(found := row("overhead", case, "bf16", implementation, times))
                    text = f"{implementation:24} {1e3 * found.ms_p50:8.1f} µs"
                    print(f"overhead     {case:40} bf16  {text}")
            yield rows
