"""How the attention kernels cut their work, by kernel, chip, number type and head dimension."""

from collections.abc import Collection
from dataclasses import dataclass

from ._runtime import next_power_of_2


@dataclass(frozen=True)
class Tiles:
    """How a kernel cuts its work: queries and keys in a tile, warps, and stages of the pipeline."""

    block_t: int
    block_s: int
    num_warps: int
    num_stages: int


# By kernel and chip, then by padded head dimension. "large" is for 227 KB of shared memory (sm_90,
# sm_100), "small" for 99 KB, which all others and the interpreter have; "fp32" is for IEEE
# products, which no matrix unit makes. None spills more than 56 bytes a thread.
TILES = {
    ("forward", "large"): {
        32: Tiles(128, 128, 8, 3),
        64: Tiles(128, 128, 8, 3),
        128: Tiles(128, 128, 8, 2),
        256: Tiles(128, 64, 8, 2),
    },
    ("forward", "small"): {
        32: Tiles(128, 64, 4, 3),
        64: Tiles(128, 64, 4, 3),
        128: Tiles(128, 64, 8, 2),
        256: Tiles(64, 32, 8, 2),
    },
    ("forward", "fp32"): {
        32: Tiles(64, 64, 8, 2),
        64: Tiles(64, 32, 8, 2),
        128: Tiles(32, 16, 8, 1),
        256: Tiles(16, 16, 8, 2),
    },
    ("backward_q", "large"): {
        32: Tiles(128, 128, 8, 2),
        64: Tiles(128, 128, 8, 2),
        128: Tiles(128, 64, 8, 3),
        256: Tiles(64, 32, 8, 2),
    },
    ("backward_q", "small"): {
        32: Tiles(128, 64, 8, 2),
        64: Tiles(128, 64, 8, 2),
        128: Tiles(64, 64, 8, 2),
        256: Tiles(32, 32, 8, 2),
    },
    ("backward_q", "fp32"): {
        32: Tiles(64, 32, 8, 2),
        64: Tiles(64, 32, 8, 2),
        128: Tiles(32, 16, 4, 2),
        256: Tiles(16, 16, 8, 2),
    },
    ("backward_kv", "large"): {
        32: Tiles(64, 128, 8, 3),
        64: Tiles(64, 128, 8, 3),
        128: Tiles(64, 128, 8, 2),
        256: Tiles(32, 64, 8, 3),
    },
    ("backward_kv", "small"): {
        32: Tiles(64, 128, 8, 2),
        64: Tiles(64, 128, 8, 2),
        128: Tiles(64, 64, 8, 2),
        256: Tiles(32, 32, 8, 1),
    },
    ("backward_kv", "fp32"): {
        32: Tiles(32, 32, 4, 1),
        64: Tiles(32, 32, 8, 2),
        128: Tiles(32, 32, 8, 1),
        256: Tiles(16, 16, 8, 1),
    },
}


# Options whose masks and scores take more registers than those tiles leave, and the tiles then. On
# sm_100 all options take the "small" ones.
OPTIONS = frozenset({"alibi", "segments", "window", "softcap"})
WITH_OPTIONS = {
    ("forward", "small", 32): (OPTIONS, Tiles(128, 64, 8, 3)),
    ("forward", "small", 64): (OPTIONS, Tiles(128, 64, 8, 3)),
    ("forward", "large", 256): (OPTIONS, Tiles(128, 32, 8, 3)),
    ("backward_q", "large", 64): (OPTIONS, Tiles(128, 64, 8, 3)),
    ("backward_q", "fp32", 128): (OPTIONS, Tiles(32, 16, 8, 2)),
    ("backward_kv", "fp32", 128): (OPTIONS, Tiles(16, 32, 8, 2)),
    ("backward_kv", "large", 256): ({"alibi"}, Tiles(16, 64, 8, 2)),
}


def block_d(head_dim: int) -> int:
    return max(32, next_power_of_2(head_dim))


def choose(
    kernel: str, head_dim: int, dtype: str, capability: int, options: Collection[str]
) -> Tiles:
    """The tiles of a kernel that is asked for these options, others than of OPTIONS ignored."""
    used = OPTIONS.intersection(options)
    if dtype == "fp32" and capability:
        chip = "fp32"
    else:
        large = capability == 90 or (capability in (100, 103) and not used)
        chip = "large" if large else "small"
    block = block_d(head_dim)
    callers, tiles = WITH_OPTIONS.get((kernel, chip, block), ((), None))
    return tiles if tiles and used.intersection(callers) else TILES[kernel, chip][block]
