"""How partial tiles become a result: each tile's slots in order, one rounding behind all terms."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.nf4_matmul.weight import LowRank
from pallas_kernels.nf4_matmul.work import Work, assemble

TILE = (2, 4)


@pytest.mark.parametrize("work", [Work(2, 3, 5, 4), Work(1, 2, 4, 2), Work(1, 1, 7, 3)], ids=str)
def test_each_tile_is_the_sum_of_its_blocks_parts(work):
    """A part holds how many of its tile's steps a block did, times the tile's number."""
    partial = np.full((work.slots, *TILE), np.nan, np.float32)
    for block in range(work.blocks):
        first, count = (int(number) for number in work.parts(block))
        for tile in range(first, first + count):
            partial[block + tile] = int(work.part(block, tile)[1]) * (tile + 1)
    m, n = work.rows * TILE[0] - 1, work.columns * TILE[1] - 1
    y = assemble(jnp.asarray(partial), work, m, n, jnp.float32)
    assert y.shape == (m, n)
    for tile in range(work.tiles):
        row, column = work.place(tile)
        assert y[row * TILE[0], column * TILE[1]] == work.steps * (tile + 1)


def test_the_sum_with_the_low_rank_term_is_rounded_once():
    """256.5 is no bfloat16."""
    partial = jnp.full((1, *TILE), 256.5)
    low = LowRank(jnp.full((2, 1), -16, jnp.bfloat16), jnp.full((1, 4), 16, jnp.bfloat16))
    y = assemble(partial, Work(1, 1, 1, 1), 2, 4, jnp.bfloat16, low)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y.astype(jnp.float32), np.full(TILE, 0.5))
