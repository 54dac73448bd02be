"""Causal attention with grouped heads: by blocks in training, over the cache in decoding."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from qlora_jax.models.cache import KVCache
from qlora_jax.models.config import ModelConfig
from qlora_jax.models.linear import Branches, Linear
from qlora_jax.models.rope import rotate

MASKED = -1e30  # a score that softmax turns to 0; -inf would make a row without keys NaN
SMALLEST_BLOCK = 128  # query rows scored at a time; half or twice as many are slower (docs/log.md)
MOST_BLOCKS = 8  # blocks are unrolled, so their number bounds the size of the program


class Context(NamedTuple):
    """What all layers of one call share."""

    cos: Float[Array, "B S half"]
    sin: Float[Array, "B S half"]
    segment_ids: Int[Array, "B S"] | None  # None: every row is one sequence without padding


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
) -> Float[Array, "B S H head_dim"]:
    """softmax(q k^T / sqrt(head_dim)) v over the earlier tokens of each token's own segment.

    Scores are float32 and exist for one block of query rows at a time, against no later key:

        keys      0   1   2   3        block 0 scores 1 block of keys, block 3 scores 4;
        block 0   x   .   .   .        what is above the diagonal is never computed.
        block 1   x   x   .   .
        block 2   x   x   x   .        The backward pass keeps q, k, v, the result and each
        block 3   x   x   x   x        row's log-sum-exp, and scores again.

    Args:
      segment_ids: tokens attend within equal ids only; 0 is padding, whose results mean nothing.

    Source: Dao and others 2022, arXiv 2205.14135 (the recomputation), in plain XLA products.
    """
    batch, length, n_heads, size = q.shape
    groups = k.shape[2]
    q = q.reshape(batch, length, groups, n_heads // groups, size).transpose(0, 2, 3, 1, 4)
    q = q.reshape(batch * groups, n_heads // groups, length, size)
    k, v = (a.swapaxes(1, 2).reshape(batch * groups, length, size) for a in (k, v))
    if segment_ids is not None:
        segment_ids = jnp.repeat(segment_ids, groups, axis=0)
    y = grouped_attention(q, k, v, segment_ids)
    y = y.reshape(batch, groups, n_heads // groups, length, size).transpose(0, 3, 1, 2, 4)
    return y.reshape(batch, length, n_heads, size)


def blocks(length: int) -> list[tuple[int, int]]:
    """First and last row of each block of queries."""
    size = max(SMALLEST_BLOCK, math.ceil(length / MOST_BLOCKS))
    return [(start, min(start + size, length)) for start in range(0, length, size)]


def product(a: Array, b: Array, over_a: int, over_b: int, dtype: DTypeLike | None = None) -> Array:
    """A product over axis `over_a` of a and `over_b` of b, batched over the first axis."""
    dimensions = (((over_a,), (over_b,)), ((0,), (0,)))
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=dtype)


def block_scores(q: Array, k: Array, segment_ids: Array | None, start: int, stop: int) -> Array:
    """Masked scores of query rows start..stop: (N, G * rows, stop) float32, N = B * K."""
    n, group, _, size = q.shape
    rows = q[:, :, start:stop].reshape(n, -1, size)
    scores = product(rows, k[:, :stop], 2, 2, jnp.float32) * np.float32(size**-0.5)
    causal = np.arange(start, stop)[:, None] >= np.arange(stop)[None, :]
    if segment_ids is None:
        seen = causal[None, None]
    else:
        same = segment_ids[:, start:stop, None] == segment_ids[:, None, :stop]
        seen = (same & causal)[:, None]
    scores = scores.reshape(n, group, stop - start, stop)
    return jnp.where(seen, scores, MASKED).reshape(n, -1, stop)


def forward(q: Array, k: Array, v: Array, segment_ids: Array | None):
    """The result, and what the backward pass needs."""
    n, group, length, size = q.shape
    # A column of ones makes the product with v sum the weights too: a pass over the scores less,
    # and the sum is that of the weights as they were rounded.
    v_and_ones = jnp.concatenate([v, jnp.ones((n, length, 1), v.dtype)], axis=2)
    outputs, logsumexps = [], []
    for start, stop in blocks(length):
        scores = block_scores(q, k, segment_ids, start, stop)
        top = scores.max(-1, keepdims=True)
        weights = jnp.exp(scores - top).astype(v.dtype)
        mixed = product(weights, v_and_ones[:, :stop], 2, 1, jnp.float32)
        total = mixed[..., size:]
        y = (mixed[..., :size] / total).astype(q.dtype)
        outputs.append(y.reshape(n, group, stop - start, size))
        logsumexps.append((top + jnp.log(total)).reshape(n, group, stop - start))
    y = jnp.concatenate(outputs, axis=2)
    return y, (q, k, v, segment_ids, y, jnp.concatenate(logsumexps, axis=2))


def backward(residuals, dy: Array):
    """Gradients for the inputs that are not frozen."""
    q, k, v, segment_ids, y, logsumexp = residuals
    n, group, length, size = q.shape
    scale = np.float32(size**-0.5)
    delta = (dy.astype(jnp.float32) * y.astype(jnp.float32)).sum(-1)
    dq, dk, dv = [], jnp.zeros((n, size, length)), jnp.zeros((n, size, length))
    for start, stop in blocks(length):

        def rows(a, start=start, stop=stop):
            return a[:, :, start:stop].reshape(n, -1, *a.shape[3:])

        weights = jnp.exp(block_scores(q, k, segment_ids, start, stop) - rows(logsumexp)[..., None])
        dweights = product(rows(dy), v[:, :stop], 2, 2, jnp.float32)
        dscores = (weights * (dweights - rows(delta)[..., None]) * scale).astype(q.dtype)
        dq.append(product(dscores, k[:, :stop], 2, 1).reshape(n, group, stop - start, size))
        # XLA on a CPU has no native product over the first axis of its left operand, and turns
        # the transposed pair back into one; the barrier keeps the form that is written here.
        dk_block, dv_block = jax.lax.optimization_barrier(
            (
                product(transposed(rows(q)), dscores, 2, 1),
                product(transposed(rows(dy)), weights.astype(q.dtype), 2, 1),
            )
        )
        dk, dv = dk.at[:, :, :stop].add(dk_block), dv.at[:, :, :stop].add(dv_block)
    back = [a.swapaxes(1, 2).astype(q.dtype) for a in (dk, dv)]
    return jnp.concatenate(dq, axis=2), *back, None


@jax.custom_vjp
def grouped_attention(q: Array, k: Array, v: Array, segment_ids: Array | None) -> Array:
    """q (N, G, S, head_dim), k and v (N, S, head_dim), segment_ids (N, S); N = B * K."""
    return forward(q, k, v, segment_ids)[0]


grouped_attention.defvjp(forward, backward)


def transposed(a: Float[Array, "N rows size"]) -> Float[Array, "N size rows"]:
    """The transpose as a product with the identity, which comes out in the layout products want."""
    identity = jnp.broadcast_to(jnp.eye(a.shape[2], dtype=a.dtype), (a.shape[0], *a.shape[2:] * 2))
    return product(identity, a, 2, 2)


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
