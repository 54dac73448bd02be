"""The exact meaning of nf4_matmul in plain jnp: the oracle of each backend, and the last resort."""

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels.dequantize.api import dequantize_4bit
from pallas_kernels.nf4_matmul.layout import unpack
from pallas_kernels.nf4_matmul.weight import Weight


def dense(w: Weight, dtype: DTypeLike, backend: str | None = "reference") -> Float[Array, "out in"]:
    """W, dequantized: plainly, or by the backend of dequantize_4bit that takes it (None)."""
    return dequantize_4bit(
        unpack(w.codes, w.layout),
        w.scales,
        shape=w.shape,
        kind=w.kind,
        block_size=w.block_size,
        dtype=dtype,
        backend=backend,
    )


def forward(x: Float[Array, "M in"], w: Weight) -> Float[Array, "M out"]:
    """x W^T, accumulated in float32."""
    y = jnp.einsum("mi,oi->mo", x, dense(w, x.dtype), preferred_element_type=jnp.float32)
    return y.astype(x.dtype)


def backward(dy: Float[Array, "M out"], w: Weight) -> Float[Array, "M in"]:
    """dy W, accumulated in float32."""
    dx = jnp.einsum("mo,oi->mi", dy, dense(w, dy.dtype), preferred_element_type=jnp.float32)
    return dx.astype(dy.dtype)
