"""How the attention kernels cut their work, by kernel, chip, number type and head dimension."""

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
        256: Tiles(32, 64, 8, 2),
    },
    ("backward_kv", "small"): {
        32: Tiles(64, 128, 8, 2),
        64: Tiles(64, 128, 8, 2),
        128: Tiles(64, 64, 8, 2),
        256: Tiles(32, 32, 8, 1),
    },
    ("backward_kv", "fp32"): {
        32: Tiles(32, 32, 4, 1),
        64: Tiles(32, 64, 8, 1),
        128: Tiles(32, 32, 8, 2),
        256: Tiles(16, 16, 8, 1),
    },
}


def block_d(head_dim: int) -> int:
    return max(32, next_power_of_2(head_dim))


def choose(kernel: str, head_dim: int, dtype: str, capability: int) -> Tiles:
    if dtype == "fp32" and capability:
        chip = "fp32"
    else:
        chip = "large" if capability in (90, 100, 103) else "small"
    return TILES[kernel, chip][block_d(head_dim)]
