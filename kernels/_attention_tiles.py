"""How the attention kernels cut their work, by kernel, chip, number type and head dimension."""

import functools
from dataclasses import dataclass

from ._runtime import next_power_of_2, tiles_file


@dataclass(frozen=True)
class Tiles:
    """How a kernel cuts its work: queries and keys in a tile, warps, and stages of the pipeline."""

    block_t: int
    block_s: int
    num_warps: int
    num_stages: int
    specialized: bool = False  # by _attention_hopper's kernels, whose warps share the work
    late: bool = False  # not of backward_q: products run under exponentials, on Hopper


# By kernel and chip, then by padded head dimension. "large" is for 227 KB of shared memory (sm_90,
# sm_100), "small" for 99 KB, which all others and the interpreter have; "fp32" is for IEEE
# products, which no matrix unit makes. "sm_100" is that chip alone, where it has tiles of its own.
# None spills more than 56 bytes a thread.
TILES = {
    ("forward", "large"): {
        32: Tiles(128, 128, 8, 3, late=True),
        64: Tiles(128, 128, 8, 3, late=True),
        128: Tiles(128, 128, 8, 2, late=True),
        256: Tiles(128, 64, 8, 2, late=True),
    },
    ("forward", "sm_100"): {
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
        64: Tiles(128, 128, 8, 3),
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
        32: Tiles(64, 128, 8, 3, late=True),
        64: Tiles(64, 128, 8, 3, late=True),
        128: Tiles(64, 128, 8, 3, late=True),
        256: Tiles(32, 64, 8, 3, late=True),
    },
    ("backward_kv", "sm_100"): {
        32: Tiles(64, 128, 8, 3),
        64: Tiles(64, 128, 8, 3),
        128: Tiles(64, 128, 8, 3),
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


# Options whose masks and scores take more registers than those tiles leave, and the tiles then;
# "padded" are heads that do not fill BLOCK_D. On sm_100 all options take the "small" ones.
OPTIONS = frozenset({"alibi", "segments", "window", "softcap"})
WITH_OPTIONS = {
    ("forward", "small", 32): (OPTIONS, Tiles(128, 64, 8, 3)),
    ("forward", "small", 64): (OPTIONS, Tiles(128, 64, 8, 3)),
    ("forward", "large", 128): ({"padded"}, Tiles(128, 64, 8, 3, late=True)),
    ("forward", "large", 256): (OPTIONS, Tiles(128, 32, 8, 3)),
    ("backward_q", "large", 64): (OPTIONS, Tiles(128, 64, 8, 3)),
    ("backward_q", "fp32", 128): (OPTIONS, Tiles(32, 16, 8, 2)),
    ("backward_kv", "fp32", 128): (OPTIONS, Tiles(16, 32, 8, 2)),
    ("backward_kv", "large", 128): ({"softcap"}, Tiles(64, 128, 8, 2)),
    ("backward_kv", "large", 256): ({"alibi"}, Tiles(16, 64, 8, 2)),
}


# For the kernels of _attention_hopper and _attention_one_pass, which know no option but causal, on
# sm_90 in 16 bits. They compile without spilling and are right in the interpreter, but no GPU has
# timed them: so nothing chooses them yet but benchmarks/tiles.py, or a file that it wrote.
# "backward" is the one pass where gradients need not repeat; "delta" is a row's dout · out, which
# two of the others start from.
SPECIALIZED_TILES = {
    ("forward", 64): Tiles(128, 128, 4, 3, specialized=True),
    ("forward", 128): Tiles(128, 128, 4, 2, specialized=True),
    ("backward_q", 64): Tiles(128, 64, 4, 3, specialized=True),
    ("backward_q", 128): Tiles(128, 64, 4, 2, specialized=True),
    ("backward_kv", 64): Tiles(64, 128, 4, 2, specialized=True),
    ("backward_kv", 128): Tiles(64, 128, 4, 2, specialized=True),
    ("backward", 64): Tiles(64, 128, 8, 2, specialized=True),
    ("backward", 128): Tiles(64, 128, 8, 2, specialized=True),
    ("delta", 64): Tiles(64, 16, 4, 1, specialized=True),
    ("delta", 128): Tiles(64, 16, 4, 1, specialized=True),
}


@functools.cache
def measured() -> tuple[int, dict[tuple[str, int], Tiles]]:
    """(capability, tiles) of what was measured on this machine, see `tiles_file`."""
    found = tiles_file()
    tiles = {
        (name, int(block)): Tiles(**fields) for name, block, fields in found.get("attention", ())
    }
    return found.get("capability", -1), tiles


def block_d(head_dim: int) -> int:
    return max(32, next_power_of_2(head_dim))


def choose(
    kernel: str, head_dim: int, dtype: str, capability: int, options: tuple[str, ...]
) -> Tiles | None:
    """The tiles of a kernel that is asked for these options; those beyond OPTIONS only say that
    tiles found without any do not serve. None of "backward": it takes two passes."""
    block = block_d(head_dim)
    chip, found = measured()
    if chip == capability and dtype != "fp32" and not options and (kernel, block) in found:
        return found[kernel, block]
    return _from_tables(kernel, head_dim, dtype, capability, options)


@functools.cache
def _from_tables(
    kernel: str, head_dim: int, dtype: str, capability: int, options: tuple[str, ...]
) -> Tiles | None:
    block = block_d(head_dim)
    if kernel == "backward":
        return None
    if kernel == "delta":
        return SPECIALIZED_TILES[kernel, block]
    used = OPTIONS.intersection(options)
    if dtype == "fp32" and capability:
        chip = "fp32"
    else:
        large = capability == 90 or (capability in (100, 103) and not used)
        chip = "large" if large else "small"
        if large and capability != 90 and (kernel, "sm_100") in TILES:
            chip = "sm_100"
    if head_dim < block:
        used |= {"padded"}
    callers, tiles = WITH_OPTIONS.get((kernel, chip, block), ((), None))
    return tiles if tiles and used.intersection(callers) else TILES[kernel, chip][block]
