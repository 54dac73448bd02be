"""What a text looks like to each linear of a model: the second moments of its inputs, by layer.

    moments of a linear = sum over the tokens of x x^T        x (in,), the linear's input

One layer's are in memory at a time: 3 D^2 + F^2 float32 numbers for a layer of width D, where F is
that of the feed-forward; the text itself is between two layers, (tokens, D), in host memory.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from qlora_jax.adapters.adapter import Adapter
from qlora_jax.models.block import Block
from qlora_jax.models.config import ModelConfig
from qlora_jax.models.decoder import Decoder, default_positions
from qlora_jax.models.families import linear_shapes
from qlora_jax.models.layers import Stack, at
from qlora_jax.models.linear import Branch, Linear
from qlora_jax.models.one_layer import OneLayer

Weights = Mapping[str, Any]  # of one layer, by their names inside it
Moments = dict[str, Float[np.ndarray, "in in"]]
TOKENS = 2048  # that go through a layer at a time

# Linears that take the input of another one.
SAME = {
    "self_attn.k_proj": "self_attn.q_proj",
    "self_attn.v_proj": "self_attn.q_proj",
    "mlp.up_proj": "mlp.gate_proj",
}


class TextInLayers:
    """A text on its way through the layers, which may change as it reaches them.

        text = TextInLayers(model, adapter, windows)
        for layer in range(depth):
            moments = text.moments(weights of the layer)    # as base + adapter computes
            text.advance(the layer's new weights)           # without an adapter

    Args:
      model: the base.
      adapter: trained on it.
      windows: token ids, each row a text of its own.
    """

    def __init__(self, model: Decoder, adapter: Adapter, windows: Int[np.ndarray, "N S"]):
        self.config, self.layer = model.config, 0
        self.one = OneLayer(model.config.scores(windows.shape[1]))
        rows = max(1, TOKENS // windows.shape[1])
        self.x, self.shared = [], []
        for start in range(0, len(windows), rows):
            x, stack = enter(model, jnp.asarray(windows[start : start + rows]), adapter)
            if not start:
                self.params, self.others = stack.params, stack.others
            same = start and x.shape == self.x[0].shape  # all windows begin at position 0
            self.x.append(np.asarray(x))
            self.shared.append(self.shared[0] if same else stack.shared)

    def moments(self, weights: Weights) -> Moments:
        """Of the present layer's linears, by name; the layer computes with its adapter."""
        params, others = at((self.params, self.others), self.layer)
        total: dict[str, Array] = {}
        for x, shared in zip(self.x, self.shared, strict=True):
            found = watched(x, weights, params, others, shared, config=self.config, layer=self.one)
            total = jax.tree.map(jnp.add, total, found) if total else found
        own = {name: np.asarray(sums) for name, sums in total.items()}
        return {name: own[SAME.get(name, name)] for name in linear_shapes(self.config)}

    def advance(self, weights: Weights) -> None:
        """Takes the text through the present layer, as `weights` are and without an adapter."""
        others = at(self.others, self.layer)
        for i, (x, shared) in enumerate(zip(self.x, self.shared, strict=True)):
            y = through(x, weights, others, shared, config=self.config, layer=self.one)
            self.x[i] = np.asarray(y)
        self.layer += 1


@jax.jit
def enter(
    model: Decoder, ids: Int[Array, "B S"], adapter: Adapter
) -> tuple[Float[Array, "B S D"], Stack]:
    """What enters the first layer, and what the layers take beside their weights."""
    positions = default_positions(ids, None, None)
    _, stack = model.stacked(positions, None, adapter, None, None)
    return model.embedded(ids, adapter), stack._replace(weights=None)


@functools.partial(jax.jit, static_argnames=("config", "layer"))
def through(x, weights, others, shared, *, config: ModelConfig, layer: OneLayer):
    """x behind one layer that has no adapter."""
    return layer((x, None), Block(config, weights), {}, others, shared)[0]


@functools.partial(jax.jit, static_argnames=("config", "layer"))
def watched(x, weights, params, others, shared, *, config: ModelConfig, layer: OneLayer):
    """X^T X, float32, of each input that one layer's linears take, by the first that takes it."""
    block, seen = Block(config, weights), {}
    for name in linear_shapes(config):
        part, own = name.split(".")
        module = getattr(block, part)
        see = functools.partial(seen.setdefault, name)
        setattr(module, own, Watched(getattr(module, own), see))
    layer((x, None), block, params, others, shared)
    for name, first in SAME.items():
        assert seen.get(name) is seen.get(first), f"{name} has an input of its own"
    return {name: squares(inputs) for name, inputs in seen.items() if name not in SAME}


def squares(inputs: Float[Array, "B S in"]) -> Float[Array, "in in"]:
    """X^T X in float32."""
    rows = inputs.reshape(-1, inputs.shape[-1]).astype(jnp.float32)
    return jnp.matmul(rows.T, rows, precision=jax.lax.Precision.HIGHEST)


class Watched(Linear):
    """A linear that shows its input before it computes."""

    def __init__(self, linear: Linear, see: Callable[[Array], Any]):
        self.weight, self.bias, self.see = linear.weight, linear.bias, see

    def __call__(self, x: Float[Array, "*rows in"], branch: Branch | None = None) -> Array:
        self.see(x)
        return super().__call__(x, branch)
