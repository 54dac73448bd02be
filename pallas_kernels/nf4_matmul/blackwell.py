"""nf4_matmul on Blackwell: W decoded into shared memory, multiplied by tcgen05 into tensor memory.

The product is computed transposed, y^T = W x^T: W is the operand of 128 rows, and the rows of x are
the n of the instruction, 64, 128 or 256. At n = 256 it reads 12 KB of shared memory in 128 cycles;
two instructions with 128 rows of x each would read 16 KB, which is all that can be read.

A block has two warpgroups that decode and a third, of which one warp copies and one multiplies. A
step of the contraction is 64 wide:

    copy      codes 4 KB, scales, x   -> slot i % stages of the ring, when step i - stages is freed
    decode    a half of W each        -> slot i % 3 of W, when step i - 3 is freed
    multiply  tcgen05, which runs by itself, and frees step i when it is over

The warps wait for data and for slots, never for a product of the same step. They go on without a
pause from one part of a tile to the next; only the decoding warpgroups stop, to write the result.

The low-rank term h b is some more steps: h lies in the place of x, and b is copied into that of W.
Backward, dx = dy W, is the same kernel, which multiplies by W's tile as it lies.
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

STAGES = {64: 8, 128: 6, 256: 4}  # of the ring, by rows of a tile: what fits in shared memory
W_SLOTS = 3
CHUNK = 64  # rows that a warpgroup writes at a time
DECODERS = 2  # warpgroups
COPY, MULTIPLY = 0, 1  # warps of the third
COPY_REGISTERS, DECODE_REGISTERS = 40, 232


def product(
    x: Float[Array, "M contracted"], w: Weight, low: LowRank | None, *, transposed: bool
) -> Float[Array, "M n"]:
    """x W^T, or x W when `transposed`, and the low-rank term."""
    target = gpu.require((10, 0), (10, 3))
    check(x, w)
    m, (out, width) = x.shape[0], w.shape
    if not m:
        raise Unsupported("x has no rows")
    n, contraction = (width, out) if transposed else (out, width)
    rows = next((rows for rows in STAGES if m <= rows), max(STAGES))
    tiles = pl.cdiv(m, rows), pl.cdiv(n, COLUMNS)
    work = share(*tiles, pl.cdiv(contraction, STEP), target.gpu.sms)
    h_b = mosaic.low_rank_operands(low, rows, transposed) if low is not None else ()
    x = mosaic.padded(x)
    kernel = Kernel(
        work,
        rows,
        STAGES[rows],
        (x.shape[0], n + -n % STEP),
        x.dtype,
        h_b[0].shape[1] if h_b else 0,
        transposed,
        target.interpret,
    )
    y = launch(kernel)(x, *operands(w, x.dtype, x.dtype), *h_b)
    return y[:m, :n] if work.whole else assemble(y, work, m, n, x.dtype)


@traced_once
def launch(k: Kernel):
    """The kernel as a function of (x, codes, scales, table), and (h, b) when it has a rank.

    It gives y of `shape` when the work is whole, else the float32 slots of partial tiles.
    """
    w, codes, scales = (COLUMNS, STEP), (COLUMNS, STEP // 2), (1, COLUMNS)
    if k.transposed:
        w, codes, scales = (STEP, COLUMNS), (STEP, COLUMNS // 2), (COLUMNS // STEP, STEP)
    y = k.shape if k.work.whole else (k.work.slots, k.rows, COLUMNS)
    operand = functools.partial(plgpu.SMEM, dtype=k.dtype, transforms=swizzled(k.dtype))
    ring = functools.partial(plgpu.Barrier, num_barriers=k.stages)
    return plgpu.kernel(
        functools.partial(body, k),
        out_type=jax.ShapeDtypeStruct(y, k.dtype if k.work.whole else jnp.float32),
        grid=(k.work.blocks,),
        grid_names=("block",),
        num_threads=DECODERS + 1,
        thread_name="group",
        # No warp reads what it writes, so loads and stores need no barriers around them.
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True
        ),
        scratch_types={
            "x_s": operand((k.stages, k.rows, STEP)),
            "codes_s": plgpu.SMEM((k.stages, *codes), jnp.uint8),
            "scales_s": plgpu.SMEM((k.stages, *scales), k.dtype),
            "w_s": operand((W_SLOTS, *w)),
            "y_s": operand((DECODERS, min(k.rows // DECODERS, CHUNK), COLUMNS)),
            "acc": plgpu.TMEM((COLUMNS, k.rows), jnp.float32),
            "x_came": ring(),
            "codes_came": ring(num_arrivals=2),
            "decoded": plgpu.Barrier(
                num_barriers=W_SLOTS, num_arrivals=DECODERS, orders_tensor_core=True
            ),
            "b_came": plgpu.Barrier(num_barriers=DECODERS),
            "freed": ring(orders_tensor_core=True),
            "done": plgpu.Barrier(orders_tensor_core=True),
        },
    )


def body(
    k: Kernel,
    x_g,
    codes_g,
    scales_g,
    table_g,
    *low_and_y_g,
    x_s,
    codes_s,
    scales_s,
    w_s,
    y_s,
    acc,
    x_came,
    codes_came,
    decoded,
    b_came,
    freed,
    done,
):
    """One block: its tile, or its parts of tiles one after the other."""
    *low_g, y_g = low_and_y_g
    group, block = lax.axis_index("group"), lax.axis_index("block")
    half, chunk = k.rows // DECODERS, y_s.shape[1]

    def each_part(do):
        """do(tile, first step, steps, steps of low rank, steps of this block before); all steps."""
        if k.work.whole:
            do(block, 0, k.work.steps, k.rank // STEP, 0)
            return k.work.steps + k.rank // STEP
        first_tile, number = k.work.parts(block)

        def part(i, before):
            first, steps = k.work.part(block, first_tile + i)
            more = jnp.where(first + steps == k.work.steps, k.rank // STEP, 0)
            do(first_tile + i, first, steps, more, before)
            return before + steps + more

        return lax.fori_loop(0, number, part, jnp.int32(0))

    def each_step(start, stop, do):
        lax.fori_loop(start, stop, lambda i, _: do(i), None)

    def wait_freed(n):
        """Until the slots of step n are free."""
        plgpu.barrier_wait(freed.at[lax.rem(n, k.stages)])

    def wait_freed_rest(steps, last):
        """For the last steps: who waits for a barrier must see each time that it completes."""
        each_step(jnp.maximum(steps - last, 0), steps, wait_freed)

    def place(tile):
        if k.work.whole:
            return plgpu.planar_snake(tile, (k.work.rows, k.work.columns), 1, 8)
        return k.work.place(tile)

    def window(ref, at, shape):
        """The block of `shape` at a place counted in such blocks."""
        return ref.at[tuple(pl.ds(i * size, size) for i, size in zip(at, shape, strict=True))]

    def of_w(column, step):
        """A place in what lies as W does."""
        return (step, column) if k.transposed else (column, step)

    def copy(tile, first, steps, more, before):
        row, column = place(tile)

        def fill(n, *copies):
            pl.when(n >= k.stages)(lambda: wait_freed(n - k.stages))
            slot = lax.rem(n, k.stages)
            for source, at, target, came in copies:
                source = window(source, at, target.shape[1:])
                plgpu.copy_gmem_to_smem(source, target.at[slot], came.at[slot])

        def step(i):
            j = first + i
            fill(
                before + i,
                (x_g, (row, j), x_s, x_came),
                (codes_g, of_w(column, j), codes_s, codes_came),
                (scales_g, of_w(column, j)[::-1], scales_s, codes_came),
            )

        each_step(0, steps, step)
        if k.rank:
            each_step(
                0, more, lambda i: fill(before + steps + i, (low_g[0], (row, i), x_s, x_came))
            )

    def multiply(tile, first, steps, more, before):
        def step(i):
            slot, w_slot = lax.rem(before + i, k.stages), lax.rem(before + i, W_SLOTS)
            plgpu.barrier_wait(x_came.at[slot])
            plgpu.barrier_wait(decoded.at[w_slot])
            w = w_s.at[w_slot]
            plgpu.tcgen05_mma(
                acc,
                w.T if k.transposed else w,
                x_s.at[slot].T,
                freed.at[slot],
                accumulate=i > 0,
            )

        each_step(0, steps + more, step)
        plgpu.tcgen05_commit_arrive(done)

    def decode_and_write(table, tile, first, steps, more, before):
        def w_slot(n):
            pl.when(n >= W_SLOTS)(lambda: wait_freed(n - W_SLOTS))
            return lax.rem(n, W_SLOTS)

        def step(i):
            n = before + i
            slot, target = lax.rem(n, k.stages), w_slot(n)
            plgpu.barrier_wait(codes_came.at[slot])
            mosaic.dequantize_half(
                group,
                codes_s.at[slot],
                scales_s.at[slot],
                w_s.at[target],
                table,
                transposed=k.transposed,
                interpret=k.interpret,
            )
            plgpu.commit_smem()
            plgpu.barrier_arrive(decoded.at[target])

        def low_rank_step(i):
            target = w_slot(before + steps + i)
            rows = w_s.shape[1] // DECODERS  # of the tile of b, whatever they mean
            at = of_w(column, i)
            source = window(low_g[1], (DECODERS * at[0] + group, at[1]), (rows, w_s.shape[2]))
            half_w = w_s.at[target, pl.ds(group * rows, rows)]
            # Not onto `decoded` itself: jax 0.11 has all threads arrive where tensor cores wait.
            plgpu.copy_gmem_to_smem(source, half_w, b_came.at[group])
            plgpu.barrier_wait(b_came.at[group])
            plgpu.barrier_arrive(decoded.at[target])

        row, column = place(tile)
        each_step(0, steps, step)
        if k.rank:
            each_step(0, more, low_rank_step)
        plgpu.barrier_wait(done)
        for i in range(half // chunk):
            write(tile, row, column, group * half + i * chunk)
        # What is decoded next tells the multiplying warp that it may overwrite the accumulator.
        plgpu.wait_load_tmem()

    def write(tile, row, column, first):
        """A chunk of the tile's rows."""
        y = plgpu.async_load_tmem(acc.at[:, pl.ds(first, chunk)], layout=plgpu.Layout.TCGEN05)
        if not k.work.whole:
            y = plgpu.layout_cast(y, plgpu.Layout.TCGEN05_TRANSPOSED)
            store(y_g.at[block + tile, pl.ds(first, chunk)].T, y, optimized=False)
            return
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        store(y_s.at[group].T, y.astype(k.dtype))
        plgpu.commit_smem()
        rows, columns = pl.ds(row * k.rows + first, chunk), pl.ds(column * COLUMNS, COLUMNS)
        plgpu.copy_smem_to_gmem(y_s.at[group], y_g.at[rows, columns])

    @pl.when(group < DECODERS)
    def _():
        plgpu.set_max_registers(DECODE_REGISTERS, action="increase")
        table = decode.load_table(table_g, interpret=k.interpret)
        steps = each_part(functools.partial(decode_and_write, table))
        wait_freed_rest(steps, W_SLOTS)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    @pl.when(group == DECODERS)
    def _():
        plgpu.set_max_registers(COPY_REGISTERS, action="decrease")

        @plgpu.warp_map
        def _(warp):
            @pl.when(warp == COPY)
            def _():
                wait_freed_rest(each_part(copy), k.stages)

            @pl.when(warp == MULTIPLY)
            def _():
                each_part(multiply)
