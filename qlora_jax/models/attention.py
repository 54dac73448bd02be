"""Causal attention with grouped heads: no S x S scores in training, over the cache in decoding.

Here is the one place that chooses how: cuDNN's kernels on a GPU where their conditions hold, XLA's
products by blocks of query rows everywhere else.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels import backends
from qlora_jax.models.cache import KVCache
from qlora_jax.models.chunked_attention import MASKED, chunked_attention
from qlora_jax.models.config import ModelConfig
from qlora_jax.models.cudnn_attention import cudnn_attention
from qlora_jax.models.linear import Branches, Linear
from qlora_jax.models.rope import rotate

# In the order in which they are asked; each refusal has its reason, see `explain`.
BACKENDS = (("cudnn", cudnn_attention), ("chunked", chunked_attention))


class Context(NamedTuple):
    """What all layers of one call share."""

    cos: Float[Array, "B S half"]
    sin: Float[Array, "B S half"]
    segment_ids: Int[Array, "B S"] | None  # None: every row is one sequence, padded behind it


class Attention(nnx.Module):
    """Self-attention with rotary positions and grouped key/value heads.

    Source: transformers' LlamaAttention.
    """

    def __init__(
        self,
        config: ModelConfig,
        q_proj: Linear,
        k_proj: Linear,
        v_proj: Linear,
        o_proj: Linear,
    ):
        self.config = config
        self.q_proj = q_proj
        self.k_proj = k_proj
        self.v_proj = v_proj
        self.o_proj = o_proj

    def __call__(
        self,
        x: Float[Array, "B S D"],
        context: Context,
        branches: Branches,
        cache: KVCache | None = None,
        layer: Int[Array, ""] | None = None,
    ) -> tuple[Float[Array, "B S D"], KVCache | None]:
        batch, length, _ = x.shape

        def heads(name: str) -> Array:
            y = getattr(self, name)(x, branches.get(f"self_attn.{name}"))
            return y.reshape(batch, length, -1, self.config.head_dim)

        q = rotate(heads("q_proj"), context.cos, context.sin)
        k = rotate(heads("k_proj"), context.cos, context.sin)
        v = heads("v_proj")
        if cache is None:
            y = causal_attention(q, k, v, context.segment_ids)
        else:
            cache = cache.store(layer, k, v)
            y = cached_attention(q, cache.k[layer], cache.v[layer], cache.length)
        y = y.reshape(batch, length, -1)
        return self.o_proj(y, branches.get("self_attn.o_proj")), cache


def causal_attention(
    q: Float[Array, "B S H head_dim"],
    k: Float[Array, "B S K head_dim"],
    v: Float[Array, "B S K head_dim"],
    segment_ids: Int[Array, "B S"] | None = None,
    backend: str | None = None,
) -> Float[Array, "B S H head_dim"]:
    """softmax(q k^T / sqrt(head_dim)) v over the earlier tokens of each token's own segment.

    No S x S scores are in memory, forward or backward.

    Args:
      segment_ids: tokens attend within equal ids only; 0 is padding, whose results mean nothing.
        None: every row is one sequence; padding behind it needs no mask.
      backend: the only one to ask; by default the first of BACKENDS that takes the input.

    Raises:
      Unsupported: the named backend does not take this input, and why.
    """
    return backends.dispatch(BACKENDS, q, k, v, segment_ids, backend=backend)


def explain(
    config: ModelConfig, rows: int, length: int, dtype: DTypeLike, packed: bool
) -> backends.Choice:
    """Which backend `causal_attention` chooses for a batch of a model, and why not the others.

    Args:
      rows: sequences or packed rows of the batch.
      length: tokens of a row.
      packed: the batch has segment ids.
    """
    heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
    q, k, v = (jax.ShapeDtypeStruct((rows, length, n, config.head_dim), dtype) for n in heads)
    segment_ids = jax.ShapeDtypeStruct((rows, length), jnp.int32) if packed else None
    return backends.explain(BACKENDS, q, k, v, segment_ids)


def cached_attention(
    q: Float[Array, "B S H head_dim"],
    k: Float[Array, "B K T head_dim"],
    v: Float[Array, "B K T head_dim"],
    length: Int[Array, " B"],
) -> Float[Array, "B S H head_dim"]:
    """Attention of S new tokens, which stand at `length`.. in the cache, to all before them."""
    batch, new, n_heads, size = q.shape
    groups, room = k.shape[1:3]
    q = q.reshape(batch, new, groups, n_heads // groups, size)
    scores = jnp.einsum("bskgd,bktd->bkgst", q, k, preferred_element_type=jnp.float32)
    last = length[:, None] + jnp.arange(new)
    seen = jnp.arange(room)[None, None] <= last[:, :, None]
    scores = jnp.where(seen[:, None, None], scores * np.float32(size**-0.5), MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    y = jnp.einsum("bkgst,bktd->bskgd", weights, v, preferred_element_type=jnp.float32)
    return y.reshape(batch, new, n_heads, size).astype(q.dtype)
