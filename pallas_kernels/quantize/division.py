"""Float32 quotients rounded as IEEE 754 says, on a GPU too.

XLA compiles 1 / x to rcp.approx and x / y to div.full there (read in its PTX, jax 0.12.0.1), which
are off by up to 1 and 2 units in the last place: enough for another code beside a boundary. The
correction is exact in 32-bit integers, and costs some 40 of them.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int32, UInt32

from pallas_kernels import gpu

ROUNDS = 4  # of one unit each: 2 units of an upper binade are 4 of the one below
HIDDEN = np.uint32(1 << 23)  # the first bit of a mantissa, which is not stored


def divide(x: Float32[Array, "*shape"], y: Float32[Array, "*shape"]) -> Float32[Array, "*shape"]:
    """x / y, to the nearest float32; y, and the quotient, as far as they are normal numbers."""
    quotient = x / y
    return quotient if gpu.here() is None else corrected(quotient, x, y)


def reciprocal(y: Float32[Array, "*shape"]) -> Float32[Array, "*shape"]:
    """1 / y, to the nearest float32."""
    return divide(jnp.ones_like(y), y)


def corrected(
    quotient: Float32[Array, "*shape"], x: Float32[Array, "*shape"], y: Float32[Array, "*shape"]
) -> Float32[Array, "*shape"]:
    """The float32 nearest to x / y, from one that is at most two units in the last place off.

    What is left, x - quotient * y, is less than a few units of the product's last place. So its
    low 32 bits are all of it, though the product of two mantissas has 48:

        left    = mx * 2^shift - mq * my       in integers, modulo 2^32
        nearest if -my/2 < left < my/2         one unit more of the quotient is my more

    No quotient of two float32 lies halfway between two others. Where one of the three is zero or
    not normal, the quotient stays as it is.
    """
    bits = jax.lax.bitcast_convert_type(quotient, jnp.uint32)
    (mx, ex), (my, ey) = split(x), split(y)
    half = my.astype(jnp.int32)
    for _ in range(ROUNDS):
        mq, eq = split(jax.lax.bitcast_convert_type(bits, jnp.float32))
        shift = jnp.clip(ex - eq - ey + 150, 0, 31).astype(jnp.uint32)
        left = jax.lax.bitcast_convert_type((mx << shift) - mq * my, jnp.int32)
        # Below a power of two a unit is half as large.
        below = jnp.where(mq == HIDDEN, np.int32(4), np.int32(2))
        up, down = 2 * left > half, below * left < -half
        bits += jnp.where(up, np.uint32(1), np.uint32(0)) - jnp.where(
            down, np.uint32(1), np.uint32(0)
        )
    usable = normal(quotient) & normal(x) & normal(y)
    return jnp.where(usable, jax.lax.bitcast_convert_type(bits, jnp.float32), quotient)


def split(x: Float32[Array, "*shape"]) -> tuple[UInt32[Array, "*shape"], Int32[Array, "*shape"]]:
    """Mantissa and biased exponent: |x| = mantissa * 2^(exponent - 150)."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    exponent = (bits >> np.uint32(23)) & np.uint32(0xFF)
    return bits & (HIDDEN - np.uint32(1)) | HIDDEN, exponent.astype(jnp.int32)


def normal(x: Float32[Array, "*shape"]) -> Array:
    """Whether a number is neither zero, denormal, infinite nor NaN."""
    exponent = split(x)[1]
    return (exponent > 0) & (exponent < 255)
