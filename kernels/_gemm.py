"""How a matrix product with an epilogue is cut into tiles: blocks in and out, tiles, the launch.

A product of (n_rows, n_in) and (n_in, n_hidden) in contiguous row-major matrices; the second may
lie transposed. Blocks travel by TMA descriptors where the chip has them and rows start at multiples
of 16 bytes, else by pointers; a kernel reads the same either way.
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from ._runtime import cdiv, jit, launch, tl


@jit
def tile_index(i_tile, n_rows, n_cols, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(row, column) of a tile; eight rows of tiles go together, to share weights in L2."""
    n_m = tl.cdiv(n_rows, BLOCK_M)
    per_group = 8 * tl.cdiv(n_cols, BLOCK_N)
    first = i_tile // per_group * 8
    in_group = tl.minimum(n_m - first, 8)
    return first + i_tile % per_group % in_group, i_tile % per_group // in_group


@jit
def matrix(ptr, n_rows, n_cols, ROWS: tl.constexpr, COLS: tl.constexpr, TMA: tl.constexpr):
    """A contiguous matrix, to be read or written in blocks: a TMA descriptor or the pointer."""
    if TMA:
        return tl.make_tensor_descriptor(
            ptr,
            [n_rows, n_cols],
            [n_cols, 1],  # pyright: ignore  (it must stay the constant 1, so no name for it)
            [ROWS, COLS],
        )
    else:
        return ptr


@jit
def _offsets(o_row, o_col, n_rows, n_cols, ROWS: tl.constexpr, COLS: tl.constexpr):
    rows = o_row + tl.arange(0, ROWS).to(tl.int64)
    cols = o_col + tl.arange(0, COLS)
    mask = (rows < n_rows)[:, None] & (cols < n_cols)[None, :]
    return rows[:, None] * n_cols + cols[None, :], mask


@jit
def load(
    matrix,
    o_row,
    o_col,
    n_rows,
    n_cols,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    TMA: tl.constexpr,
):
    """The block at (o_row, o_col); zero beyond the matrix."""
    if TMA:
        return matrix.load([o_row, o_col])
    else:
        offsets, mask = _offsets(o_row, o_col, n_rows, n_cols, ROWS, COLS)
        return tl.load(matrix + offsets, mask=mask, other=0.0)


@jit
def store(matrix, block, o_row, o_col, n_rows, n_cols, TMA: tl.constexpr):
    if TMA:
        matrix.store([o_row, o_col], block.to(matrix.dtype))
    else:
        offsets, mask = _offsets(o_row, o_col, n_rows, n_cols, block.shape[0], block.shape[1])
        tl.store(matrix + offsets, block.to(matrix.dtype.element_ty), mask=mask)


@jit
def factor(
    ptr,
    n_k,
    n_n,
    K: tl.constexpr,
    N: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    TMA: tl.constexpr,
):
    """The second matrix of a product, (n_k, n_n); TRANSPOSED if it lies in memory as (n_n, n_k)."""
    if TRANSPOSED:
        return matrix(ptr, n_n, n_k, N, K, TMA)
    else:
        return matrix(ptr, n_k, n_n, K, N, TMA)


@jit
def load_factor(
    factor,
    o_k,
    o_n,
    n_k,
    n_n,
    K: tl.constexpr,
    N: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    TMA: tl.constexpr,
):
    """Its (K, N) block at (o_k, o_n); zero beyond the matrix."""
    if TRANSPOSED:
        return load(factor, o_n, o_k, n_n, n_k, N, K, TMA).T
    else:
        return load(factor, o_k, o_n, n_k, n_n, K, N, TMA)


