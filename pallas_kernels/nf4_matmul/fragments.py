"""W decoded from shared memory straight into the registers from which `mma` reads it.

A step multiplies a tile of W, 128 columns of the result by 64 of the contraction, as the left
operand, by 64 columns of x, transposed. The four warps divide W's 128, so that each weight is
decoded once and none passes through shared memory again:

    forward    lane (g, t) of warp w has rows 64 i + 16 w + 8 h + g of W, and k in eights: 4 bytes
    backward   lane (g, t) of warp w has columns 32 w + 4 g + 2 i + h of W, and k in pairs of rows

mma wants neighbours in the contraction side by side. Forward they are, in a byte of codes; but a
lane's eight k are not those that mma gives it, so x is read in the same order. Backward the
contraction runs down the rows of W: shared memory is read transposed, two rows at a time, and
their codes are shuffled together before they are decoded.

tests/pallas_kernels/test_layout.py proves from Mosaic's layouts where each register lies.
"""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from pallas_kernels.nf4_matmul import decode
from pallas_kernels.nf4_matmul.operands import STEP
from pallas_kernels.registers import assembly, inline, word

COLUMNS = 128  # of a tile of the result
TILE = 32  # elements of a row that lie together in shared memory

Layout, Tiling = plgpu.Layout, plgpu.Tiling
# The operands of mma; bfloat16 stands for both types of 16 bits.
LEFT = Layout.MMA_LHS(jnp.bfloat16, m_warps=4)  # W (128, 64)
RIGHT = Layout.MMA_RHS(jnp.bfloat16, m_warps=4)  # x^T (64, rows), the same in every warp
ACCUMULATOR = Layout.MMA_ACC(jnp.bfloat16, m_warps=4)  # y^T (128, rows)

# x (rows, 64): a lane has 8 neighbours, 16 bytes.
EIGHTS = Layout.TILED(
    Tiling(((8, 32), (8,))),
    warp_dims=(plgpu.Replicated(4),),
    lane_dims=(-3, -2),
    vector_dim=-1,
)
ROW_CODES = Layout.WGMMA_8BIT  # codes (128, 32): a lane has 4 bytes, 8 neighbours of a row of W
ROW_SCALES = LEFT.reduce(1)  # scales (128,)
# Codes (64, 32) as uint16, 4 columns of W each: a lane has two rows of one.
PAIR_CODES = Layout.MMA_RHS(jnp.uint16, m_warps=1)
# Scales (2, 64), one row for each 64 columns of W, so that two warps share it: a lane has pairs.
PAIR_SCALES = Layout.TILED(
    Tiling(((2, 8), (2,))),
    warp_dims=(-3, plgpu.Replicated(2)),
    lane_dims=(plgpu.Replicated(8), -2),
    vector_dim=-1,
)
# y (rows, 128), forward and backward: 2 and 8 neighbours a lane.
OUT = Layout.TILED(
    Tiling(((8, 64), (16,), (8,), (2,))), warp_dims=(-4,), lane_dims=(-5, -2), vector_dim=-1
)
OUT_BACKWARD = Layout.TILED(
    Tiling(((8, 128), (32,), (8,))), warp_dims=(-3,), lane_dims=(-4, -2), vector_dim=-1
)


def columns(transposed: bool) -> np.ndarray:
    """Which column of a tile of the result is row r of LEFT and of ACCUMULATOR, (128,)."""
    columns = np.arange(COLUMNS)
    if transposed:  # 32 w + 4 g + 2 i + h, in the order of 64 i + 16 w + 8 h + g
        return columns.reshape(4, 8, 2, 2).transpose(2, 0, 3, 1).reshape(-1)
    return columns


def tiled(dtype: DTypeLike) -> tuple:
    """The transforms of shared memory that is copied to and read without bank conflicts."""
    width = jnp.dtype(dtype).itemsize * TILE
    return plgpu.TilingTransform((8, TILE)), plgpu.SwizzleTransform(width)


def fence() -> None:
    """In a kernel: ptxas moves no access to memory across it."""

    @plgpu.inline_mgpu()
    def run(_):
        nothing = ir.Type.parse("!llvm.void")
        llvm.inline_asm(nothing, [], "bar.warp.sync 0xffffffff;", "", has_side_effects=True)

    run()


