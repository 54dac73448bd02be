"""What all GPU kernels are given for W, and which weights they refuse."""

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, UInt8, UInt32

from pallas_kernels.backends import Unsupported
from pallas_kernels.dequantize.api import expand_scales
from pallas_kernels.nf4_matmul.decode import table_words
from pallas_kernels.nf4_matmul.weight import Weight

STEP = 64  # weights along `in` that share a scale in the kernels; larger blocks repeat theirs


def check(x: Float[Array, "M n"], w: Weight) -> None:
    """Unsupported, with the reason, for what no Mosaic kernel takes."""
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        raise Unsupported(f"x is {x.dtype}; the kernels multiply bfloat16 and float16")
    if w.layout != "bnb":
        raise Unsupported(f"layout is {w.layout!r}; the kernels read 'bnb'")
    if w.block_size % STEP:
        raise Unsupported(f"block_size is {w.block_size}; the kernels want a multiple of {STEP}")
    out, width = w.shape
    if width % w.block_size:
        raise Unsupported(f"W is {w.shape}: blocks of {w.block_size} cross its rows")
    if out % 8:
        raise Unsupported(f"W is {w.shape}: rows of y must be whole 16 bytes, out a multiple of 8")


def operands(
    w: Weight, dtype: DTypeLike, scale_dtype: DTypeLike
) -> tuple[UInt8[Array, "out bytes"], Float[Array, "blocks out"], UInt32[Array, " words"]]:
    """(codes, scales, table): codes as stored, (out, in/2); scales (in/64, out), transposed.

    Transposed, the scales of neighbouring rows of W lie side by side, as one load wants them.
    Double-quantized scales are expanded here, by XLA, once a call: 1/64 of the weights.
    """
    out, width = w.shape
    scales = expand_scales(w.scales).reshape(out, width // w.block_size)
    scales = jnp.repeat(scales.T, w.block_size // STEP, axis=0).astype(scale_dtype)
    return w.codes.reshape(out, width // 2), scales, jnp.asarray(table_words(w.kind, dtype))


def pad(a, *multiples: int):
    """A matrix with zeros up to multiples of these along its axes."""
    rest = [-size % multiple for size, multiple in zip(a.shape, multiples, strict=True)]
    return jnp.pad(a, [(0, n) for n in rest]) if any(rest) else a
