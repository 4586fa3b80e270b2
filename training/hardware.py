"""What the machine at hand can do: peak rates, and whether bf16 pays on it."""

import functools
import os
import shutil
import time

import torch
from torch import nn

from .devices import called, products_on_cpu

PRECISION = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@functools.cache
def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of matrix products: a GPU's data sheet where known, else measured in a moment."""
    if device.type == "cuda":
        known = called(torch.cuda.get_device_name(device))
        if known is not None and PRECISION[dtype] in known.peak:
            return known.peak[PRECISION[dtype]]
    if device.type == "cpu":
        return products_on_cpu(dtype)
    n, times = 8192, []
    a = torch.randn(n, n, device=device, dtype=dtype)
    for _ in range(6):
        start = time.perf_counter()
        for _ in range(3):
            torch.mm(a, a)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return 3 * 2 * n**3 / sorted(times[1:])[2]


@functools.cache
def has_bf16_products(device: torch.device) -> bool:
    """Whether products in bf16 are the hardware's own; elsewhere they are many times slower."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def bf16_pays_on_cpu(width: int, inner: int, tokens: int) -> bool:
    """Whether an MLP's forward and backward is faster under bf16 autocast than in fp32, here."""
    layer = nn.Sequential(nn.Linear(width, inner), nn.ReLU(), nn.Linear(inner, width))
    x = torch.randn(min(tokens, 4096), width)

    def step(enabled: bool):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = layer(x).float().square().mean()
        loss.backward()

    # In turns, and the least of each: a busy moment must not decide for a whole run.
    times: dict[bool, list[float]] = {True: [], False: []}
    for turn in range(6):
        # Some CPUs are fifty times slower in bf16, and would take minutes to say so.
        if turn > 1 and min(times[True]) > 2 * min(times[False]):
            break
        for enabled, of_one in times.items():
            start = time.perf_counter()
            step(enabled)
            of_one.append(time.perf_counter() - start)
    return min(times[True]) < 0.9 * min(times[False])


def choose_precision(asked: str, device: torch.device, width: int, inner: int, tokens: int) -> str:
    """fp32, bf16 or fp16: what was asked, or for `auto` what is fastest on this device."""
    if asked != "auto":
        return asked
    if device.type == "cuda":
        return "bf16" if has_bf16_products(device) else "fp16"
    return "bf16" if bf16_pays_on_cpu(width, inner, tokens) else "fp32"


def cpp_compiler() -> str | None:
    """Where the compiler is that torch.compile would take on a CPU."""
    names = os.environ.get("CXX", ""), "g++", "clang++"
    return next((path for name in names if name and (path := shutil.which(name))), None)
