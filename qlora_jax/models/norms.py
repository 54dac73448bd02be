"""RMSNorm with a frozen weight, in float32, keeping only its input for the backward pass."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float


class RMSNorm(nnx.Module):
    """y = x / sqrt(mean(x^2) + eps) * (weight + offset), in float32 whatever x's dtype.

    Args:
      weight: (D,), or (L, D) when layers are stacked.
      eps: config.json's `rms_norm_eps`.
      offset: 1 for Gemma, which stores how far the weight is from 1.

    Source: Zhang and Sennrich 2019, arXiv 1910.07467; transformers' LlamaRMSNorm.
    """

    def __init__(self, weight: Array, eps: float, offset: float = 0.0):
        self.weight = nnx.Variable(weight)
        self.eps = eps
        self.offset = offset

    def __call__(self, x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
        weight = self.weight[...]
        if self.offset:
            weight = weight.astype(jnp.float32) + self.offset
        return rms_norm(x, weight, self.eps)


def plain_rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """The formula itself: what `rms_norm` computes, and its autodiff twin in the tests."""
    wide = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + eps)
    return (wide * inverse * weight.astype(jnp.float32)).astype(x.dtype)


# Autodiff would keep the float32 intermediates of every layer for the backward pass; this keeps
# x alone, and asks for no gradient of the frozen weight.
@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """`plain_rms_norm` with a gradient for x only."""
    return plain_rms_norm(x, weight, eps)


def forward(x, weight, eps):
    """The result, and what the backward pass needs."""
    return plain_rms_norm(x, weight, eps), (x, weight)


def backward(eps, residuals, dy):
    """Gradients for the inputs that are not frozen."""
    x, weight = residuals
    wide = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + eps)
    unit = wide * inverse
    g = dy.astype(jnp.float32) * weight.astype(jnp.float32)
    dx = inverse * (g - unit * jnp.mean(g * unit, -1, keepdims=True))
    return dx.astype(x.dtype), None


rms_norm.defvjp(forward, backward)
