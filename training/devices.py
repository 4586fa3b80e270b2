"""What the planner knows of hardware: dense peaks, bandwidths and memory by the makers' sheets."""

import functools
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..models.memory import GIB

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Device:
    """One accelerator and how it is joined to others. FLOP/s without sparsity, bytes, bytes/s."""

    name: str
    peak: dict[str, float]
    """by precision; a precision that is not there, the device does not have"""
    bandwidth: float
    """of its own memory"""
    memory: float
    """that programs see"""
    link: float
    """to the others of its node, one way"""
    per_node: int = 8
    network: float = 50e9
    """to other nodes, one way, for each device"""
    matrix_efficiency: float = 0.65
    """of the peak, in a model's matrix products: a common figure, not yet measured here; a CPU's
    peak is itself measured in products"""
    stream_efficiency: float = 0.8
    """of the bandwidth, likewise"""
    gpu: bool = True
    """runs the Triton kernels"""


def _gpu(name, bf16, fp32, bandwidth, gib, link, *, fp16=None, **options) -> Device:
    # fp32 without TF32: neither PyTorch's products nor the kernels' take it unless asked.
    peak = {"fp16": (fp16 or bf16) * 1e12, "fp32": fp32 * 1e12}
    if bf16:
        peak["bf16"] = bf16 * 1e12
    return Device(name, peak, bandwidth * 1e12, gib * GIB, link * 1e9, **options)


DEVICES = {
    "b200": _gpu("B200", 2250, 75, 8.0, 178, 900),
    "h200": _gpu("H200", 989, 67, 4.8, 140, 450),
    "h100": _gpu("H100", 989, 67, 3.35, 79, 450),
    "a100": _gpu("A100", 312, 19.5, 2.04, 79, 300),
    "a100-40": _gpu("A100 40 GB", 312, 19.5, 1.555, 39, 300),
    "l40s": _gpu("L40S", 362, 91.6, 0.864, 44, 25),
    "l4": _gpu("L4", 121, 30.3, 0.3, 22, 12),
    "a10": _gpu("A10", 125, 31.2, 0.6, 22, 25),
    "rtx4090": _gpu("RTX 4090", 165, 82.6, 1.008, 23.5, 25),
    "rtx3090": _gpu("RTX 3090", 71, 35.6, 0.936, 23.5, 25),
    "t4": _gpu("T4", 0, 8.1, 0.32, 14.5, 12, fp16=65),
}


def called(name: str) -> Device | None:
    """The device that a driver calls so, as in "NVIDIA H100 80GB HBM3"; None for one unknown."""
    found = [d for d in DEVICES.values() if re.search(rf"\b{d.name}\b", name, re.IGNORECASE)]
    return max(found, key=lambda d: len(d.name), default=None)


def device(name: str) -> Device:
    """The device of that name ("H100", "rtx 4090", "cpu"), or that a driver calls so; ValueError
    names the known ones."""
    key = re.sub(r"[\s_]", "", name.lower())
    if key == "cpu":
        return this_cpu()
    found = DEVICES.get(key) or called(name)
    if found is None:
        raise ValueError(f"no device is named {name!r}; known are {', '.join(DEVICES)} and cpu")
    return found


def load() -> float:
    """Programs that wanted a core in the last minute, for each core of this machine; 0 where the
    system does not tell."""
    return os.getloadavg()[0] / (os.cpu_count() or 1) if hasattr(os, "getloadavg") else 0.0


def _least(work: Callable[[], object], seconds: float) -> float:
    """The fastest in so many seconds: whatever else the machine does only adds."""
    times, begin = [], time.perf_counter()
    while len(times) < 3 or time.perf_counter() - begin < seconds:
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def products_on_cpu(dtype: "torch.dtype") -> float:
    """FLOP/s of products of 1024 × 1024, in half a second. Some CPUs need seconds for one in bf16,
    and a small one tells it; but beside other programs a small one may take long in any dtype."""
    import torch

    small, large = (torch.randn(n, n, dtype=dtype, device="cpu") for n in (256, 1024))
    if dtype == torch.bfloat16:
        slow = 2 * 256**3 / _least(lambda: small @ small, 0.1)
        if slow < 2e9:
            return slow
    return 2 * 1024**3 / _least(lambda: large @ large, 0.5)


@functools.cache
def this_cpu() -> Device:
    """This machine without a GPU, measured in seconds: products and a copy."""
    import torch

    from ..provenance import machine

    peak = {"fp32": 0.0, "bf16": 0.0}
    for _ in range(2):  # a process that has just begun may be slow for a while
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            peak[name] = max(peak[name], products_on_cpu(dtype))
    x = torch.empty(2**24, dtype=torch.float32, device="cpu")
    y = torch.empty_like(x)
    bandwidth = 2 * 4 * len(x) / _least(lambda: y.copy_(x), 0.5)
    facts = machine()
    return Device(
        name=f"{facts['processor']}, {facts['cores']} cores",
        peak=peak,
        bandwidth=bandwidth,
        memory=facts.get("memory_gib", 8.0) * GIB,
        link=bandwidth,
        per_node=1,
        gpu=False,
        matrix_efficiency=1.0,
        stream_efficiency=0.5,
    )
