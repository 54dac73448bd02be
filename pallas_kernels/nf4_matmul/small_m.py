"""nf4_matmul for at most 16 rows of x, as in decoding: weights go from codes straight into `mma`.

y^T = W x^T: rows of W are the left operand, decoded in the registers where `mma` wants them, and
the few rows of x the right one. Nothing dense is written, not even to shared memory:

    ring of stages   codes (64, 256 bytes), x (8, 512)         copied ahead: a step. From 9 rows of
                     or (128, 128 bytes), (16, 256)            x on, twice the rows of W share one x
    registers        scales (rows, 8 or 4)                     loaded one step ahead
                     4 bytes of codes -> 8 weights -> two k16 steps of mma
                     y^T += the float32 sum of a block of 64 * its float32 scale

The scale multiplies the sum, so it is not rounded, and there are 4 times fewer products. All is
read as it is stored: XLA copies nothing but x, when it has not 8 or 16 rows.

The contraction is split among blocks (split-K) until each SM has two at work. Their sums are
written in float32 and added by XLA in order: the same bits every time. A single split writes y.

Double-quantized scales are expanded by XLA, once a call. Here their 256 values would be gathered
from shared memory, 5 instructions a scale, 0.3 a weight beside the 3.5 of all else. To decode many
tokens, call `expand_scales` once before: float32 scales cost 1/16 byte a weight.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels import gpu
from pallas_kernels.backends import Unsupported
from pallas_kernels.dequantize.api import expand_scales
from pallas_kernels.nf4_matmul import decode
from pallas_kernels.nf4_matmul import small_m_fragments as fragments
from pallas_kernels.nf4_matmul.operands import STEP as BLOCK
from pallas_kernels.nf4_matmul.operands import check
from pallas_kernels.nf4_matmul.weight import LowRank, Weight
from pallas_kernels.registers import store

MOST = 16  # rows of x
ROWS = 64  # of W, a tile, or twice that
STEP_WEIGHTS = 64 * 512  # of a tile, in a step
X_COLUMNS = 128  # cp.async wants a multiple, for 8 rows of x: 16 bytes for each of 128 threads
VECTOR = 4  # scales that a lane loads at a time
RESERVED = 2048  # bytes of shared memory a block that are not the ring's: barriers, CUDA's own


def product(
    x: Float[Array, "M in"], w: Weight, low: LowRank | None, *, transposed: bool
) -> Float[Array, "M out"]:
    """x W^T and the low-rank term, for at most 16 rows.

    There is no x W: `mma` takes neighbours along the contraction in pairs, and a byte of codes
    holds neighbours along the other axis.
    """
    target = gpu.require(*gpu.FROM_AMPERE)
    if transposed:
        raise Unsupported(
            "this kernel has no backward: weights of a column would have to be paired in registers"
        )
    check(x, w)
    m, (n, k) = x.shape[0], w.shape
    if m > MOST:
        raise Unsupported(f"x has {m} rows; this kernel takes at most {MOST}")
    if n < ROWS:
        raise Unsupported(f"W is {w.shape}: a tile is {ROWS} rows of W")
    plan = share(m, n, k, target.gpu, alone=low is None)
    x = jnp.pad(x, ((0, plan.columns - m), (0, 0)))
    scales = expand_scales(w.scales).reshape(n, k // w.block_size)
    scales = jnp.repeat(scales, w.block_size // BLOCK, axis=1)
    table = jnp.asarray(decode.table_words(w.kind, x.dtype))
    y = launch(plan, x.dtype, target.interpret)(x, w.codes.reshape(n, k // 2), scales, table)
    return y[:m] if plan.whole else assemble(y, plan, m, x.dtype, low)


@dataclasses.dataclass(frozen=True)
class Plan:
    """How y^T (n, columns) is computed.

    Attributes:
      n: rows of W.
      columns: rows of x, padded to 8 or 16.
      rows: of W, a tile.
      tiles: of rows of W; the last overlaps the one before if n is no multiple.
      splits: of the contraction.
      steps: of the contraction, in all.
      step: weights along the contraction in a step.
      stages: steps that the ring holds.
      whole: whether a tile is one block's, and y is written at once.
    """

    n: int
    columns: int
    rows: int
    tiles: int
    splits: int
    steps: int
    step: int
    stages: int
    whole: bool

    @property
    def width(self) -> int:
        """Bytes of codes in a row of a tile of shared memory."""
        return math.gcd(self.step // 2, 128)

    @property
    def most(self) -> int:
        """Steps of a split. All do as many: one that has fewer drops its first."""
        return -(-self.steps // self.splits)

    def begin(self, split):
        """The first step that counts, of a split (an int, or traced int32)."""
        return (split * self.steps + self.splits - 1) // self.splits


def share(m: int, n: int, k: int, target: gpu.Gpu, *, alone: bool) -> Plan:
    """The plan that keeps the busiest SM busy for the shortest time, in steps of a block.

    A wave of blocks waits for its first step, about as long as a step takes. A block alone on an
    SM waits for each of its own instructions, and is taken to reach two thirds of the speed. A
    split costs its sums, which are written and read again. None of this was measured.
    """
    columns = 8 if m <= 8 and k % X_COLUMNS == 0 else 16
    rows = ROWS if columns == 8 or n < 2 * ROWS else 2 * ROWS
    unit = X_COLUMNS if columns == 8 else BLOCK
    step = unit * largest_divisor(k // unit, STEP_WEIGHTS // rows // unit)
    stage = rows * step // 2 + columns * step * 2
    stages, resident = (target.shared_bytes_sm // 2 - RESERVED) // stage, 2
    if stages < 2:
        stages, resident = (target.shared_bytes - RESERVED) // stage, 1
    tiles, steps = -(-n // rows), k // step

    def cost(splits):
        blocks = tiles * splits
        busiest = max(-(-blocks // target.sms), 1.5) * -(-steps // splits)
        waves = -(-blocks // (resident * target.sms))
        sums = 2 * 4 * n * columns * splits
        return busiest + waves + sums / (stage * target.sms)

    splits = min(range(1, steps + 1), key=cost)
    whole = alone and splits == 1 and n % rows == 0
    # The slot of a step is cheap to find when their number is a power of two.
    return Plan(n, columns, rows, tiles, splits, steps, step, 4 if stages >= 4 else 2, whole)


def largest_divisor(n: int, most: int) -> int:
    """The largest divisor of n that is at most `most`."""
    return max(d for d in range(1, most + 1) if n % d == 0)


def assemble(
    sums: Float[Array, "splits tiles rows columns"],
    plan: Plan,
    m: int,
    dtype: DTypeLike,
    low: LowRank | None,
) -> Float[Array, "m n"]:
    """y from the sums of each split and tile (+ h b); what the last tile has twice is dropped."""
    total = functools.reduce(jnp.add, list(sums))
    if short := plan.n % plan.rows:
        total = jnp.concatenate([total[:-1].reshape(-1, plan.columns), total[-1, -short:]])
    y = total.reshape(plan.n, plan.columns).T[:m]
    if low is not None:
        y = y + jnp.dot(*low, preferred_element_type=jnp.float32)
    return y.astype(dtype)


def launch(plan: Plan, dtype: DTypeLike, interpret: bool):
    """The kernel as a function of (x, codes, scales, table).

    It gives y (columns, n) when the plan is whole, else float32 (splits, tiles, rows, columns).
    """
    y = jax.ShapeDtypeStruct((plan.columns, plan.n), dtype)
    sums = jax.ShapeDtypeStruct((plan.splits, plan.tiles, plan.rows, plan.columns), jnp.float32)
    return plgpu.kernel(
        functools.partial(body, plan, interpret),
        out_type=y if plan.whole else sums,
        grid=(plan.tiles, plan.splits),
        grid_names=("tile", "split"),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    )


def body(plan: Plan, interpret: bool, x_g, codes_g, scales_g, table_g, y_g):
    """One block of threads: one split of one tile."""
    dtype = x_g.dtype
    table = decode.load_table(table_g, interpret=interpret)
    tile, split = lax.axis_index("tile"), lax.axis_index("split")
    row = jnp.minimum(tile * plan.rows, plan.n - plan.rows)
    rows = pl.ds(row, plan.rows)
    end = plan.begin(split + 1)
    first = end - plan.most
    uneven = plan.steps % plan.splits
    blocks = plan.step // BLOCK
    some = math.gcd(blocks, VECTOR)

    def load_scales(step, start):
        """(rows, some): rows of 16 bytes at most, not worth a copy to shared memory."""
        place = scales_g.at[rows, pl.ds(step * blocks + start, some)]
        return plgpu.load(place, layout=fragments.scales_layout(some), optimized=False)

    def first_scales():
        """Those of the first step; 0 if the step is dropped."""
        counts = plan.begin(split) == first
        loaded = [load_scales(first, start) for start in range(0, blocks, some)]
        return [jnp.where(counts, scales, 0) for scales in loaded] if uneven else loaded

    def nothing():
        zeros = jnp.zeros((plan.rows, plan.columns), jnp.float32)
        return plgpu.layout_cast(zeros, fragments.SUMS)

    def step(index, codes_s, x_s, carry):
        acc, scales = carry
        ahead = jnp.minimum(first + index[0] + 1, end - 1)
        codes = blocks_of(codes_s, plan.width)
        for i in range(0, blocks, some):
            for b, scale in enumerate(fragments.columns(scales[i // some], interpret=interpret)):
                x = plgpu.load(x_s.at[:, pl.ds(BLOCK * (i + b), BLOCK)], layout=fragments.X)
                sums = plgpu.mma(
                    nothing(),
                    fragments.left(next(codes), table, dtype, interpret=interpret),
                    fragments.right(x, interpret=interpret),
                )
                scale = lax.broadcast_in_dim(scale, sums.shape, [0])
                acc = acc + sums * plgpu.layout_cast(scale, fragments.SUMS)
            # Here the registers of the old scales are free: loaded earlier, they would be moved.
            scales[i // some] = load_scales(ahead, i)
        if interpret:
            plgpu.commit_smem()
        return acc, scales

    acc, _ = plgpu.emit_pipeline(
        step,
        grid=(plan.most,),
        in_specs=in_specs(plan, row, first),
        max_concurrent_steps=plan.stages,
        init_carry=(nothing(), first_scales()),
    )(codes_g, x_g)
    if plan.whole:
        y = fragments.singles(acc.astype(dtype), interpret=interpret)
        store(y_g.at[:, rows].T, y, optimized=False)
    else:
        store(y_g.at[split, tile], acc, optimized=False)


def blocks_of(codes_s, width: int):
    """The codes (rows, 32) of one block of 64 after the other; loads are of whole tiles."""
    for start in range(0, codes_s.shape[1], width):
        tile = plgpu.load(codes_s.at[:, pl.ds(start, width)], layout=fragments.CODES)
        for column in range(0, width, BLOCK // 2):
            yield tile[:, column : column + BLOCK // 2]


def in_specs(plan: Plan, row, first) -> list[plgpu.BlockSpec]:
    """Of codes and x, from step `first` on.

    Tiled, both: below capability 9.0 a copy without tiles takes rows for contiguous.
    """
    return [
        plgpu.BlockSpec(
            (pl.Element(plan.rows), plan.step // 2),
            lambda i: (row, first + i),
            transforms=(plgpu.TilingTransform((8, plan.width)), plgpu.SwizzleTransform(plan.width)),
            oob_fill_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS,
        ),
        plgpu.BlockSpec(
            (plan.columns, plan.step),
            lambda i: (0, first + i),
            # Tiles of 64 bytes: 8 lanes read 16 bytes each of 2 rows from different banks.
            transforms=(plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(64)),
        ),
    ]
