"""The keys and values of the tokens so far, one buffer for all layers, in floats or in 8 bits.

    length 3, room 6       k0 k1 k2  .  .  .      the next token stands at 3, whatever lies there

In 8 bits each head of each token has a scale of its own: codes = round(k / scale), scale = max|k| /
127, so that a number is off by half a scale at most, and a token takes head_dim + 4 bytes a head.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Num

from qlora_jax.errors import InputError
from qlora_jax.models.config import ModelConfig

DTYPES = ("bfloat16", "float32", "float16", "int8")
UNROLLED = 16  # rows that are written one by one; more of them in a loop


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Stored:
    """Keys, or values, of some layers: numbers, or 8-bit codes and their scales."""

    codes: Num[Array, "*lead T head_dim"]
    scales: Float[Array, "*lead T"] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of every layer, (L, B, K, T, head_dim), with room for T tokens a row.

    Each row has a length of its own: a prompt that was padded on the right stores its padding
    too, but `length` counts only real tokens, so that the next ones overwrite it.
    """

    k: Stored
    v: Stored
    length: Int[Array, " B"]

    @staticmethod
    def create(config: ModelConfig, batch: int, length: int, dtype: str = "bfloat16") -> "KVCache":
        """An empty cache for `batch` rows of at most `length` tokens.

        Args:
          config: the model's.
          batch: rows.
          length: room in each, in tokens.
          dtype: bfloat16, float32, float16, or int8 for codes with a scale a head and token.

        Raises:
          InputError: GEN-CACHE, another dtype.
        """
        if dtype not in DTYPES:
            expected = f"one of {', '.join(DTYPES)}"
            raise InputError("GEN-CACHE", "cache_dtype", f"{dtype!r}", expected)
        heads, size = config.num_key_value_heads, config.head_dim
        shape = (config.num_hidden_layers, batch, heads, length, size)

        def empty() -> Stored:
            scales = jnp.zeros(shape[:-1], jnp.float32) if dtype == "int8" else None
            return Stored(jnp.zeros(shape, dtype), scales)

        return KVCache(empty(), empty(), jnp.zeros((batch,), jnp.int32))

    @property
    def room(self) -> int:
        """T."""
        return self.k.codes.shape[3]

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values and scales."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((self.k, self.v)))

    def store(self, layer: Int[Array, ""], k: Array, v: Array) -> "KVCache":
        """Puts a layer's new keys and values, (B, S, K, head_dim), behind each row's `length`."""
        new = (
            encoded(a.swapaxes(1, 2), whole.codes.dtype) for a, whole in ((k, self.k), (v, self.v))
        )
        k, v = (
            jax.tree.map(lambda buffer, own: placed(buffer, own, layer, self.length), whole, own)
            for whole, own in zip((self.k, self.v), new, strict=True)
        )
        return dataclasses.replace(self, k=k, v=v)

    def of_layer(self, layer: Int[Array, ""]) -> tuple[Stored, Stored]:
        """A layer's keys and values, (B, K, T, head_dim)."""

        def own(buffer):
            return jax.lax.dynamic_index_in_dim(buffer, layer, 0, False)

        return jax.tree.map(own, (self.k, self.v))

    def advanced(self, count: Int[Array, " B"]) -> "KVCache":
        """The cache after `count` more real tokens in each row."""
        return dataclasses.replace(self, length=self.length + count)


def encoded(new: Float[Array, "B K S head_dim"], dtype: DTypeLike) -> Stored:
    """Keys or values as the cache holds them."""
    if dtype != jnp.int8:
        return Stored(new.astype(dtype))
    wide = new.astype(jnp.float32)
    scales = jnp.abs(wide).max(-1) / 127
    # A head of zeros has codes of zero, whatever they are divided by.
    codes = jnp.round(wide / jnp.where(scales > 0, scales, 1)[..., None])
    return Stored(codes.astype(jnp.int8), scales)


def placed(
    buffer: Num[Array, "L B K T *size"],
    new: Num[Array, "B K S *size"],
    layer: Int[Array, ""],
    length: Int[Array, " B"],
) -> Num[Array, "L B K T *size"]:
    """The buffer with each row's new tokens at its `length`, written where they lie.

    A row at a time: one update of all rows at places of their own is a scatter, for which XLA
    copies the layer.
    """
    zeros = (0,) * (new.ndim - 3)

    def row(i, buffer):
        own = jax.lax.dynamic_slice_in_dim(new, i, 1, 0)[None]
        return jax.lax.dynamic_update_slice(buffer, own, (layer, i, 0, length[i], *zeros))

    rows = len(new)
    if rows > UNROLLED:
        return jax.lax.fori_loop(0, rows, row, buffer)
    for i in range(rows):
        buffer = row(i, buffer)
    return buffer
