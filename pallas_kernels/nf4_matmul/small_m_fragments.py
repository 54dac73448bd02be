"""The operands of `mma` for small_m: registers as memory gives them, and what `mma` takes them for.

A lane decodes 8 neighbours of a row of W and feeds them to two k16 steps as they lie, and reads 8
neighbours of a row of x likewise. That permutes the contraction inside each 32, on both sides
alike: k = 8q + 4h + 2i + j stands where `mma` expects 16h + 8i + 2q + j (q the lane's place among
4, h the step, i the register, j its half). The products are those of the same pairs, so no element
is moved, in memory or between lanes; what is interpreted needs no permutation at all.

tests/pallas_kernels/test_layout.py proves the two register maps from Mosaic's layouts.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

from pallas_kernels.nf4_matmul import decode
from pallas_kernels.registers import inline

# The operands and the result of mma; bfloat16 stands for both types of 16 bits.
LEFT = plgpu.Layout.MMA_LHS(jnp.bfloat16, m_warps=4)  # W (rows, k), 16 of each 64 rows a warp
RIGHT = plgpu.Layout.MMA_RHS(jnp.bfloat16, m_warps=4)  # x^T (k, columns), in every warp
SUMS = plgpu.Layout.MMA_ACC(jnp.bfloat16, m_warps=4)  # y^T (rows, columns)
PER_ROW = SUMS.reduce(1)  # (rows,)
# SUMS with one element a register, so that it may be stored transposed.
SINGLES = plgpu.Layout.TILED(
    plgpu.Tiling(((64, 8), (16, 8), (8, 8), (2,), (1,))),
    warp_dims=(-8,),
    lane_dims=(-4, -3),
    vector_dim=-1,
)

# Codes, 16 rows and 16 bytes a warp: a lane holds 4 neighbouring bytes.
CODES = plgpu.Layout.WGMMA_8BIT
# 8 rows of x and 32 columns, in every warp: a lane holds 8 neighbours.
X = plgpu.Layout.TILED(
    plgpu.Tiling(((8, 32), (8,))),
    warp_dims=(plgpu.Replicated(4),),
    lane_dims=(-3, -2),
    vector_dim=-1,
)


def scales_layout(blocks: int):
    """Of scales (rows, blocks): a lane holds all of each of its rows."""
    return plgpu.Layout.TILED(
        plgpu.Tiling(((64, blocks), (16, blocks), (8, blocks))),
        warp_dims=(-6,),
        lane_dims=(-2, plgpu.Replicated(4)),
        vector_dim=-1,
    )


def left(codes, table, dtype: DTypeLike, *, interpret: bool):
    """codes (rows, C) in CODES -> the left operand (rows, 2C), not yet scaled."""
    if interpret:
        return decode.lookup_jnp(codes, table, dtype)
    return decode.lookup_ptx(codes, table, dtype, CODES, LEFT, left_registers)


def left_registers(register: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Where `mma` expects the 8 weights of a register of CODES: 2 in each of these."""
    tile, chunk, inner, _, *rest = register
    return [(tile, 2 * chunk + h, inner, i, *rest) for h in range(2) for i in range(2)]


def right(x, *, interpret: bool):
    """x (columns, k) in X -> the right operand (k, columns)."""
    if interpret:
        return x.T

    def pairs(registers):
        for register, eight in np.ndenumerate(registers):
            for i, place in enumerate(right_registers(register)):
                yield place, mgpu.utils.vector_slice(eight, slice(2 * i, 2 * i + 2))

    result = plgpu.ShapeDtypeStruct((x.shape[1], x.shape[0]), x.dtype, layout=RIGHT)
    return relabelled(X, [result], lambda registers: [pairs(registers)])(x)[0]


def right_registers(register: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Where `mma` expects the 8 elements of a register of X: 2 in each of these."""
    rows, chunk, *rest = register
    return [(2 * chunk + h, rows, i, *rest, 0, 0) for h in range(2) for i in range(2)]


def columns(scales, *, interpret: bool) -> list[jax.Array]:
    """scales (rows, blocks) in scales_layout -> (rows,) of each block, which multiply SUMS."""
    rows, blocks = scales.shape
    if interpret:
        return [scales[:, b] for b in range(blocks)]

    def one(registers, block):
        for register, some in np.ndenumerate(registers):
            tile, half = register[0], register[4]
            yield (tile, 0, half, 0, 0), mgpu.utils.vector_slice(some, slice(block, block + 1))

    result = plgpu.ShapeDtypeStruct((rows,), jnp.float32, layout=PER_ROW)
    return relabelled(
        scales_layout(blocks),
        [result] * blocks,
        lambda registers: [one(registers, block) for block in range(blocks)],
    )(scales)


def singles(y, *, interpret: bool):
    """y^T (rows, columns) from SUMS into SINGLES."""
    if interpret:
        return y

    def each(registers):
        for register, pair in np.ndenumerate(registers):
            for i in range(2):
                yield (*register[:-1], i, 0), mgpu.utils.vector_slice(pair, slice(i, i + 1))

    result = plgpu.ShapeDtypeStruct(y.shape, y.dtype, layout=SINGLES)
    return relabelled(SUMS, [result], lambda registers: [each(registers)])(y)[0]


def relabelled(source, results: list, fill: Callable):
    """A function of an array in layout `source` whose results are made of its registers.

    `fill` gives, for each of a list of results, (place, register) pairs.
    """

    @inline((source,), results)
    def relabel(new, old):
        for array, found in zip(new, fill(old), strict=True):
            for place, register in found:
                array[place] = register

    return relabel
