"""The interpreter's missing rule for `mma`: registers times registers, added in float32."""

import jax.numpy as jnp
from jax._src.interpreters import mlir
from jax._src.pallas.mosaic_gpu import primitives


def multiply_add(acc, a, b):
    """acc + a b, with the products exact and the sums in acc's dtype, as `mma` has them."""
    return acc + jnp.dot(a, b, preferred_element_type=acc.dtype)


def install() -> None:
    """Teaches the CPU `plgpu.mma`, for as long as the process lives; no other rule is touched."""
    rule = mlir.lower_fun(multiply_add, multiple_results=False)
    mlir.register_lowering(primitives.mma_p, rule, platform="cpu")
