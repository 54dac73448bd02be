"""The gated feed-forward block: down(silu(gate(x)) * up(x))."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from qlora_jax.models.linear import Branches, Linear


class GatedMLP(nnx.Module):
    """SwiGLU: y = down(silu(gate(x)) * up(x)).

    Source: Shazeer 2020, arXiv 2002.05202; transformers' LlamaMLP.
    """

    def __init__(self, gate_proj: Linear, up_proj: Linear, down_proj: Linear):
        self.gate_proj = gate_proj
        self.up_proj = up_proj
        self.down_proj = down_proj

    def __call__(self, x: Float[Array, "B S D"], branches: Branches) -> Float[Array, "B S D"]:
        gate = self.gate_proj(x, branches.get("mlp.gate_proj"))
        up = self.up_proj(x, branches.get("mlp.up_proj"))
        return self.down_proj(swiglu(gate, up), branches.get("mlp.down_proj"))


def plain_swiglu(gate: Array, up: Array) -> Array:
    """silu(gate) * up in float32: what `swiglu` computes, and its autodiff twin in the tests."""
    wide = gate.astype(jnp.float32)
    return (wide * jax.nn.sigmoid(wide) * up.astype(jnp.float32)).astype(gate.dtype)


# Keeps gate and up in their own dtype; autodiff would keep their float32 copies as well.
@jax.custom_vjp
def swiglu(gate: Array, up: Array) -> Array:
    """`plain_swiglu` that keeps only its two inputs for the backward pass."""
    return plain_swiglu(gate, up)


def forward(gate, up):
    """The result, and what the backward pass needs."""
    return plain_swiglu(gate, up), (gate, up)


def backward(residuals, dy):
    """Gradients for the inputs that are not frozen."""
    gate, up = residuals
    g, u, d = (a.astype(jnp.float32) for a in (gate, up, dy))
    s = jax.nn.sigmoid(g)
    return (d * u * s * (1 + g * (1 - s))).astype(gate.dtype), (d * g * s).astype(up.dtype)


swiglu.defvjp(forward, backward)
