"""nf4_matmul on Hopper: W decoded once a block into shared memory, from where wgmma reads it.

A block is two compute warpgroups and one that copies (TMA). A step of the contraction is 64 wide:

    copy         codes 4 KB, scales, x      -> ring of `stages`
    warpgroup 0  decode half of the W tile  \\  slot i % 3 of W, then both meet at a barrier
    warpgroup 1  decode the other half      /
    each         wgmma: its half of x's rows times the whole W tile, in flight during step i + 1

Three slots of W suffice: when a warpgroup passes the barrier of step i, both have waited for the
wgmma of step i - 2, so nobody reads slot (i + 1) % 3 any longer.

Backward, dx = dy W, is the same kernel: the contraction runs along the rows of W, and the tile is
multiplied as it lies instead of transposed.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels import gpu
from pallas_kernels.nf4_matmul import decode
from pallas_kernels.nf4_matmul.operands import STEP, check, operands
from pallas_kernels.nf4_matmul.weight import Weight
from pallas_kernels.nf4_matmul.work import Work, assemble, share

COLUMNS = 128  # of a result tile, and the n of wgmma
W_SLOTS = 3
COPY_REGISTERS = 40  # of the copying warpgroup; the others share the rest


def forward(x: Float[Array, "M in"], w: Weight) -> Float[Array, "M out"]:
    """x W^T."""
    return product(x, w, transposed=False)


def backward(dy: Float[Array, "M out"], w: Weight) -> Float[Array, "M in"]:
    """dy W."""
    return product(dy, w, transposed=True)


def product(x, w: Weight, *, transposed: bool):
    """x W^T, or x W when `transposed`."""
    target = gpu.require((9, 0))
    check(x, w)
    codes, scales, table = operands(w, x.dtype, x.dtype)
    m, (out, width) = x.shape[0], w.shape
    x = padded(x)
    n, contraction = (width, out) if transposed else (out, width)
    rows = 256 if m > 128 else 128
    work = share(pl.cdiv(m, rows), pl.cdiv(n, COLUMNS), pl.cdiv(contraction, STEP), target.gpu.sms)
    stages = 3 if rows == 256 else 5
    shape = x.shape[0], n + -n % STEP
    run = build(work, rows, stages, shape, x.dtype, transposed, target.interpret)
    y = run(x, codes, scales, table)
    return y[:m, :n] if work.whole else assemble(y, work, m, n, x.dtype)


def padded(x):
    """x with zeros up to whole 8 rows and 64 columns, which copies of swizzled tiles need."""
    rest = -x.shape[0] % 8, -x.shape[1] % STEP
    return jnp.pad(x, [(0, n) for n in rest]) if any(rest) else x


def swizzled(dtype) -> tuple:
    """The transforms of a wgmma operand of rows of 128 bytes."""
    return plgpu.TilingTransform((8, 128 // jnp.dtype(dtype).itemsize)), plgpu.SwizzleTransform(128)


def build(
    work: Work,
    rows: int,
    stages: int,
    shape: tuple[int, int],
    dtype,
    transposed: bool,
    interpret: bool,
):
    """The kernel as a function of (x, codes, scales, table).

    It gives y of `shape` when the work is whole, else the float32 slots of partial tiles.
    """
    half = rows // 2  # of a compute warpgroup
    w_shape = (STEP, COLUMNS) if transposed else (COLUMNS, STEP)
    tile = functools.partial(dequantize_half, transposed=transposed, interpret=interpret)

    def pipeline(body, context, row, column, first, steps):
        specs = [
            plgpu.BlockSpec(
                (rows, STEP),
                lambda i: (row, first + i),
                transforms=swizzled(dtype),
                delay_release=1,
            )
        ]
        if transposed:
            specs += [
                plgpu.BlockSpec(
                    (STEP, COLUMNS // 2), lambda i: (first + i, column), delay_release=1
                ),
                plgpu.BlockSpec(
                    (COLUMNS // STEP, STEP), lambda i: (column, first + i), delay_release=1
                ),
            ]
        else:
            specs += [
                plgpu.BlockSpec(
                    (COLUMNS, STEP // 2), lambda i: (column, first + i), delay_release=1
                ),
                plgpu.BlockSpec((1, COLUMNS), lambda i: (first + i, column), delay_release=1),
            ]
        return plgpu.emit_pipeline_warp_specialized(
            body,
            grid=(steps,),
            in_specs=specs,
            max_concurrent_steps=stages,
            memory_registers=COPY_REGISTERS,
            wg_axis="group",
            num_compute_wgs=2,
            compute_context=context,
        )

    def kernel(x_g, codes_g, scales_g, table_g, y_g, w_s, y_s, met, parted):
        table = decode.load_table(table_g, interpret=interpret)
        group = lax.axis_index("group")
        block = lax.axis_index("block")

        def body(index, x_s, codes_s, scales_s, acc):
            w_tile = w_s.at[lax.rem(index[0], W_SLOTS)]
            tile(group, codes_s, scales_s, w_tile, table)
            plgpu.commit_smem()
            plgpu.barrier_arrive(met)
            plgpu.barrier_wait(met)
            x_half = x_s.at[pl.ds(group * half, half)]
            plgpu.wgmma(acc, x_half, w_tile if transposed else w_tile.T)
            plgpu.wgmma_wait(1)
            return acc

        def compute(row, column, first, steps, write, allocations=None):
            def context(run):
                def accumulate(acc):
                    run(acc)
                    write(acc[...])

                pl.run_scoped(accumulate, plgpu.ACC((half, COLUMNS), jnp.float32))

            pipeline(body, context, row, column, first, steps)(
                x_g, codes_g, scales_g, allocations=allocations
            )

        def write_tile(row, column, acc):
            y = acc.astype(dtype)
            for j in range(COLUMNS // 64):
                y_s[group, j] = y[:, 64 * j : 64 * j + 64]
            plgpu.commit_smem()
            for j in range(COLUMNS // 64):
                place = pl.ds(row * rows + group * half, half), pl.ds(column * COLUMNS + 64 * j, 64)
                plgpu.copy_smem_to_gmem(y_s.at[group, j], y_g.at[place])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        def write_part(slot, acc):
            plgpu.store(y_g.at[slot, pl.ds(group * half, half)], acc, optimized=False)

        if work.whole:
            row, column = plgpu.planar_snake(block, (work.rows, work.columns), 1, 8)
            compute(row, column, 0, work.steps, functools.partial(write_tile, row, column))
            return

        def parts(allocations):
            first_tile, number = work.parts(block)

            def part(i, _):
                t = first_tile + i
                row, column = work.place(t)
                first, steps = work.part(block, t)
                compute(
                    row, column, first, steps, functools.partial(write_part, block + t), allocations
                )
                # The next part begins with copies into slots that this one still multiplies by.
                plgpu.barrier_arrive(parted)
                plgpu.barrier_wait(parted)

            lax.fori_loop(0, number, part, None)

        nothing = lambda *_, **__: None
        allocations = pipeline(nothing, nothing, 0, 0, 0, work.steps).get_allocations(
            x_g, codes_g, scales_g
        )
        pl.run_scoped(parts, allocations, collective_axes="group")

    y = shape if work.whole else (work.slots, rows, COLUMNS)
    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct(y, dtype if work.whole else jnp.float32),
        grid=(work.blocks,),
        grid_names=("block",),
        num_threads=3,
        thread_name="group",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        scratch_types={
            "w_s": plgpu.SMEM((W_SLOTS, *w_shape), dtype, transforms=swizzled(dtype)),
            "y_s": plgpu.SMEM((2, COLUMNS // 64, half, 64), dtype, transforms=swizzled(dtype)),
            "met": plgpu.Barrier(num_arrivals=2),
            "parted": plgpu.Barrier(num_arrivals=3),
        },
    )


def dequantize_half(group, codes_s, scales_s, w_s, table, *, transposed: bool, interpret: bool):
    """A warpgroup's half of the W tile: 64 of its rows, or 64 of its columns when `transposed`.

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
