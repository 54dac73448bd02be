"""nf4_matmul on Ampere and Ada, and on later GPUs where their own kernel refuses: `mma`, cp.async.

A block is one warpgroup and computes y^T: W, decoded into registers, is the left operand and x the
right one. Nothing overlaps within a warp, so two blocks share an SM: one decodes while the other
multiplies. A step of the contraction is 64 wide:

    copy      codes 4 KB, scales 0.5 KB, x 16 KB      -> ring of `stages`
    decode    each warp its 32 columns of the result, 64 weights a thread
    multiply  by x, 64 rows at a time, which every warp reads in full

cp.async knows no bounds, so the last tile of rows, or columns, begins early enough to end with the
result; what it shares with the tile before is computed twice. And Mosaic takes what it copies
untiled for contiguous, whatever the strides: x and codes are tiled also for that reason, and the
scales of a step lie together in memory. The interpreter, which copies by TMA, sees neither.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels import gpu, registers
from pallas_kernels.backends import Unsupported
from pallas_kernels.gpu import Gpu
from pallas_kernels.nf4_matmul import decode, fragments
from pallas_kernels.nf4_matmul.fragments import ACCUMULATOR, COLUMNS, tiled
from pallas_kernels.nf4_matmul.operands import STEP, check, operands, pad
from pallas_kernels.nf4_matmul.weight import LowRank, Weight
from pallas_kernels.nf4_matmul.work import Kernel, assemble, share, traced_once

ROWS = 128  # of a tile at most: 128 accumulators a thread, half of all registers
CHUNK = 64  # rows of x in registers at a time, at most
RANKS = 16  # of the low-rank term at a time: one step of mma
BLOCKS = 2  # a SM
RESERVED = 1024  # bytes of shared memory that CUDA keeps for itself, a block


def product(
    x: Float[Array, "M contracted"], w: Weight, low: LowRank | None, *, transposed: bool
) -> Float[Array, "M n"]:
    """x W^T, or x W when `transposed`, and the low-rank term."""
    target = gpu.require(*gpu.FROM_AMPERE)
    check(x, w)
    m, (out, width) = x.shape[0], w.shape
    n, contraction = (width, out) if transposed else (out, width)
    if contraction % STEP:
        raise Unsupported(f"W is {w.shape}: dy W takes {STEP} rows of W at a time, to the last")
    tma = target.gpu.capability >= (9, 0)
    if tma and transposed and n > COLUMNS and n % COLUMNS:
        raise Unsupported(f"W is {w.shape}: copies by TMA want `in` in whole tiles of {COLUMNS}")
    rows, stages = tile(target.gpu, m)
    shape = max(m + (-m % 8 if tma else 0), rows), max(n, COLUMNS)
    tiles = pl.cdiv(shape[0], rows), pl.cdiv(shape[1], COLUMNS)
    work = share(*tiles, contraction // STEP, target.gpu.sms * BLOCKS)
    rank = 0 if low is None or not work.whole else low.h.shape[1] + -low.h.shape[1] % RANKS
    k = Kernel(work, rows, stages, shape, x.dtype, rank, transposed, target.interpret)
    x = at_least(x, shape[0], 0)
    extra = low_rank_operands(k, low) if rank else ()
    y = launch(k)(x, *w_operands(k, w), *extra)
    if not work.whole:
        y = assemble(y, work, work.rows * rows, work.columns * COLUMNS, jnp.float32)
    y = once(once(y, 0, rows, shape[0]), 1, COLUMNS, shape[1])[:m, :n]
    if low is not None and not rank:
        y = y + jnp.dot(*low, preferred_element_type=jnp.float32)
    return y.astype(x.dtype)


def tile(gpu: Gpu, m: int) -> tuple[int, int]:
    """(rows, stages): as few tiles as ROWS allows, no taller than need be; what memory holds."""
    m = max(m, 1)
    rows = 32 * pl.cdiv(m, 32 * pl.cdiv(m, ROWS))
    stage = rows * STEP * 2 + COLUMNS * STEP // 2 + COLUMNS * 4
    return rows, min((gpu.shared_bytes_sm // BLOCKS - RESERVED) // stage, 4)


def w_operands(k: Kernel, w: Weight):
    """(codes, scales, table) of at least one tile's columns.

    codes (out, in/2) uint8, scales (in/64, out); transposed: codes (out, in/4) uint16, and scales
    (out/64, in/64, 64), so that those of a step lie together.
    """
    codes, scales, table = operands(w, k.dtype, jnp.float32)
    if not k.transposed:
        return at_least(codes, COLUMNS, 0), at_least(scales, 0, COLUMNS), table
    out, width = w.shape
    codes = lax.bitcast_convert_type(codes.reshape(out, width // 4, 2), jnp.uint16)
    scales = scales.reshape(width // STEP, out // STEP, STEP).swapaxes(0, 1)
    return at_least(codes, 0, COLUMNS // 4), at_least(scales, 0, COLUMNS // STEP, 0), table


def low_rank_operands(k: Kernel, low: LowRank):
    """(h, b) for the kernel: h (M, rank); b (tiles * 128, rank), the columns of each tile in turn.

    They lie as the fragments of W and x do, so that they can be added to the same accumulator.
    """
    h, b = pad(at_least(low.h, k.shape[0], 0), 1, RANKS), pad(at_least(low.b, 0, COLUMNS), RANKS, 1)
    first = [min(COLUMNS * column, k.shape[1] - COLUMNS) for column in range(k.work.columns)]
    order = np.arange(COLUMNS) if k.interpret else fragments.columns(k.transposed)
    return h, b.T[np.add.outer(first, order).reshape(-1)]


def at_least(a, *sizes: int):
    """`a` with zeros up to these sizes."""
    rest = [max(size - have, 0) for size, have in zip(sizes, a.shape, strict=True)]
    return jnp.pad(a, [(0, n) for n in rest]) if any(rest) else a


def once(y, axis: int, tile: int, size: int):
    """Tiles side by side, cut to `size`: the last began early, and its beginning is left out."""
    if y.shape[axis] == size:
        return y
    last = y.shape[axis] - tile
    parts = [(0, last), (last + y.shape[axis] - size, y.shape[axis])]
    return jnp.concatenate([lax.slice_in_dim(y, *part, axis=axis) for part in parts], axis)


@traced_once
def launch(k: Kernel):
    """The kernel as a function of (x, codes, scales, table), and (h, b) when it has a rank.

    It gives y of whole tiles side by side, or the float32 slots of partial tiles.
    """
    y = k.work.slots, k.rows, COLUMNS
    if k.work.whole:
        y = k.work.rows * k.rows, k.work.columns * COLUMNS
    return plgpu.kernel(
        functools.partial(body, k),
        out_type=jax.ShapeDtypeStruct(y, k.dtype if k.work.whole else jnp.float32),
        grid=(k.work.blocks,),
        grid_names=("block",),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    )


def body(k: Kernel, x_g, codes_g, scales_g, table_g, *refs):
    """One block: its tile, or its parts of tiles one after the other."""
    *low_g, y_g = refs
    block = lax.axis_index("block")
    table = decode.load_table(table_g, interpret=k.interpret)
    order = {"transposed": k.transposed, "interpret": k.interpret}
    chunk = math.gcd(k.rows, CHUNK)
    chunks = range(0, k.rows, chunk)

    def step(_, x_s, codes_s, scales_s, acc):
        w = fragments.read_w(codes_s, scales_s, table, k.dtype, **order)
        if not (k.transposed or k.interpret):
            fragments.fence()  # else x is read so early that registers run out
        acc = [
            plgpu.mma(each, w, fragments.read_x(x_s.at[pl.ds(row, chunk)], **order))
            for row, each in zip(chunks, acc, strict=True)
        ]
        if k.interpret:  # by TMA, which must see that these reads are done
            plgpu.commit_smem()
        return acc

    def compute(row, column, first, steps):
        """The accumulators, y^T (128, chunk) each, of some steps of a tile."""
        top = jnp.minimum(row * k.rows, k.shape[0] - k.rows)
        left = jnp.minimum(column * COLUMNS, k.shape[1] - COLUMNS)
        zeros = plgpu.layout_cast(jnp.zeros((COLUMNS, chunk), jnp.float32), ACCUMULATOR)
        acc = plgpu.emit_pipeline(
            step,
            grid=(steps,),
            in_specs=in_specs(k, first),
            max_concurrent_steps=k.stages,
            init_carry=[zeros] * len(chunks),
        )(*windows(k, x_g, codes_g, scales_g, top, left))
        return top, acc

    def store(place, acc, dtype):
        for row, each in zip(chunks, acc, strict=True):
            y = fragments.upright(each, **order).astype(dtype)
            registers.store(place(row), y, optimized=False)

    def part(i, first_tile):
        tile = first_tile + i
        _, acc = compute(*k.work.place(tile), *k.work.part(block, tile))
        store(lambda row: y_g.at[block + tile, pl.ds(row, chunk)], acc, jnp.float32)
        return first_tile

    if not k.work.whole:
        first_tile, number = k.work.parts(block)
        lax.fori_loop(0, number, part, first_tile)
        return
    row, column = plgpu.planar_snake(block, (k.work.rows, k.work.columns), 1, 8)
    top, acc = compute(row, column, 0, k.work.steps)
    if k.rank:
        acc = add_low_rank(k, *low_g, top, column, acc)
    columns = pl.ds(column * COLUMNS, COLUMNS)
    store(lambda at: y_g.at[pl.ds(row * k.rows + at, chunk), columns], acc, k.dtype)


def in_specs(k: Kernel, first) -> list[plgpu.BlockSpec]:
    """Of a tile's x, codes and scales, for its steps from `first` on."""
    x = spec((k.rows, STEP), lambda i: (0, first + i), tiled(k.dtype))
    if k.transposed:
        return [
            x,
            spec((STEP, COLUMNS // 4), lambda i: (first + i, 0), tiled(jnp.uint16)),
            spec((None, COLUMNS // STEP, STEP), lambda i: (first + i, 0, 0)),
        ]
    return [
        x,
        spec((COLUMNS, STEP // 2), lambda i: (0, first + i), tiled(jnp.uint8)),
        spec((1, COLUMNS), lambda i: (first + i, 0)),
    ]


def spec(shape, place, transforms=()) -> plgpu.BlockSpec:
    """A copy in tiles, or else of what lies together in memory."""
    return plgpu.BlockSpec(shape, place, transforms=transforms)


def windows(k: Kernel, x_g, codes_g, scales_g, top, left) -> list:
    """What the tile with this corner reads of each."""
    x_g = x_g.at[pl.ds(top, k.rows)]
    if k.transposed:
        codes = pl.ds(left // 4, COLUMNS // 4)
        return [x_g, codes_g.at[:, codes], scales_g.at[:, pl.ds(left // STEP, COLUMNS // STEP)]]
    columns = pl.ds(left, COLUMNS)
    return [x_g, codes_g.at[columns], scales_g.at[:, columns]]


def add_low_rank(k: Kernel, h_g, b_g, top, column, acc: list) -> list:
    """The accumulators plus h b, read from global memory: it is small and all blocks share it."""
    chunk = acc[0].shape[1]

    def add(i, acc):
        ranks = pl.ds(i * RANKS, RANKS)
        b = b_g.at[pl.ds(column * COLUMNS, COLUMNS), ranks]
        b = plgpu.load(b, layout=fragments.LEFT, optimized=False)
        result = []
        for row, each in zip(range(0, k.rows, chunk), acc, strict=True):
            h = h_g.at[pl.ds(top + row, chunk), ranks]
            h = plgpu.load(h.T, layout=fragments.RIGHT, optimized=False)
            result.append(plgpu.mma(each, b, h))
        return result

    return lax.fori_loop(0, k.rank // RANKS, add, acc)
