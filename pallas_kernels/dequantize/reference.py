"""The exact meaning of dequantizing in plain jnp, with every rounding where bitsandbytes has it."""

import math

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, UInt8

from pallas_kernels.codebooks import DYNAMIC_SIGNED, Kind, codebook
from pallas_kernels.quantize.reference import NESTED_BLOCK, DoubleQuantized


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
    n, full = math.prod(shape), math.prod(shape) // block_size * block_size
    lead = codes.shape[:-1]
    pairs = jnp.stack([codes >> 4, codes & 15], axis=-1).reshape(*lead, -1)[..., :n]
    values = jnp.asarray(codebook(kind)).at[pairs].get(mode="promise_in_bounds")
    blocks = values[..., :full].reshape(*lead, full // block_size, block_size)
    whole = (blocks * absmax[..., : full // block_size, None]).reshape(*lead, full)
    short = values[..., full:] * absmax[..., full // block_size :]
    dense = whole if n == full else jnp.concatenate([whole, short], axis=-1)
    return dense.reshape(*lead, *shape).astype(dtype)


def expand(scales: DoubleQuantized) -> Float32[Array, "*blocks"]:
    """Float32 scales; leading axes are those of the offset."""
    lead = scales.offset.shape
    codes = scales.codes.reshape(*lead, -1)
    nested = jnp.repeat(scales.absmax, NESTED_BLOCK, axis=-1)[..., : codes.shape[-1]]
    values = jnp.asarray(DYNAMIC_SIGNED).at[codes].get(mode="promise_in_bounds")
    product = jax.lax.optimization_barrier(values * nested)
    return (product + scales.offset[..., None]).reshape(scales.codes.shape)
