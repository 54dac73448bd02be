"""A frozen head by blocks of rows, as the loss reads it: dense or 4-bit, in device or host memory.

    rows 0 .. rows, rows .. 2 rows, ...      `count` whole blocks, fetched by their number
    what is left of the vocabulary           fewer rows; none where the blocks fill it

A block is fetched as it is stored (a 4-bit one in its codes and scales) and becomes dense, in x's
dtype, only when its turn has come.
"""

import dataclasses
import math
from typing import Any

import jax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels.nf4_matmul import reference
from pallas_kernels.nf4_matmul.weight import Weight
from pallas_kernels.quantize.api import DoubleQuantized
from pallas_kernels.quantize.reference import NESTED_BLOCK

Head = Float[Array, "V D"] | Weight
Stored = Any  # a block as the head stores it, in device memory
DEVICE, HOST = jax.memory.Space.Device, jax.memory.Space.Host


def in_host(head: Head) -> bool:
    """Whether any array of the head, traced or not, lives in host memory."""
    return any(jax.typeof(leaf).memory_space is HOST for leaf in jax.tree.leaves(head))


@dataclasses.dataclass(frozen=True)
class Blocks:
    """A head (V, D) and how it is cut.

    Attributes:
      head: dense, or a Weight.
      rows: of a block; see `even_rows`.
    """

    head: Head
    rows: int

    @property
    def count(self) -> int:
        """Whole blocks."""
        return self.head.shape[0] // self.rows

    @property
    def rest(self) -> int:
        """Rows behind the whole blocks."""
        return self.head.shape[0] % self.rows

    def fetched(self, number: Int[Array, ""] | int) -> Stored:
        """Whole block `number` in device memory.

        The slices begin at `number` times a constant, and never outside: XLA makes a memcpy of a
        slice of host memory whose start is affine in a loop's counter; of one that is clamped,
        chosen or looked up it makes a kernel that reads host memory.
        """

        def one(leaf, step):
            if not step:
                return leaf
            start = number * step
            return jax.lax.dynamic_slice_in_dim(leaf, start, step, allow_negative_indices=False)

        return self.on_device(one)

    def fetched_rest(self) -> Stored:
        """The rows behind the whole blocks, in device memory."""

        def one(leaf, step):
            return jax.lax.slice_in_dim(leaf, self.count * step, None) if step else leaf

        return self.on_device(one)

    def on_device(self, cut) -> Stored:
        """cut(leaf, its steps along the first axis from block to block) of each, fetched."""
        block = jax.tree.map(cut, self.head, steps(self.head, self.rows))
        return jax.device_put(block, DEVICE) if in_host(self.head) else block

    def dense(self, block: Stored, rows: int, dtype: DTypeLike) -> Float[Array, "rows D"]:
        """A fetched block of so many rows as a matrix."""
        if not isinstance(self.head, Weight):
            return block.astype(dtype)
        shape = rows, self.head.shape[1]
        return reference.dense(dataclasses.replace(block, shape=shape), dtype, backend=None)


def steps(head: Head, rows: int) -> Any:
    """By how much `rows` rows move along the first axis of each array; 0: it is for all rows."""
    if not isinstance(head, Weight):
        return rows
    width, size = head.shape[1], head.block_size
    by_rows = width % size == 0  # then rows are an axis of codes and scales, which are flat if not
    codes, blocks = (rows, rows) if by_rows else (rows * width // 2, rows * width // size)
    if not isinstance(head.scales, DoubleQuantized):
        return dataclasses.replace(head, codes=codes, scales=blocks)
    nested = rows * width // size // NESTED_BLOCK
    return dataclasses.replace(head, codes=codes, scales=DoubleQuantized(blocks, nested, 0))


def even_rows(head: Head, most: int) -> int:
    """Rows of a block: as few blocks of at most `most` rows as there can be, all alike.

        128,256 rows by at most 4096: 32 blocks of 4008, and no rest

    Rows end with an eighth, as tensor cores want them; those of a 4-bit head also with a block of
    weights and a nested scale, every few rows where the width is a multiple of block_size. A head
    of odd widths, whose rows hardly ever end so, has larger blocks than `most`, or one.
    """
    together = 8
    if isinstance(head, Weight):
        size = head.block_size
        if isinstance(head.scales, DoubleQuantized):
            size *= NESTED_BLOCK
        together = math.lcm(together, size // math.gcd(size, head.shape[1]))
    most = max(most // together, 1) * together
    count = -(-head.shape[0] // most)
    return -(-head.shape[0] // (count * together)) * together