def read_x(x_s, *, transposed: bool, interpret: bool):
    """x^T (64, rows), the contraction in the order of W's."""
    if interpret:
        return x_s[...].T
    if transposed:
        return plgpu.load(x_s.T, layout=RIGHT)
    eights = plgpu.load(x_s, layout=EIGHTS)

    @inline((EIGHTS,), plgpu.ShapeDtypeStruct(eights.shape[::-1], eights.dtype, layout=RIGHT))
    def pairs(new, old):
        for (row, k32, *_), register in np.ndenumerate(old):
            for r in range(4):
                pair = mgpu.utils.vector_slice(register, slice(2 * r, 2 * r + 2))
                new[2 * k32 + r // 2, row, r % 2, 0, 0, 0, 0, 0] = pair

    return pairs(eights)


def read_w(codes_s, scales_s, table, dtype: DTypeLike, *, transposed: bool, interpret: bool):
    """W (128, 64), or W^T when W is multiplied as it lies (`transposed`, the backward product).

    codes (128, 32) bytes, scales (1, 128); transposed: codes (64, 32) uint16, scales (2, 64).
    """
    if interpret:
        return read_w_jnp(codes_s[...], scales_s[...], table, dtype, transposed)
    read = read_w_transposed if transposed else read_w_rows
    return read(codes_s, scales_s, table, dtype)


def read_w_jnp(codes, scales, table, dtype: DTypeLike, transposed: bool):
    """The twin for the interpreter, in the natural order."""
    if not transposed:
        return decode.lookup_jnp(codes, table, dtype) * scales.T.astype(dtype)
    codes = lax.bitcast_convert_type(codes, jnp.uint8).reshape(STEP, COLUMNS // 2)
    values = decode.lookup_jnp(codes, table, dtype)
    return (values * jnp.repeat(scales.T, STEP, axis=1).astype(dtype)).T


def read_w_rows(codes_s, scales_s, table, dtype: DTypeLike):
    """A register of codes is one row's: its four pairs go to two steps of mma, in their order."""
    codes = plgpu.load(codes_s, layout=ROW_CODES)
    scales = plgpu.load(scales_s.at[0], layout=ROW_SCALES).astype(dtype)

    @inline(
        (ROW_CODES, ROW_SCALES, decode.TABLE),
        plgpu.ShapeDtypeStruct((COLUMNS, STEP), dtype, layout=LEFT),
    )
    def values(new, codes, scales, table):
        for (i, k32, _, _, h, *_), register in np.ndenumerate(codes):
            scale = mgpu.utils.vector_concat([scales[i, 0, h, 0, 0]] * 2)
            for r, pair in enumerate(decode.look_up(word(register), table, dtype)):
                place = i, 2 * k32 + r // 2, 0, r % 2, h, 0, 0, 0, 0
                new[place] = arith.mulf(pair, scale)

    return values(codes, scales, table)


def read_w_transposed(codes_s, scales_s, table, dtype: DTypeLike):
    """Two registers of codes, of 4 columns and 2 rows each, are decoded as pairs of rows."""
    codes = plgpu.load(codes_s, layout=PAIR_CODES)
    scales = plgpu.load(scales_s, layout=PAIR_SCALES).astype(dtype)

    @inline(
        (PAIR_CODES, PAIR_SCALES, decode.TABLE),
        plgpu.ShapeDtypeStruct((COLUMNS, STEP), dtype, layout=LEFT),
    )
    def values(new, codes, scales, table):
        for k16 in range(STEP // 16):
            eights = [word(register) for register in codes[k16, 0].flat]
            for h, four in enumerate(assembly(SHUFFLE, eights, 2)):
                for r, pair in enumerate(decode.look_up(four, table, dtype)):
                    eight, i = divmod(r, 2)
                    scale = scales[0, 2 * k16 + eight, 0, 0, 0]
                    new[i, k16, 0, eight, h, 0, 0, 0, 0] = arith.mulf(pair, scale)

    return values(codes, scales, table)


# Two registers hold four columns of two rows each, as nibbles a0 a1 a2 a3 b0 b1 b2 b3. The results
# are a0 b0 a2 b2 of the first, then of the second; and a1 b1 a3 b3 of both.
SHUFFLE = f"""{{ .reg .b32 a, b, c;
 prmt.b32 a, $2, $3, {0x5410}; prmt.b32 b, $2, $3, {0x7632};
 shr.u32 c, b, 4; lop3.b32 $0, a, c, {0xF0F0F0F0}, {0xE4};
 shl.b32 c, a, 4; lop3.b32 $1, c, b, {0xF0F0F0F0}, {0xE4}; }}"""


def upright(acc, *, transposed: bool, interpret: bool):
    """y (rows, 128) in its natural order from an accumulator y^T (128, rows), float32."""
    if interpret:
        return acc.T
    out = OUT_BACKWARD if transposed else OUT

    @inline((ACCUMULATOR,), plgpu.ShapeDtypeStruct(acc.shape[::-1], acc.dtype, layout=out))
    def turned(new, old):
        f32 = ir.F32Type.get()
        one = ir.VectorType.get((1,), f32)
        for row in range(old.shape[1]):
            pairs = {}
            for i, h in np.ndindex(2, 2):
                register = old[i, row, 0, 0, h, 0, 0, 0, 0]
                two = [word(mgpu.utils.vector_slice(register, slice(c, c + 1))) for c in range(2)]
                pairs[i, h] = [mgpu.utils.bitcast(each, one) for each in assembly(TURN, two, 2)]
                if not transposed:
                    new[row, i, 0, 0, h, 0, 0] = mgpu.utils.vector_concat(pairs[i, h])
            if transposed:
                new[row, 0, 0, 0, 0, 0] = mgpu.utils.vector_concat(
                    [pairs[i, h][c] for c in range(2) for i in range(2) for h in range(2)]
                )

    return turned(acc)


# Transposes 8 by 8 float32 over a warp, a lane holding two of a row: their halves one by one.
TURN = f"""{{ .reg .b32 l, h;
 prmt.b32 l, $2, $3, {0x5410}; prmt.b32 h, $2, $3, {0x7632};
 movmatrix.sync.aligned.m8n8.trans.b16 l, l; movmatrix.sync.aligned.m8n8.trans.b16 h, h;
 prmt.b32 $0, l, h, {0x5410}; prmt.b32 $1, l, h, {0x7632}; }}"""
