"""nf4_matmul as dequantizing and then multiplying: one dense matrix in memory, freed at once.

For what the fused kernels refuse, on any GPU: float32, rows of odd lengths, old devices.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import gpu
from pallas_kernels.backends import Unsupported
from pallas_kernels.nf4_matmul import reference
from pallas_kernels.nf4_matmul.weight import LowRank, Weight


def forward(
    x: Float[Array, "M in"], w: Weight, low: LowRank | None = None
) -> Float[Array, "M out"]:
    """x W^T (+ h b), rounded once."""
    return product(x, w, low, contracted=1)


def backward(
    dy: Float[Array, "M out"], w: Weight, low: LowRank | None = None
) -> Float[Array, "M in"]:
    """dy W (+ h b), rounded once."""
    return product(dy, w, low, contracted=0)


def product(x, w: Weight, low: LowRank | None, *, contracted: int):
    """The product over the last axis of x and axis `contracted` of W."""
    if gpu.here() is None:
        raise Unsupported(f"the default device is a {jax.default_backend()}, not a GPU")
    dimensions = ((1,), (contracted,)), ((), ())
    accumulated = {"preferred_element_type": jnp.float32}
    dense = reference.dense(w, x.dtype, backend=None)
    y = jax.lax.dot_general(x, dense, dimensions, **accumulated)
    if low is not None:
        y = y + jnp.dot(*low, **accumulated)
    return y.astype(x.dtype)
