"""How the steps of a product are shared out among blocks of threads, and put together again.

A product has `rows * columns` tiles of `steps` steps of the contraction each. When there are tiles
for every SM, a block computes one tile. When there are not, as at 64 to 512 tokens, the steps of
all tiles are laid out in one line and cut into equal ranges, one a block (stream-K: Osama and
others 2023, arXiv 2301.03598):

    tile    |---------0---------|---------1---------|---------2---------|
    block   |-----0------|-----1------|-----2------|------3-----|---4---...
    slot    |-----0------|--1---|--3--|-----4------| ...           slot = block + tile

A part of a tile is written in float32 to a slot of its own and the slots are summed in order, so
the same bits come out every time. No block adds to another's memory.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32

from pallas_kernels.nf4_matmul.weight import LowRank

Launch = Callable[..., Array]  # of a kernel's operands


@dataclasses.dataclass(frozen=True)
class Work:
    """The sharing of one product.

    Attributes:
      rows: tiles along the rows of the result (M).
      columns: tiles along its columns.
      steps: of the contraction, a tile.
      blocks: blocks of threads that share the steps; as many as tiles: one tile each.
    """

    rows: int
    columns: int
    steps: int
    blocks: int

    @property
    def tiles(self) -> int:
        return self.rows * self.columns

    @property
    def whole(self) -> bool:
        """Whether each block computes one whole tile, with nothing to sum afterwards."""
        return self.blocks == self.tiles

    @property
    def slots(self) -> int:
        """Of partial tiles."""
        return self.blocks + self.tiles - 1

    def begin(self, block):
        """The first step, on the line of all steps, of a block (an int, or traced int32)."""
        each, rest = divmod(self.tiles * self.steps, self.blocks)
        return block * each + block * rest // self.blocks  # as one product it could pass 2^31

    def parts(self, block):
        """(first, number): of the tiles that a block works on."""
        first = self.begin(block) // self.steps
        return first, (self.begin(block + 1) - 1) // self.steps - first + 1

    def part(self, block, tile):
        """(first, number): of the steps of `tile` that `block` does."""
        start = jnp.maximum(self.begin(block) - tile * self.steps, 0)
        stop = jnp.minimum(self.begin(block + 1) - tile * self.steps, self.steps)
        return start, stop - start

    def place(self, tile):
        """(row, column) of a shared tile: tiles of the same columns of W follow each other."""
        return tile % self.rows, tile // self.rows


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What one compiled kernel depends on.

    Attributes:
      work: the tiles, and the blocks that share them.
      rows: of a tile.
      stages: of the ring of copies.
      shape: of the result, with what copies want beyond its last rows and columns.
      dtype: of x, W's tile and the result.
      rank: of the low-rank term, padded; 0 for none.
      transposed: multiply by W instead of W^T.
      interpret: whether the CPU interprets it.
    """

    work: Work
    rows: int
    stages: int
    shape: tuple[int, int]
    dtype: jnp.dtype
    rank: int
    transposed: bool
    interpret: bool


def traced_once(launch: Callable[[Kernel], Launch]) -> Callable[[Kernel], Launch]:
    """`launch`, whose kernels are traced and lowered once for all linears of one shape.

    Tracing kernels is most of what tracing a training step takes. Interpreted ones are not jitted:
    called outside of a program they would run while later operations queue up behind them, XLA on a
    CPU takes 32 at a time, and the interpreter's own would wait for those.
    """

    @functools.cache
    @functools.wraps(launch)
    def kept(k: Kernel) -> Launch:
        return launch(k) if k.interpret else jax.jit(launch(k))

    return kept


def share(rows: int, columns: int, steps: int, slots: int) -> Work:
    """The sharing for a GPU that runs `slots` blocks at a time.

    Whole tiles when the last wave wastes little, 10 %; else equal ranges of steps, at least
    4 each, below which filling and draining the pipeline costs more than it brings.
    """
    tiles = rows * columns
    waves = -(-tiles // slots)
    if tiles >= 0.9 * waves * slots:
        return Work(rows, columns, steps, tiles)
    blocks = max(tiles, min(slots, tiles * steps // 4)) if tiles < slots else slots
    return Work(rows, columns, steps, blocks)


def assemble(
    partial: Float32[Array, "slots bm bn"],
    work: Work,
    m: int,
    n: int,
    dtype: DTypeLike,
    low: LowRank | None = None,
) -> Float[Array, "m n"]:
    """The result (m, n) from the partial tiles: each tile's slots, summed in order (+ h b)."""
    tile = np.arange(work.tiles)
    units = tile * work.steps
    # The blocks that hold a tile's first and last step; `begin` is monotone, so search it.
    begins = np.array([work.begin(block) for block in range(work.blocks + 1)])
    first = np.searchsorted(begins, units, side="right") - 1
    last = np.searchsorted(begins, units + work.steps - 1, side="right") - 1
    total = jnp.zeros((work.tiles, *partial.shape[1:]), jnp.float32)
    for i in range(int((last - first).max()) + 1):
        slot = np.minimum(first + i, last) + tile
        part = jnp.where((first + i <= last)[:, None, None], partial[slot], 0)
        total = total + part
    grid = total.reshape(work.columns, work.rows, *partial.shape[1:]).transpose(1, 2, 0, 3)
    dense = grid.reshape(work.rows * partial.shape[1], work.columns * partial.shape[2])
    y = dense[:m, :n]
    if low is not None:
        y = y + jnp.dot(*low, preferred_element_type=jnp.float32)
    return y.astype(dtype)