@jit
def columns(block, INDEX: tl.constexpr, WIDTH: tl.constexpr):
    """Columns INDEX * WIDTH to (INDEX + 1) * WIDTH: the epilogues go by them to spare registers."""
    if block.shape[1] == WIDTH:
        return block
    else:
        HALF: tl.constexpr = block.shape[1] // 2
        low, high = tl.split(tl.permute(tl.reshape(block, (block.shape[0], 2, HALF)), (0, 2, 1)))
        if INDEX * WIDTH < HALF:
            return columns(low, INDEX, WIDTH)
        else:
            return columns(high, INDEX - HALF // WIDTH, WIDTH)


@dataclass(frozen=True)
class Tile:
    """The part of the output that one program computes at a time, and how."""

    block_m: int
    block_n: int  # of all accumulators together
    block_k: int
    num_warps: int
    num_stages: int
    tma: bool = False  # blocks by TMA; programs, one a processor, that walk over many tiles
    width: int = 64  # columns of a step of the epilogue
    # With TMA: whether a tile's first blocks are fetched during the epilogue before it. Triton then
    # zeroes two accumulators by selects, for which ptxas runs wgmma one by one: so None is whether
    # there is one accumulator.
    flat: bool | None = None

    def count(self, n_rows: int, n_hidden: int, accumulators: int) -> int:
        """How many cover (n_rows, n_hidden) for each of the accumulators."""
        return cdiv(n_rows, self.block_m) * cdiv(n_hidden * accumulators, self.block_n)

    def constexprs(self, accumulators: int) -> dict[str, int | bool]:
        block_n = self.block_n // accumulators
        return dict(
            TMA=self.tma,
            FLAT=self.tma and (accumulators == 1 if self.flat is None else self.flat),
            BLOCK_M=self.block_m,
            BLOCK_N=block_n,
            BLOCK_K=self.block_k,
            WIDTH=min(self.width, block_n),
        )


@dataclass(frozen=True, eq=False)  # so that it is quickly looked up
class Tiles:
    """The tiles of one kind of product on one chip."""

    by_size: tuple[Tile, ...]  # from the widest to the one for a few rows
    unaligned: Tile  # by pointers, where no load can be wide

    def __iter__(self):
        yield from (*self.by_size, self.unaligned)

    def choose(
        self,
        n_rows: int,
        n_in: int,
        n_hidden: int,
        accumulators: int,
        itemsize: int,
        processors: int,
        aligned: bool,
    ) -> Tile:
        """The widest tile that occupies at least half of the processors, or the smallest."""
        # TMA asks for rows of whole 16 bytes; Triton knows of pointers' alignment by 16 elements.
        tma = aligned and n_in * itemsize % 16 == 0 and n_hidden * itemsize % 16 == 0
        wide = aligned and n_in % 16 == 0 and n_hidden % 16 == 0
        possible = [t for t in self.by_size if (tma if t.tma else wide)]
        for tile in possible:
            if 2 * tile.count(n_rows, n_hidden, accumulators) >= processors:
                return tile
        return possible[-1] if wide else self.unaligned


@functools.cache
def _processors(device: torch.device) -> int:
    """Streaming multiprocessors of the device; a few in the interpreter."""
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


def launch_product(
    kernel,
    tiles: Tiles,
    matrices: tuple[Tensor, ...],
    sizes: tuple[int, int, int],
    accumulators: int = 1,
    **constexprs,
) -> None:
    """Run `kernel` on (n_rows, n_in, n_hidden) `sizes`; an accumulator for each of the products."""
    x = matrices[0]
    aligned = all([m.data_ptr() % 16 == 0 for m in matrices])
    chosen = tiles, sizes, accumulators, x.element_size(), _processors(x.device), aligned
    n_programs, tma, constants = _arguments(*chosen)
    launch(kernel, n_programs, matrices, sizes, descriptors=tma, **constexprs, **constants)


@functools.lru_cache(maxsize=1024)
def _arguments(
    tiles: Tiles,
    sizes: tuple[int, int, int],
    accumulators: int,
    itemsize: int,
    processors: int,
    aligned: bool,
) -> tuple[int, bool, dict[str, int | bool]]:
    """(programs, whether they make descriptors, constants) of the chosen tile."""
    n_rows, _, n_hidden = sizes
    tile = tiles.choose(*sizes, accumulators, itemsize, processors, aligned)
    n_tiles = tile.count(n_rows, n_hidden, accumulators)
    launched = dict(num_warps=tile.num_warps, num_stages=tile.num_stages)
    n_programs = min(n_tiles, processors) if tile.tma else n_tiles
    return n_programs, tile.tma, tile.constexprs(accumulators) | launched
