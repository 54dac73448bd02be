"""A product that is rounded before anything is added to it, in whatever program it is compiled."""

import jax.numpy as jnp
from jaxtyping import Array, Float32


def rounded(product: Float32[Array, "*shape"]) -> Float32[Array, "*shape"]:
    """`product`, as a float32 of its own.

    XLA may contract a product and a sum into one operation with one rounding, and whether it does
    depends on the program around. It does not through this choice: that x == x holds it cannot
    know, for of NaN it does not. An optimization_barrier would write the array to memory.
    """
    return jnp.where(product == product, product, -product)
