"""The public calls: a matrix to 4-bit codes and block scales, and the scales to 8 bits."""

import functools

import jax
import numpy as np
from jaxtyping import Array, Float, Float32, UInt8

from pallas_kernels.codebooks import Kind, codebook
from pallas_kernels.quantize import reference
from pallas_kernels.quantize.reference import DoubleQuantized as DoubleQuantized

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
DTYPES = ("float32", "bfloat16", "float16")


@functools.partial(jax.jit, static_argnames=("kind", "block_size"))
def quantize_4bit(
    w: Float[Array | np.ndarray, "out in"], *, kind: Kind = "nf4", block_size: int = 64
) -> tuple[UInt8[Array, "*packed"], Float32[Array, "*blocks"]]:
    """The 4-bit code of each weight, and the largest magnitude of each block of weights.

        absmax = max |w| over a block          code = nearest codebook value to w / absmax

    A tie takes the smaller value, as in bitsandbytes; for int4, which bitsandbytes does not
    quantize, the even one: round(w / (absmax / 7)), symmetric absmax rounding.

    Blocks run over `w` flattened row by row; two codes share a byte, the first in the high nibble:

        weights   w0 w1 | w2 w3 | ...      codes   c0<<4|c1   c2<<4|c3   ...

    `w` must be finite: a block with infinity has that absmax, and codes that mean nothing; a NaN
    may leave no trace at all (XLA's reduction on a CPU loses some).

    A block of zeros keeps absmax 0 and comes back as zeros. A block whose largest magnitude is
    under 1.2e-38 (float32's smallest normal) may come back as zeros too.

    Args:
      w: (out, in) in float32, bfloat16 or float16.
      kind: nf4, fp4 or int4.
      block_size: a power of two from 32 to 4096.

    Returns:
      codes uint8 (out, in/2) and absmax float32 (out, in/block_size) when blocks fill the rows;
      otherwise flat, (ceil(n/2),) and (ceil(n/block_size),) for n = out in weights, of which the
      last block may be short.

    Raises:
      ValueError: an unknown kind, block size or dtype, or `w` is not a matrix.

    NF4 and FP4 are those of bitsandbytes.functional.quantize_4bit (0.50, CPU), bit for bit.
    """
    check(kind, block_size)
    if w.ndim != 2 or w.dtype.name not in DTYPES:
        raise ValueError(f"w is {w.dtype} {w.shape}; expected a matrix in {', '.join(DTYPES)}")
    return reference.quantize_4bit(w, kind, block_size)


@jax.jit
def double_quantize(absmax: Float32[Array | np.ndarray, "*blocks"]) -> DoubleQuantized:
    """Block scales in 8 bits: 0.51 bits a weight become 0.13 for blocks of 64.

        offset = mean absmax     nested = max |absmax - offset| over 256 scales, flattened
        code = the dynamic map's value nearest to (absmax - offset) / nested

    "Nearest" is bitsandbytes': the quotient is first rounded to one of 65,536 even steps over
    [-1, 1], so codes for values within 1.5e-5 of a boundary, and of zero, may be a neighbour's.
    The offset is a float32 mean that is summed in torch's order for one thread.

    Args:
      absmax: float32, of any shape, the scales of ONE matrix.

    Returns:
      codes uint8 as absmax, absmax float32 (ceil(n/256),), offset float32 ().
    """
    return reference.double_quantize(absmax)


def check(kind: Kind, block_size: int) -> None:
    """Raises ValueError unless there is such a codebook and such a block size."""
    codebook(kind)
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"block_size is {block_size}; expected one of {BLOCK_SIZES}")
