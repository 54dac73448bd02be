"""nf4_matmul on Ampere and Ada, and on later GPUs when their own kernel refuses: `mma`."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels import gpu
from pallas_kernels.backends import Unsupported
from pallas_kernels.gpu import Gpu
from pallas_kernels.nf4_matmul import decode, fragments
from pallas_kernels.nf4_matmul.fragments import ACCUMULATOR, COLUMNS, tiled
from pallas_kernels.nf4_matmul.operands import STEP, check, operands
from pallas_kernels.nf4_matmul.stores import store
from pallas_kernels.nf4_matmul.weight import Weight
from pallas_kernels.nf4_matmul.work import Work, assemble, share

CAPABILITIES = (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0)
CHUNK = 32  # rows of x in registers at a time
RESERVED = 1024  # bytes of shared memory that the driver keeps for itself, a block


def forward(x: Float[Array, "M in"], w: Weight) -> Float[Array, "M out"]:
    """x W^T."""
    return product(x, w, transposed=False)


def backward(dy: Float[Array, "M out"], w: Weight) -> Float[Array, "M in"]:
    """dy W."""
    return product(dy, w, transposed=True)


@dataclasses.dataclass(frozen=True)
class Tile:
    rows: int
    stages: int
    blocks: int  # a SM


def choose(gpu: Gpu, m: int) -> Tile:
    rows = 64 if m <= 64 else 128
    blocks = 2
    stage = rows * STEP * 2 + COLUMNS * STEP // 2 + COLUMNS * 4
    stages = min((gpu.shared_bytes_sm // blocks - RESERVED) // stage, 4)
    return Tile(rows, stages, blocks)


def product(x, w: Weight, *, transposed: bool):
    """x W^T, or x W when `transposed`."""
    target = gpu.require(*CAPABILITIES)
    check(x, w)
    m, (out, width) = x.shape[0], w.shape
    n, contraction = (width, out) if transposed else (out, width)
    if contraction % STEP:
        raise Unsupported(f"W is {w.shape}: dy W goes through `out` in steps of {STEP}")
    tile = choose(target.gpu, m)
    codes, scales, table = operands(w, x.dtype, jnp.float32)
    if transposed:
        codes = lax.bitcast_convert_type(codes.reshape(out, width // 4, 2), jnp.uint16)
        scales = scales.reshape(width // STEP, out // STEP, STEP).swapaxes(0, 1)
    # A copy must not pass the end of an array.
    x = at_least(x, 0, tile.rows)
    if transposed:
        codes = at_least(codes, 1, COLUMNS // 4)
        scales = at_least(scales, 1, COLUMNS // STEP)
    else:
        codes, scales = at_least(codes, 0, COLUMNS), at_least(scales, 1, COLUMNS)
    shape = max(m, tile.rows), max(n, COLUMNS)
    work = share(
        pl.cdiv(shape[0], tile.rows),
        pl.cdiv(shape[1], COLUMNS),
        contraction // STEP,
        target.gpu.sms * tile.blocks,
    )
    tma = target.interpret or target.gpu.capability >= (9, 0)
    run = build(work, tile, shape, x.dtype, transposed, target.interpret, tma)
    y = run(x, codes, scales, table)
    if not work.whole:
        y = assemble(y, work, work.rows * tile.rows, work.columns * COLUMNS, x.dtype)
        y = without_overlap(without_overlap(y, 0, shape[0], tile.rows), 1, shape[1], COLUMNS)
    return y[:m, :n]


def at_least(a, axis: int, size: int):
    """`a` with zeros after it up to `size`."""
    rest = [(0, max(size - a.shape[i], 0) if i == axis else 0) for i in range(a.ndim)]
    return jnp.pad(a, rest) if any(after for _, after in rest) else a


def without_overlap(y, axis: int, size: int, tile: int):
    """Tiles side by side, of which the last began early so as to end at `size`: each once."""
    twice = y.shape[axis] - size
    if not twice:
        return y
    last = y.shape[axis] - tile
    before = lax.slice_in_dim(y, 0, last, axis=axis)
    return jnp.concatenate([before, lax.slice_in_dim(y, last + twice, None, axis=axis)], axis)


def build(
    work: Work,
    tile: Tile,
    shape: tuple[int, int],
    dtype,
    transposed: bool,
    interpret: bool,
    tma: bool,
):
    """The kernel as a function of (x, codes, scales, table).

    It gives y of `shape` when the work is whole, else the float32 slots of partial tiles.
    """
    rows = tile.rows
    order = {"transposed": transposed, "interpret": interpret}

    def kernel(x_g, codes_g, scales_g, table_g, y_g):
        table = decode.load_table(table_g, interpret=interpret)
        block = lax.axis_index("block")

        def step(_, x_s, codes_s, scales_s, acc):
            w = fragments.read_w(codes_s, scales_s, table, dtype, **order)
            acc = [
                plgpu.mma(each, w, fragments.read_x(x_s.at[pl.ds(CHUNK * i, CHUNK)], **order))
                for i, each in enumerate(acc)
            ]
            if tma:
                plgpu.commit_smem()
            return acc

        def compute(row, column, first, steps, write):
            x_b = x_g.at[pl.ds(row, rows)]
            if transposed:
                codes_b = codes_g.at[:, pl.ds(column // 4, COLUMNS // 4)]
                scales_b = scales_g.at[:, pl.ds(column // STEP, COLUMNS // STEP)]
                w_specs = [
                    plgpu.BlockSpec(
                        (STEP, COLUMNS // 4),
                        lambda i: (first + i, 0),
                        transforms=tiled(32, jnp.uint16),
                    ),
                    plgpu.BlockSpec((None, COLUMNS // STEP, STEP), lambda i: (first + i, 0, 0)),
                ]
            else:
                codes_b = codes_g.at[pl.ds(column, COLUMNS)]
                scales_b = scales_g.at[:, pl.ds(column, COLUMNS)]
                w_specs = [
                    plgpu.BlockSpec(
                        (COLUMNS, STEP // 2),
                        lambda i: (0, first + i),
                        transforms=tiled(32, jnp.uint8),
                    ),
                    plgpu.BlockSpec((1, COLUMNS), lambda i: (first + i, 0)),
                ]
            x_spec = plgpu.BlockSpec(
                (rows, STEP),
                lambda i: (0, first + i),
                transforms=tiled(64 if transposed else 32, dtype),
            )
            zeros = jnp.zeros((COLUMNS, CHUNK), jnp.float32)
            acc = plgpu.emit_pipeline(
                step,
                grid=(steps,),
                in_specs=[x_spec, *w_specs],
                max_concurrent_steps=tile.stages,
                init_carry=[plgpu.layout_cast(zeros, ACCUMULATOR)] * (rows // CHUNK),
            )(x_b, codes_b, scales_b)
            for i, each in enumerate(acc):
                write(CHUNK * i, fragments.upright(each, **order))

        def origin(row, column):
            return jnp.minimum(row * rows, shape[0] - rows), jnp.minimum(
                column * COLUMNS, shape[1] - COLUMNS
            )

        if work.whole:
            row, column = origin(*plgpu.planar_snake(block, (work.rows, work.columns), 1, 8))

            def write(i, acc):
                place = pl.ds(row + i, CHUNK), pl.ds(column, COLUMNS)
                store(y_g.at[place], acc.astype(dtype), optimized=False)

            compute(row, column, 0, work.steps, write)
            return

        first_tile, number = work.parts(block)

        def part(i, _):
            t = first_tile + i
            first, steps = work.part(block, t)

            def write(i, acc):
                store(y_g.at[block + t, pl.ds(i, CHUNK)], acc, optimized=False)

            compute(*origin(*work.place(t)), first, steps, write)

        lax.fori_loop(0, number, part, None)

    y = shape if work.whole else (work.slots, rows, COLUMNS)
    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct(y, dtype if work.whole else jnp.float32),
        grid=(work.blocks,),
        grid_names=("block",),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    )
