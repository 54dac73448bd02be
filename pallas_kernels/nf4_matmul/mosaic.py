"""What the kernels of TMA-fed tensor cores share: how W is decoded from and into shared memory.

A tile of W is 128 by 64, or 64 by 128 when it is multiplied as it lies (`transposed`, the backward
product). Two warpgroups decode it, 64 by 64 each.
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.nf4_matmul import decode
from pallas_kernels.nf4_matmul.operands import STEP, pad
from pallas_kernels.nf4_matmul.weight import LowRank

COLUMNS = 128  # of a tile of the result


def swizzled(dtype) -> tuple:
    """The transforms of a tensor core operand with rows of 128 bytes."""
    return plgpu.TilingTransform((8, 128 // jnp.dtype(dtype).itemsize)), plgpu.SwizzleTransform(128)


def dequantize_half(group, codes_s, scales_s, w_s, table, *, transposed: bool, interpret: bool):
    """A warpgroup's half of the W tile: 64 of its rows, or 64 of its columns when `transposed`.

    codes (128, 32), scales (1, 128), W (128, 64); transposed: (64, 64), (2, 64), (64, 128).
    Rows of the transposed tile are 64 bytes of codes: a two-way bank conflict, which is accepted.
    """
    if transposed:
        codes_s, scales_s = codes_s.at[:, pl.ds(32 * group, 32)], scales_s.at[group]
        w_s = w_s.at[:, pl.ds(64 * group, 64)]
    else:
        mine = pl.ds(64 * group, 64)
        codes_s, scales_s, w_s = codes_s.at[mine], scales_s.at[0, mine], w_s.at[mine]
    codes = plgpu.load(codes_s, layout=decode.CODES, optimized=not transposed)
    values = decode.decode(codes, table, w_s.dtype, interpret=interpret)
    scales = plgpu.load(scales_s, layout=decode.ROWS)
    scales = lax.broadcast_in_dim(scales, values.shape, [0])
    w_s[...] = values * plgpu.layout_cast(scales, decode.WEIGHTS)


def in_specs(rows: int, dtype, row, column, first, transposed: bool) -> list[plgpu.BlockSpec]:
    """Of x, codes and scales, for the steps of one tile that begin with step `first`."""
    x = plgpu.BlockSpec(
        (rows, STEP), lambda i: (row, first + i), transforms=swizzled(dtype), delay_release=1
    )
    if transposed:
        codes, scales = (STEP, COLUMNS // 2), (COLUMNS // STEP, STEP)
        places = (lambda i: (first + i, column)), (lambda i: (column, first + i))
    else:
        codes, scales = (COLUMNS, STEP // 2), (1, COLUMNS)
        places = (lambda i: (column, first + i)), (lambda i: (first + i, column))
    return [
        x,
        plgpu.BlockSpec(codes, places[0], delay_release=1),
        plgpu.BlockSpec(scales, places[1], delay_release=1),
    ]


def padded(x):
    """x with zeros up to whole 8 rows and 64 columns, which copies of swizzled tiles need."""
    return pad(x, 8, STEP)


def low_rank_operands(low: LowRank, rows: int, transposed: bool):
    """(h, b): h (M, R) for tiles of `rows` rows; b (out, R), or (R, in) when `transposed`.

    R is the rank up to a multiple of 64, with zeros: these are small beside x and W.
    """
    if transposed:
        return pad(low.h, rows, STEP), pad(low.b, STEP, COLUMNS)
    return pad(low.h, rows, STEP), pad(low.b.T, COLUMNS, STEP)
