"""Codes and scales to floats on a GPU, by Mosaic: bound by memory, bit for bit the reference.

A block of 64 weights is 32 bytes of codes and one scale, whatever the matrix is, so both are read
as rows of blocks, 128 of them at a time:

    registers   codes, 4 bytes a lane -> 8 float32 of the codebook -> times the scale -> 16 or 32
                bits a weight, 16 bytes a store

The codebook lies in the warp's own registers, one value a lane, and a shuffle fetches the one that
a code names: 4 instructions a weight in all, against 10 in XLA's fusion of the same, which loads
each value from memory, four weights a thread.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxlib.mlir import ir
from jaxtyping import Array, Float, Float32, UInt8

from pallas_kernels import gpu
from pallas_kernels.backends import Unsupported
from pallas_kernels.codebooks import Kind, codebook
from pallas_kernels.registers import CODES, WEIGHTS, assembly, inline, store, word

BLOCK = 64  # weights of a row in the kernel; larger blocks repeat their scale
THREADS = 128

# WEIGHTS in two registers of 16 bytes, for float32.
FOURS = plgpu.Layout.TILED(
    plgpu.Tiling(((16, 64), (4, 64), (8,), (4,))),
    warp_dims=(-6,),
    lane_dims=(-4, -3),
    vector_dim=-1,
)
TABLE = plgpu.Layout.WG_STRIDED((THREADS,), vec_size=1)  # lanes 0-15 and 16-31 hold a table each


def dequantize_4bit(
    codes: UInt8[Array, "*lead bytes"],
    absmax: Float32[Array, "*lead blocks"],
    *,
    shape: tuple[int, int],
    kind: Kind,
    block_size: int,
    dtype: DTypeLike,
) -> Float[Array, "*lead out in"]:
    """codebook[code] * absmax of its block, over flat codes and scales."""
    target = gpu.require(*gpu.FROM_AMPERE)
    lead, (out, width) = codes.shape[:-1], shape
    if block_size % BLOCK or out * width % block_size:
        raise Unsupported(
            f"{shape} in blocks of {block_size}: the kernel takes whole blocks of a multiple of 64"
        )
    blocks = codes.size // (BLOCK // 2)
    rows = np.gcd(blocks, THREADS).item()
    if rows < 16:
        raise Unsupported(f"{blocks} blocks of 64: the kernel takes a multiple of 16")
    codes = codes.reshape(blocks, BLOCK // 2)
    scales = jnp.repeat(absmax.reshape(-1), block_size // BLOCK)
    table = jnp.asarray(np.tile(codebook(kind), THREADS // 16))
    weights = launch(blocks, rows, jnp.dtype(dtype), target.interpret)(codes, scales, table)
    return weights.reshape(*lead, *shape)


def launch(blocks: int, rows: int, dtype, interpret: bool):
    """The kernel as a function of (codes (blocks, 32), scales (blocks,), table (128,))."""
    return plgpu.kernel(
        functools.partial(body, rows, interpret),
        out_type=jax.ShapeDtypeStruct((blocks, BLOCK), dtype),
        grid=(blocks // rows,),
        grid_names=("part",),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    )


def body(rows: int, interpret: bool, codes_g, scales_g, table_g, weights_g):
    """One block of threads: `rows` blocks of weights."""
    layout = WEIGHTS if weights_g.dtype.itemsize == 2 else FOURS
    mine = pl.ds(lax.axis_index("part") * rows, rows)
    codes = plgpu.load(codes_g.at[mine], layout=CODES, optimized=False)
    scales = plgpu.load(scales_g.at[mine], layout=layout.reduce(1), optimized=False)
    if interpret:
        values = look_up_jnp(codes, [table_g[i] for i in range(16)])
    else:
        values = look_up(codes, plgpu.load(table_g, layout=TABLE, optimized=False), layout)
    scales = lax.broadcast_in_dim(scales, values.shape, [0])
    values = values * plgpu.layout_cast(scales, layout)
    store(weights_g.at[mine], values.astype(weights_g.dtype), optimized=False)


def look_up_jnp(codes, table):
    """The twin for the interpreter."""
    codes = jnp.stack([codes >> 4, codes & 15], -1).reshape(codes.shape[0], -1)
    return functools.reduce(
        lambda values, i: jnp.where(codes == i, table[i], values),
        range(16),
        jnp.zeros(codes.shape, jnp.float32),
    )


def fetch(result: int) -> str:
    """PTX: the value of one of 8 codes, the first of a byte in its high nibble."""
    shift = 4 * (result ^ 1)
    return f"shr.u32 c, $8, {shift}; shfl.sync.idx.b32 ${result}, $9, c, {0x101F}, {0xFFFFFFFF};"


# $0-$7: 8 values; $8: 4 bytes of codes; $9: the lane's value of the table. Lanes are asked within
# their half of the warp (0x101f), for which the code's 4 bits count and the higher ones do not.
PTX = "{ .reg .b32 c; " + " ".join(fetch(i) for i in range(8)) + " }"


def look_up(codes, table, layout):
    """codes (rows, 32) in CODES, table in TABLE -> float32 (rows, 64) in WEIGHTS or FOURS."""
    shape = codes.shape[0], BLOCK

    @inline((CODES, TABLE), plgpu.ShapeDtypeStruct(shape, jnp.float32, layout=layout))
    def fetched(values, codes, table):
        one = ir.VectorType.get((1,), ir.F32Type.get())
        length = layout.to_mgpu().vector_length
        for place, four in np.ndenumerate(codes):
            eight = assembly(PTX, [word(four), word(table.item())], 8)
            eight = [mgpu.utils.bitcast(each, one) for each in eight]
            for i in range(8 // length):
                some = mgpu.utils.vector_concat(eight[length * i : length * (i + 1)])
                values[place if length == 8 else (*place[:-1], i, 0)] = some

    return fetched(codes, table)
