"""The gated feed-forward block: down(activation(gate(x)) * up(x))."""

import functools
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from qlora_jax.models.linear import Branches, Linear


class GatedMLP(nnx.Module):
    """y = down(activation(gate(x)) * up(x)); SwiGLU when the activation is silu.

    Args:
      linears: gate_proj, up_proj and down_proj, or gate_up_proj and down_proj.
      activation: a name of ACTIVATIONS.

    Source: Shazeer 2020, arXiv 2002.05202; transformers' LlamaMLP, Gemma2MLP and Phi3MLP.
    """

    def __init__(self, linears: Mapping[str, Linear], activation: str):
        self.activation = activation
        self.fused = "gate_up_proj" in linears
        for name, module in linears.items():
            setattr(self, name, module)

    def __call__(self, x: Float[Array, "B S D"], branches: Branches) -> Float[Array, "B S D"]:
        if self.fused:
            both = self.gate_up_proj(x, branches.get("mlp.gate_up_proj"))
            gate, up = jnp.split(both, 2, axis=-1)
        else:
            gate = self.gate_proj(x, branches.get("mlp.gate_proj"))
            up = self.up_proj(x, branches.get("mlp.up_proj"))
        return self.down_proj(gated(gate, up, self.activation), branches.get("mlp.down_proj"))


def silu(x: Array) -> tuple[Array, Array]:
    """x * sigmoid(x), and its slope."""
    s = jax.nn.sigmoid(x)
    return x * s, s * (1 + x * (1 - s))


def gelu_tanh(x: Array) -> tuple[Array, Array]:
    """x * Phi(x) with Phi by tanh, as torch's gelu(approximate="tanh"), and its slope.

    Source: Hendrycks and Gimpel 2016, arXiv 1606.08415.
    """
    c = math.sqrt(2 / math.pi)
    t = jnp.tanh(c * (x + 0.044715 * x**3))
    slope = 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * c * (1 + 3 * 0.044715 * x * x)
    return 0.5 * x * (1 + t), slope


ACTIVATIONS = {"silu": silu, "gelu_tanh": gelu_tanh}


def plain_gated(gate: Array, up: Array, activation: str) -> Array:
    """activation(gate) * up in float32: what `gated` computes, and its autodiff twin in tests."""
    active, _ = ACTIVATIONS[activation](gate.astype(jnp.float32))
    return (active * up.astype(jnp.float32)).astype(gate.dtype)


# Keeps gate and up in their own dtype; autodiff would keep their float32 copies as well.
@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def gated(gate: Array, up: Array, activation: str) -> Array:
    """`plain_gated` that keeps only its two inputs for the backward pass."""
    return plain_gated(gate, up, activation)


def forward(gate, up, activation):
    """The result, and what the backward pass needs."""
    return plain_gated(gate, up, activation), (gate, up)


def backward(activation, residuals, dy):
    """Gradients for the inputs that are not frozen."""
    gate, up = residuals
    g, u, d = (a.astype(jnp.float32) for a in (gate, up, dy))
    active, slope = ACTIVATIONS[activation](g)
    return (d * u * slope).astype(gate.dtype), (d * active).astype(up.dtype)


gated.defvjp(forward, backward)
