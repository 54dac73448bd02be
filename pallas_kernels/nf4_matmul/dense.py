"""nf4_matmul as dequantizing and then multiplying: one dense matrix in memory, freed at once.

For what the fused kernels refuse, on any GPU: float32, rows of odd lengths, old devices.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import gpu
from pallas_kernels.nf4_matmul import reference
from pallas_kernels.nf4_matmul.weight import LowRank, Weight


def product(
    x: Float[Array, "M contracted"], w: Weight, low: LowRank | None, *, transposed: bool
) -> Float[Array, "M n"]:
    """x W^T, or x W when `transposed`, and the low-rank term, rounded once."""
    gpu.require()
    dimensions = ((1,), (0 if transposed else 1,)), ((), ())
    accumulated = {"preferred_element_type": jnp.float32}
    # Not before x is there: XLA would dequantize all matrices of a layer at its beginning.
    x, w = jax.lax.optimization_barrier((x, w))
    dense = reference.dense(w, x.dtype, backend=None)
    y = jax.lax.dot_general(x, dense, dimensions, **accumulated)
    if low is not None:
        y = y + jnp.dot(*low, **accumulated)
    return y.astype(x.dtype)
