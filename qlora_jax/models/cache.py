"""The keys and values of the tokens so far, one buffer for all layers."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from qlora_jax.models.config import ModelConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of every layer, with room for T tokens a row.

    Each row has a length of its own: a prompt that was padded on the right stores its padding
    too, but `length` counts only real tokens, so that the next ones overwrite it.
    """

    k: Float[Array, "L B K T head_dim"]
    v: Float[Array, "L B K T head_dim"]
    length: Int[Array, " B"]

    @staticmethod
    def create(config: ModelConfig, batch: int, length: int, dtype: str = "bfloat16") -> "KVCache":
        """An empty cache for `batch` rows of at most `length` tokens."""
        heads, size = config.num_key_value_heads, config.head_dim
        shape = (config.num_hidden_layers, batch, heads, length, size)
        zeros = jnp.zeros(shape, dtype)
        return KVCache(zeros, jnp.zeros(shape, dtype), jnp.zeros((batch,), jnp.int32))

    def store(self, layer: Int[Array, ""], k: Array, v: Array) -> "KVCache":
        """Puts a layer's new keys and values, (B, S, K, head_dim), behind each row's `length`."""

        def place(buffer, new):
            new = new.swapaxes(1, 2).astype(buffer.dtype)
            rows = jax.vmap(
                lambda row, add, at: jax.lax.dynamic_update_slice(row, add, (0, at, 0))
            )(buffer[layer], new, self.length)
            return jax.lax.dynamic_update_index_in_dim(buffer, rows, layer, 0)

        return dataclasses.replace(self, k=place(self.k, k), v=place(self.v, v))

    def advanced(self, count: Int[Array, " B"]) -> "KVCache":
        """The cache after `count` more real tokens in each row."""
        return dataclasses.replace(self, length=self.length + count)
