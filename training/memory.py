"""Memory of a training step: whether it fits, asked before a run starts, and kept between steps.

The count is `models/memory.py`'s, the one of `ponder plan`.
"""

import ctypes
import math
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import gather_object

from ..models import GPTConfig
from ..models.memory import available, require, training_memory
from .config import TrainConfig

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # of glibc's malloc.h
LARGE = 2**25  # bytes of a block that glibc never keeps, by itself; it trims from twice as many on


@contextmanager
def keep_memory() -> Iterator[None]:
    """Have the C library keep what is freed: the next step on a CPU asks for as much again.

    glibc gives large blocks back to the system, which then has to clear a page for every 4 KiB of
    the next step's tensors: a tenth of a step, and more. At the end it gives all back: who asks
    then what is free must not count it as taken. Other C libraries are left as they are.
    """
    if platform.libc_ver()[0] != "glibc":
        yield
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_MAX, 0)
    libc.mallopt(M_TRIM_THRESHOLD, -1)
    try:
        yield
    finally:
        libc.mallopt(M_MMAP_MAX, 65536)  # glibc's own number
        libc.mallopt(M_MMAP_THRESHOLD, LARGE)
        libc.mallopt(M_TRIM_THRESHOLD, 2 * LARGE)
        libc.malloc_trim(0)


def check_free(
    config: TrainConfig,
    shape: GPTConfig,
    device: torch.device,
    *,
    ranks: int,
    shards: int,
) -> None:
    """ValueError, in every process, where a step does not fit on the device of one of them.

    Where the precision is yet to be measured it is taken for the one that needs less, bf16.
    """
    free, fault = available(device), ""
    if free is not None:
        if device.type == "cpu":  # which the processes of a machine share
            free //= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        try:
            check_fits(
                shape,
                free,
                rows=config.batch_size // config.accumulation // ranks,
                length=config.context,
                accumulation=config.accumulation,
                recompute=config.recompute,
                precision="bf16" if config.precision == "auto" else config.precision,
                optimizer=config.optimizer,
                devices=ranks,
                shards=shards,
                average=config.ema > 0,
                triton=device.type == "cuda",
            )
        except ValueError as error:
            fault = str(error)
    # Together: a process that ended alone would leave the others waiting.
    if faults := [each for each in gather_object([fault]) if each]:
        raise ValueError(faults[0])


def check_fits(
    shape: GPTConfig,
    available: float,
    *,
    rows: int,
    accumulation: int,
    recompute: bool = False,
    **step: Any,
) -> None:
    """ValueError where a training step cannot fit in `available` free bytes a device.

    rows: sequences in a device's micro-batch; step: the rest of what `training_memory` asks for.
    The sentence names what would fit: more accumulation, or recomputing besides.
    """

    def need(parts: int, recompute: bool) -> dict[str, float]:
        memory = training_memory(
            shape,
            rows=rows // parts,
            accumulation=accumulation * parts,
            recompute=recompute,
            **step,
        )
        memory.pop("CUDA context", None)  # it is there already, and so not among what is free
        return memory

    pairs = ((n, rows // n) for n in range(1, math.isqrt(rows) + 1) if rows % n == 0)
    divisors = sorted({n for pair in pairs for n in pair})
    ways = [(n, again) for again in (recompute, True) for n in divisors]
    fitting = (way for way in ways if sum(need(*way).values()) <= available)
    remedy = "take a smaller model, a shorter context, or more devices"
    if way := next(fitting, None):
        parts, again = way
        words = [f"--accumulation {accumulation * parts}"] if parts > 1 else []
        words += ["--recompute"] if again and not recompute else []
        remedy = f"{' '.join(words)} would fit"
    require(need(1, recompute), available, "a training step", remedy)
