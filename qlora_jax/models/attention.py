"""Causal attention with grouped heads: no S x S scores in training, over the cache in decoding.

Here is the one place that chooses how: cuDNN's kernels on a GPU where their conditions hold, XLA's
products by blocks of query rows everywhere else.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Num

from pallas_kernels import backends, gpu
from qlora_jax.models.cache import KVCache, Stored
from qlora_jax.models.chunked_attention import MASKED, chunked_attention
from qlora_jax.models.config import ModelConfig
from qlora_jax.models.cudnn_attention import cudnn_attention
from qlora_jax.models.linear import Branches, Linear
from qlora_jax.models.norms import RMSNorm
from qlora_jax.models.rope import rotate
from qlora_jax.models.scores import PLAIN, Scores

# In the order in which they are asked; each refusal has its reason, see `explain`.
BACKENDS = (("cudnn", cudnn_attention), ("chunked", chunked_attention))


class Context(NamedTuple):
    """What a layer's attention needs beside its input.

    Attributes:
      window: how far one sees where layers differ and it is known only as they run, int32; None
        where `scores` says it for all.
    """

    cos: Float[Array, "B S half"]
    sin: Float[Array, "B S half"]
    segment_ids: Int[Array, "B S"] | None  # None: every row is one sequence, padded behind it
    scores: Scores = PLAIN
    window: Int[Array, ""] | None = None


class Attention(nnx.Module):
    """Self-attention with rotary positions and grouped key/value heads.

    Args:
      linears: q_proj, k_proj, v_proj and o_proj, or qkv_proj and o_proj.
      norms: q_norm and k_norm over the channels of a head, before it is rotated; or none.

    Source: transformers' LlamaAttention, Phi3Attention and Qwen3Attention.
    """

    def __init__(
        self, config: ModelConfig, linears: Mapping[str, Linear], norms: Mapping[str, RMSNorm]
    ):
        self.config = config
        for name, module in {**linears, **norms}.items():
            setattr(self, name, module)

    def __call__(
        self,
        x: Float[Array, "B S D"],
        context: Context,
        branches: Branches,
        cache: KVCache | None = None,
        layer: Int[Array, ""] | None = None,
    ) -> tuple[Float[Array, "B S D"], KVCache | None]:
        batch, length, _ = x.shape
        q, k, v = (
            y.reshape(batch, length, -1, self.config.head_dim) for y in self.projected(x, branches)
        )
        if self.config.family.head_norms:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = (rotate(y, context.cos, context.sin) for y in (q, k))
        if cache is None:
            y = causal_attention(q, k, v, context.segment_ids, context.window, context.scores)
        else:
            cache = cache.store(layer, k, v)
            y = cached_attention(
                q, *cache.of_layer(layer), cache.length, context.window, context.scores
            )
        y = y.reshape(batch, length, -1)
        return self.o_proj(y, branches.get("self_attn.o_proj")), cache

    def projected(self, x: Float[Array, "B S D"], branches: Branches) -> tuple[Array, ...]:
        """Queries, keys and values of all heads, side by side."""

        def linear(name: str) -> Array:
            return getattr(self, name)(x, branches.get(f"self_attn.{name}"))

        if not self.config.fused:
            return linear("q_proj"), linear("k_proj"), linear("v_proj")
        heads = self.config.num_attention_heads * self.config.head_dim
        groups = self.config.num_key_value_heads * self.config.head_dim
        return tuple(jnp.split(linear("qkv_proj"), (heads, heads + groups), axis=-1))


def causal_attention(
    q: Float[Array, "B S H head_dim"],
    k: Float[Array, "B S K head_dim"],
    v: Float[Array, "B S K head_dim"],
    segment_ids: Int[Array, "B S"] | None = None,
    window: Int[Array, ""] | None = None,
    scores: Scores = PLAIN,
    backend: str | None = None,
) -> Float[Array, "B S H head_dim"]:
    """softmax(scores) v over the earlier tokens of each token's own segment.

    No S x S scores are in memory, forward or backward.

    Args:
      segment_ids: tokens attend within equal ids only; 0 is padding, whose results mean nothing.
        None: every row is one sequence; padding behind it needs no mask.
      window: a window that is known only when this runs.
      scores: their scale, soft cap and window.
      backend: the only one to ask; by default the first of BACKENDS that takes the input.

    Raises:
      Unsupported: the named backend does not take this input, and why.
    """
    return backends.dispatch(BACKENDS, q, k, v, segment_ids, window, backend=backend, scores=scores)


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
    differ = len(set(config.reach(length))) > 1
    window = jax.ShapeDtypeStruct((), jnp.int32) if differ else None
    return backends.explain(BACKENDS, q, k, v, segment_ids, window, scores=config.scores(length))


def cached_attention(
    q: Float[Array, "B S H head_dim"],
    k: Stored,
    v: Stored,
    length: Int[Array, " B"],
    window: Int[Array, ""] | None = None,
    scores: Scores = PLAIN,
) -> Float[Array, "B S H head_dim"]:
    """Attention of S new tokens, which stand at `length`.. in the cache, to all before them.

    The scales of 8-bit keys multiply the scores, and those of values the weights: nothing of the
    size of the cache is made of them. On a CPU products are in float32: XLA 0.12 compiles some of
    bfloat16 into float32 there that it then cannot run (docs/log.md).

    Args:
      k, v: of one layer, (B, K, T, head_dim).
    """
    batch, new, n_heads, size = q.shape
    groups, room = k.codes.shape[1:3]
    dtype = jnp.float32 if gpu.here() is None else q.dtype
    grouped = q.reshape(batch, new, groups, -1, size).transpose(0, 2, 3, 1, 4)
    found = by_head(grouped.reshape(batch, groups, -1, size), k.codes, 3, dtype)
    found = found.reshape(batch, groups, -1, new, room)
    if k.scales is not None:
        found = found * k.scales[:, :, None, None]
    back = (length[:, None] + jnp.arange(new))[:, :, None] - jnp.arange(room)
    seen = scores.seen(back, window)[:, None, None]
    weights = jax.nn.softmax(jnp.where(seen, scores.of(found, size), MASKED), axis=-1)
    if v.scales is not None:
        weights = weights * v.scales[:, :, None, None]
    y = by_head(weights.reshape(batch, groups, -1, room), v.codes, 2, dtype)
    y = y.reshape(batch, groups, -1, new, size).transpose(0, 3, 1, 2, 4)
    return y.reshape(batch, new, n_heads, size).astype(q.dtype)


def by_head(
    rows: Float[Array, "B K N n"], held: Num[Array, "B K T head_dim"], axis: int, dtype: DTypeLike
) -> Float[Array, "B K N m"]:
    """Products of each head's rows with what the cache holds, over its `axis`, 2 or 3; float32.

    einsum would put the cache to the left and contract the first axis of it, for which XLA on a
    CPU has no quick product: the values took three times as long.
    """
    dims = (((3,), (axis,)), ((0, 1), (0, 1)))
    rows, held = rows.astype(dtype), held.astype(dtype)
    return jax.lax.dot_general(rows, held, dims, preferred_element_type=jnp.float32)
