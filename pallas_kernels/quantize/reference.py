"""The exact meaning of quantizing in plain jnp, with every rounding where bitsandbytes has it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, UInt8

from pallas_kernels.codebooks import DYNAMIC_SIGNED, Kind, midpoints, sorted_codes
from pallas_kernels.quantize.division import divide, reciprocal
from pallas_kernels.quantize.dynamic import dynamic_code_of

TINY = np.finfo(np.float32).tiny  # a smaller divisor is a zero where denormals are flushed
HUGE = np.float32(2**125)  # and the reciprocal of a larger one is denormal
NESTED_BLOCK = 256  # scales that share one nested scale


class DoubleQuantized(NamedTuple):
    """Block scales in 8 bits: dynamic map[codes] * absmax + offset.

    Attributes:
      codes: uint8 (*lead, *blocks), one a block of weights, into DYNAMIC_SIGNED.
      absmax: float32 (*lead, ceil(n/256)), one for 256 codes flattened.
      offset: float32 (*lead,), the mean of the scales.
    """

    codes: Array
    absmax: Array
    offset: Array


def quantize_4bit(
    w: Float[Array, "out in"], kind: Kind, block_size: int
) -> tuple[UInt8[Array, "*packed"], Float32[Array, "*blocks"]]:
    """Codes and absmax; flat unless blocks fill the rows."""
    out, width = w.shape
    if width % block_size == 0:
        blocks = w.reshape(out, width // block_size, block_size)
        codes, absmax = nearest_codes(blocks, kind)
        return packed(codes.reshape(out, width)), absmax
    flat = w.reshape(-1)
    full = flat.size // block_size * block_size
    codes, absmax = nearest_codes(flat[:full].reshape(-1, block_size), kind)
    codes = codes.reshape(-1)
    if flat.size > full:
        last_codes, last_absmax = nearest_codes_short(flat[full:], kind)
        codes = jnp.concatenate([codes, last_codes])
        absmax = jnp.append(absmax, last_absmax)
    if codes.size % 2:
        codes = jnp.append(codes, code_of(jnp.zeros((), jnp.float32), kind))
    return packed(codes), absmax


def nearest_codes(
    blocks: Float[Array, "*blocks size"], kind: Kind
) -> tuple[UInt8[Array, "*blocks size"], Float32[Array, "*blocks"]]:
    """Codes and absmax of whole blocks, scaled by the reciprocal of absmax."""
    # In the blocks' own dtype, which is exact: a shared float32 copy would be stored whole.
    absmax = jnp.abs(blocks).max(axis=-1).astype(jnp.float32)
    if kind == "int4":
        return int4_code_of(blocks.astype(jnp.float32), absmax[..., None]), absmax
    shrink = jnp.where(absmax > HUGE, np.float32(2**-8), np.float32(1))
    inverse = reciprocal(jnp.maximum(absmax * shrink, TINY))
    scaled = blocks.astype(jnp.float32) * shrink[..., None] * inverse[..., None]
    return code_of(scaled, kind), absmax


def nearest_codes_short(
    block: Float[Array, " size"], kind: Kind
) -> tuple[UInt8[Array, " size"], Float32[Array, ""]]:
    """Codes and absmax of the short block at the end, divided by an absmax that is never 0."""
    x = block.astype(jnp.float32)
    absmax = jnp.abs(x).max()
    absmax = jnp.where(absmax == 0, np.float32(1e-38), absmax)
    if kind == "int4":
        return int4_code_of(x, absmax), absmax
    # A divisor that is seen to be one number would become a product with its reciprocal.
    divisor = jnp.broadcast_to(jnp.maximum(absmax, TINY), x.shape)
    return code_of(divide(x, jax.lax.optimization_barrier(divisor)), kind), absmax


def code_of(scaled: Float32[Array, "*shape"], kind: Kind) -> UInt8[Array, "*shape"]:
    """The code of the codebook value nearest to each number; a tie takes the smaller value.

    Four comparisons, each with the boundary in the middle of those that are left: 28 operations a
    weight for NF4, where one comparison a boundary took 50 and was slower than memory on most
    GPUs. Nothing of size (n, 16) is built, and no order needs a lookup.
    """
    order, boundaries = sorted_codes(kind), midpoints(kind)
    above = []
    for step in (8, 4, 2, 1):
        above.append(scaled > chosen(boundaries[step - 1 :: 2 * step], above))
    if not np.array_equal(order, np.arange(16)):
        return chosen(order, above)
    code = jnp.zeros(scaled.shape, jnp.uint8)
    for bit, step in zip(above, np.uint8([8, 4, 2, 1]), strict=True):
        code += jnp.where(bit, step, np.uint8(0))
    return code


def chosen(values: np.ndarray, bits: list[Array]) -> Array | np.generic:
    """values[the number that these bits make, the highest first], by selects."""
    if not bits:
        return values[0]
    half = len(values) // 2
    return jnp.where(bits[0], chosen(values[half:], bits[1:]), chosen(values[:half], bits[1:]))


def int4_code_of(
    x: Float32[Array, "*shape"], absmax: Float32[Array, "*blocks"]
) -> UInt8[Array, "*shape"]:
    """Round(x / (absmax / 7)), a tie to the even number: symmetric absmax rounding to 15 levels.

    The codes fall from 7 at code 0 to 0 at code 7, and from -1 at code 9 to -7 at code 15.
    """
    # Both quotients as they stand: of a divisor that it knows, or that is one number for many, XLA
    # would make a product with the rounded reciprocal. So each weight has a divisor of its own, in
    # a register; behind an optimization_barrier it would be an array as large as x.
    seven = 7 + 0 * absmax
    unit = jnp.maximum(divide(absmax, seven), TINY) + 0 * x
    level = jnp.clip(jnp.round(divide(x, unit)), -7, 7)
    return jnp.where(level < 0, 8 - level, 7 - level).astype(jnp.uint8)


def packed(codes: UInt8[Array, "*rows width"]) -> UInt8[Array, "*rows bytes"]:
    """Two codes a byte, the first in the high nibble."""
    pairs = codes.reshape(*codes.shape[:-1], codes.shape[-1] // 2, 2)
    return pairs[..., 0] << 4 | pairs[..., 1]


def double_quantize(absmax: Float32[Array, "*blocks"]) -> DoubleQuantized:
    """Codes, nested scales and offset of the scales of one matrix."""
    flat = absmax.reshape(-1)
    # Powers of two change no bit, and keep the sum and the reciprocals of huge scales in range.
    huge = flat.max(initial=0) > 2.0**96
    shrink = jnp.where(huge, np.float32(2**-30), np.float32(1))
    grow = jnp.where(huge, np.float32(2**30), np.float32(1))
    offset = mean(flat * shrink) * grow
    nested_count = -(-flat.size // NESTED_BLOCK)
    centred = jnp.pad(flat - offset, (0, nested_count * NESTED_BLOCK - flat.size))
    centred = centred.reshape(nested_count, NESTED_BLOCK)
    nested = jnp.abs(centred).max(axis=-1)
    inverse = reciprocal(jnp.maximum(nested * shrink, TINY))
    scaled = centred * shrink * inverse[:, None]
    codes = jnp.where((nested > 0)[:, None], dynamic_code_of(scaled, DYNAMIC_SIGNED), np.uint8(0))
    return DoubleQuantized(codes.reshape(-1)[: flat.size].reshape(absmax.shape), nested, offset)


def mean(x: Float32[Array, " n"]) -> Float32[Array, ""]:
    """The mean of a vector in float32, each addition in the order in which torch does it.

    Four accumulators of 8 lanes take turns at rows of 8 numbers, in sums of sums of 16; the rows
    and numbers that are left over, and the lanes, are added one by one.
    """
    rows = x[: x.size // 8 * 8].reshape(-1, 8)
    turns = rows[: len(rows) // 4 * 4].reshape(-1, 4, 8)
    lanes = cascade(turns)
    lanes = in_order(jnp.concatenate([lanes[:1], rows[4 * len(turns) :], lanes[1:]]))
    total = in_order(jnp.concatenate([x[rows.size :], lanes]))
    # A constant divisor would become a product with its rounded reciprocal.
    return divide(total, jax.lax.optimization_barrier(jnp.float32(max(x.size, 1))))


def cascade(x: Float32[Array, "n *lanes"]) -> Float32[Array, "*lanes"]:
    """Sum over the first axis: groups of 16, their sums by 16, those by 16, and the rest."""
    sums = []
    for _ in range(3):
        groups = len(x) // 16
        sums.append(in_order(x[16 * groups :]))
        x = in_order(x[: 16 * groups].reshape(groups, 16, *x.shape[1:]).swapaxes(0, 1))
    return in_order(jnp.stack([*sums, in_order(x)]))


def in_order(x: Float32[Array, "n *lanes"]) -> Float32[Array, "*lanes"]:
    """Sum over the first axis, one after the other, from zero."""
    zero = jnp.zeros(x.shape[1:], x.dtype)
    if len(x) == 0:
        return zero
    return jax.lax.scan(lambda total, row: (total + row, None), zero, x)[0]
