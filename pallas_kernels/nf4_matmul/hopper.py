r"""nf4_matmul on Hopper: W decoded once a block into shared memory, from where wgmma reads it.

A block is two compute warpgroups and one that copies (TMA). A step of the contraction is 64 wide:

    copy         codes 4 KB, scales, x      -> ring of `stages`
    warpgroup 0  decode half of the W tile  \  slot i % 3 of W, then both meet at a barrier
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
from pallas_kernels.backends import Unsupported
from pallas_kernels.nf4_matmul import decode, mosaic
from pallas_kernels.nf4_matmul.mosaic import COLUMNS, swizzled
from pallas_kernels.nf4_matmul.operands import STEP, check, operands
from pallas_kernels.nf4_matmul.weight import LowRank, Weight
from pallas_kernels.nf4_matmul.work import Kernel, assemble, share, traced_once
from pallas_kernels.registers import store

W_SLOTS = 3
COPY_REGISTERS = 40  # of the copying warpgroup; the others share the rest


def product(
    x: Float[Array, "M contracted"], w: Weight, low: LowRank | None, *, transposed: bool
) -> Float[Array, "M n"]:
    """x W^T, or x W when `transposed`, and the low-rank term."""
    target = gpu.require((9, 0))
    check(x, w)
    m, (out, width) = x.shape[0], w.shape
    if not m:
        raise Unsupported("x has no rows")
    n, contraction = (width, out) if transposed else (out, width)
    rows, stages = (256, 3) if m > 128 else (128, 5)
    tiles = pl.cdiv(m, rows), pl.cdiv(n, COLUMNS)
    work = share(*tiles, pl.cdiv(contraction, STEP), target.gpu.sms)
    fused = low is not None and work.whole
    h_b = mosaic.low_rank_operands(low, rows, transposed) if fused else ()
    x = mosaic.padded(x)
    kernel = Kernel(
        work,
        rows,
        stages,
        (x.shape[0], n + -n % STEP),
        x.dtype,
        h_b[0].shape[1] if h_b else 0,
        transposed,
        target.interpret,
    )
    y = launch(kernel)(x, *operands(w, x.dtype, x.dtype), *h_b)
    if work.whole:
        return y[:m, :n]
    return assemble(y, work, m, n, x.dtype, low)


@traced_once
def launch(k: Kernel):
    """The kernel as a function of (x, codes, scales, table), and (h, b) when it has a rank.

    It gives y of `shape` when the work is whole, else the float32 slots of partial tiles.
    """
    w_shape = (STEP, COLUMNS) if k.transposed else (COLUMNS, STEP)
    half = k.rows // 2
    y = k.shape if k.work.whole else (k.work.slots, k.rows, COLUMNS)
    return plgpu.kernel(
        functools.partial(body, k),
        out_type=jax.ShapeDtypeStruct(y, k.dtype if k.work.whole else jnp.float32),
        grid=(k.work.blocks,),
        grid_names=("block",),
        num_threads=3,
        thread_name="group",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        scratch_types={
            "w_s": plgpu.SMEM((W_SLOTS, *w_shape), k.dtype, transforms=swizzled(k.dtype)),
            "y_s": plgpu.SMEM((2, COLUMNS // 64, half, 64), k.dtype, transforms=swizzled(k.dtype)),
            "met": plgpu.Barrier(num_arrivals=2),
            "parted": plgpu.Barrier(num_arrivals=3),
            "copied": plgpu.Barrier(num_arrivals=2, num_barriers=2),
        },
    )


def body(k: Kernel, x_g, codes_g, scales_g, table_g, *refs, w_s, y_s, met, parted, copied):
    """One block: its tile, or its parts of tiles one after the other."""
    *low_g, y_g = refs
    half = k.rows // 2
    group, block = lax.axis_index("group"), lax.axis_index("block")
    table = decode.load_table(table_g, interpret=k.interpret)

    def meet():
        plgpu.barrier_arrive(met)
        plgpu.barrier_wait(met)

    def multiply(acc, x_half, w_tile):
        plgpu.wgmma(acc, x_half, w_tile if k.transposed else w_tile.T)

    def step(index, x_s, codes_s, scales_s, acc):
        w_tile = w_s.at[lax.rem(index[0], W_SLOTS)]
        mosaic.dequantize_half(
            group, codes_s, scales_s, w_tile, table, transposed=k.transposed, interpret=k.interpret
        )
        plgpu.commit_smem()
        meet()
        multiply(acc, x_s.at[pl.ds(group * half, half)], w_tile)
        plgpu.wgmma_wait(1)
        return acc

    def pipeline(step, context, row, column, first, steps):
        return plgpu.emit_pipeline_warp_specialized(
            step,
            grid=(steps,),
            in_specs=mosaic.in_specs(k.rows, k.dtype, row, column, first, k.transposed),
            max_concurrent_steps=k.stages,
            memory_registers=COPY_REGISTERS,
            wg_axis="group",
            num_compute_wgs=2,
            compute_context=context,
        )

    def compute(row, column, first, steps, write, allocations=None):
        def context(run):
            def accumulate(acc):
                run(acc)
                if k.rank:
                    add_low_rank(acc, row, column)
                write(acc[...])

            pl.run_scoped(accumulate, plgpu.ACC((half, COLUMNS), jnp.float32))

        pipeline(step, context, row, column, first, steps)(
            x_g, codes_g, scales_g, allocations=allocations
        )

    def add_low_rank(acc, row, column):
        """The term h b as further steps, through the slots that the last W and y leave free."""
        h_g, b_g = low_g
        plgpu.wgmma_wait(0)
        meet()
        h_s, b_s = y_s.at[group, 0], w_s.at[group]
        columns = pl.ds(column * COLUMNS, COLUMNS)
        for i in range(0, k.rank, STEP):
            ranks = pl.ds(i, STEP)
            mine = pl.ds(row * k.rows + group * half, half)
            b_tile = b_g.at[ranks, columns] if k.transposed else b_g.at[columns, ranks]
            plgpu.copy_gmem_to_smem(h_g.at[mine, ranks], h_s, copied.at[group])
            plgpu.copy_gmem_to_smem(b_tile, b_s, copied.at[group])
            plgpu.barrier_wait(copied.at[group])
            multiply(acc, h_s, b_s)
            plgpu.wgmma_wait(0)

    def write_tile(row, column, acc):
        y = acc.astype(k.dtype)
        for j in range(COLUMNS // 64):
            y_s[group, j] = y[:, 64 * j : 64 * j + 64]
        plgpu.commit_smem()
        for j in range(COLUMNS // 64):
            rows = pl.ds(row * k.rows + group * half, half)
            columns = pl.ds(column * COLUMNS + 64 * j, 64)
            plgpu.copy_smem_to_gmem(y_s.at[group, j], y_g.at[rows, columns])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def write_part(slot, acc):
        store(y_g.at[slot, pl.ds(group * half, half)], acc, optimized=False)

    def all_parts(allocations):
        first_tile, number = k.work.parts(block)

        def part(i, _):
            tile = first_tile + i
            first, steps = k.work.part(block, tile)
            write = functools.partial(write_part, block + tile)
            compute(*k.work.place(tile), first, steps, write, allocations)
            # The next part begins with copies into slots that this one still multiplies by.
            plgpu.barrier_arrive(parted)
            plgpu.barrier_wait(parted)

        lax.fori_loop(0, number, part, None)

    if k.work.whole:
        row, column = plgpu.planar_snake(block, (k.work.rows, k.work.columns), 1, 8)
        compute(row, column, 0, k.work.steps, functools.partial(write_tile, row, column))
    else:
        none = pipeline(lambda *_: None, lambda *_: None, 0, 0, 0, k.work.steps)
        allocations = none.get_allocations(x_g, codes_g, scales_g)
        pl.run_scoped(all_parts, allocations, collective_axes="group")
