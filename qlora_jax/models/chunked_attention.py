"""Causal attention by blocks of query rows: one block's scores exist at a time, and no others.

The backward pass scores again from the row sums that the forward pass kept. A block is scored
against no later key, which leaves out nearly half of the work, and is one whole product for XLA.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels import gpu
from qlora_jax.models.remat import kept_by_name
from qlora_jax.models.scores import PLAIN, Scores

MASKED = -1e30  # a score that softmax turns to 0; -inf would make a row without keys NaN
MOST_BANDS = 8  # bands are unrolled, so their number bounds the size of the program
CPU_ROWS = 128  # of a block on a CPU; half or twice as many are slower (docs/log.md)
# Of a block on a GPU. Fewer read and write the sums for k and v more often: at 128 rows that is a
# third of the scores' own traffic when 4 heads share a key. More cost memory: at 128 rows a block
# holds 12 bytes x heads x 128 a token, in Llama-3.1-8B 49 KB, less than the feed-forward layer's.
GPU_ROWS = 128


class Form(NamedTuple):
    """How a platform wants the same sums; both forms run on both.

    Attributes:
      rows: query rows of a block.
      by_products: sums and transposes are made by products. XLA on a CPU is at its best in them,
        and has none over the first axis of its left operand. A GPU has them all, sums a row while
        it makes it, and would pad the column that the sum adds to v.
    """

    rows: int
    by_products: bool


class Band(NamedTuple):
    """Query rows start..stop in blocks of equal size, scored against the keys before `stop`."""

    start: int
    stop: int
    rows: int

    def keys(self, scores: Scores) -> slice:
        """The keys that any row sees."""
        return slice(scores.first_key(self.start), self.stop)


def chunked_attention(
    q: Float[Array, "B S H head_dim"],
    k: Float[Array, "B S K head_dim"],
    v: Float[Array, "B S K head_dim"],
    segment_ids: Int[Array, "B S"] | None = None,
    window: Int[Array, ""] | None = None,
    scores: Scores = PLAIN,
) -> Float[Array, "B S H head_dim"]:
    """softmax(scores) v over the earlier tokens of each token's own segment.

    Scores are float32 and exist for one block of query rows at a time, against no later band:

        keys      0   1   2   3        Rows of a band of one block are scored against 1 band of
        band 0    x   .   .   .        keys, those of band 3 against 4; what is above the diagonal
        band 1    x   x   .   .        is never computed.
        band 2    x   x   x   .        The backward pass keeps q, k, v, the result and each row's
        band 3    x   x   x   x        log-sum-exp.

    Args:
      segment_ids: tokens attend within equal ids only; 0 is padding, whose results mean nothing.
      window: a window known only when it runs, where layers of one program differ.
      scores: scale, soft cap, and a window known when this is compiled: keys before the window of
        a band's first row are left out of the band's products.

    Source: Dao and others 2022, arXiv 2205.14135 (the recomputation), in plain XLA products.
    """
    batch, length, n_heads, size = q.shape
    groups = k.shape[2]
    q = q.reshape(batch, length, groups, n_heads // groups, size).transpose(0, 2, 3, 1, 4)
    q = q.reshape(batch * groups, n_heads // groups, length, size)
    k, v = (a.swapaxes(1, 2).reshape(batch * groups, length, size) for a in (k, v))
    if segment_ids is not None:
        segment_ids = jnp.repeat(segment_ids, groups, axis=0)
    y = attention(q, k, v, segment_ids, window, form_here(length), scores)
    y = y.reshape(batch, groups, n_heads // groups, length, size).transpose(0, 3, 1, 2, 4)
    return y.reshape(batch, length, n_heads, size)


def form_here(length: int) -> Form:
    """The form for this platform."""
    if gpu.here() is None:
        return Form(rows=max(CPU_ROWS, math.ceil(length / MOST_BANDS)), by_products=True)
    return Form(rows=GPU_ROWS, by_products=False)


def bands(length: int, rows: int) -> list[Band]:
    """At most MOST_BANDS bands of whole blocks, and one for the rows that are left."""
    blocks, left = divmod(length, rows)
    size = rows * math.ceil(blocks / MOST_BANDS)
    whole = length - left
    found = [Band(i, min(i + size, whole), rows) for i in range(0, whole, size or 1)]
    return found + [Band(whole, length, left)] * (left > 0)


def over_blocks(band: Band, block: Callable[..., tuple[Any, Any]], arrays: tuple) -> tuple:
    """`block(first, *parts)` for the rows of each block of a band, one block after the other.

    Args:
      block: takes the number of its first row and its rows of each array, and returns a tree of
        results by row and a tree of results to be summed over the blocks.
      arrays: (N, G, S, ...) each, or None.

    Returns:
      The rows of the band, (N, G, stop - start, ...) each, and the sums.
    """

    def run(first):
        parts = jax.tree.map(lambda a: rows_of(a, first, band.rows), arrays)
        return block(first, *parts)

    count = (band.stop - band.start) // band.rows
    if count == 1:
        return run(band.start)

    def step(sums, first):
        rows, more = run(first)
        return jax.tree.map(jnp.add, sums, more), rows

    shapes = jax.eval_shape(run, band.start)[1]
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    firsts = band.start + jnp.arange(count) * band.rows
    sums, rows = jax.lax.scan(step, zeros, firsts)
    return jax.tree.map(joined, rows), sums


def rows_of(a: Array, first: int | Array, rows: int) -> Array:
    """Rows first.. of (N, G, S, ...)."""
    if isinstance(first, int):
        return a[:, :, first : first + rows]
    return jax.lax.dynamic_slice_in_dim(a, first, rows, axis=2)


def joined(a: Float[Array, "blocks N G rows ..."]) -> Float[Array, "N G band ..."]:
    """Blocks behind each other again."""
    a = jnp.moveaxis(a, 0, 2)
    return a.reshape(*a.shape[:2], -1, *a.shape[4:])


def product(a: Array, b: Array, over_a: int, over_b: int, dtype: DTypeLike | None = None) -> Array:
    """A product over axis `over_a` of a and `over_b` of b, batched over the first axis."""
    dimensions = (((over_a,), (over_b,)), ((0,), (0,)))
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=dtype)


def masked_scores(
    q: Float[Array, "N G rows size"],
    k: Float[Array, "N keys size"],
    segment_ids: Int[Array, "N S"] | None,
    window: Int[Array, ""] | None,
    first: int | Array,
    keys: slice,
    scores: Scores,
) -> Float[Array, "N G*rows keys"]:
    """Scores of the query rows from `first` on, in float32; MASKED where nothing is seen."""
    n, group, rows, size = q.shape
    found = scores.of(product(q.reshape(n, -1, size), k, 2, 2, jnp.float32), size)
    back = (first + np.arange(rows))[:, None] - np.arange(keys.start, keys.stop)
    seen = scores.seen(back, window)[None, None]
    if segment_ids is not None:
        own = rows_of(segment_ids[:, None], first, rows)
        seen = seen & (own[..., None] == segment_ids[:, None, None, keys])
    # The bound is one head's. Selecting MASKED itself would make XLA keep an array of it, as large
    # as the scores, for every band of the program: 0.6 GB for 64 heads and 4096 tokens.
    bound = jnp.where(seen, jnp.inf, MASKED)
    return jnp.minimum(found.reshape(n, group, rows, -1), bound).reshape(n, group * rows, -1)


def softcap_slope(found: Float[Array, "..."], softcap: float) -> Float[Array, "..."]:
    """How a capped score moves with the score itself; 0 where it is masked."""
    return 1 - jnp.square(jnp.maximum(found, -softcap) / softcap)


def mixed(
    weights: Float[Array, "N R stop"], v: Float[Array, "N stop size"], by_products: bool
) -> tuple[Float[Array, "N R size"], Float[Array, "N R 1"]]:
    """The values by weight, and the sum of each row's weights, both float32."""
    if not by_products:
        total = weights.sum(-1, keepdims=True)
        return product(weights.astype(v.dtype), v, 2, 1, jnp.float32), total
    # A column of ones makes the product with v sum the weights too: a pass over the scores less,
    # and the sum is that of the weights as they were rounded.
    ones = jnp.ones((*v.shape[:2], 1), v.dtype)
    y = product(weights.astype(v.dtype), jnp.concatenate([v, ones], axis=2), 2, 1, jnp.float32)
    return y[..., :-1], y[..., -1:]


def over_rows(
    a: Float[Array, "N R size"], b: Float[Array, "N R stop"], by_products: bool
) -> Float[Array, "N size stop"]:
    """a^T b: sums over the rows of a block."""
    if not by_products:
        return product(a, b, 1, 1, jnp.float32)
    # XLA on a CPU turns the transposed pair back into the product that it does not have; the
    # barrier keeps the form that is written here. The identity gives the transpose in the layout
    # that products want.
    identity = jnp.broadcast_to(jnp.eye(a.shape[2], dtype=a.dtype), (a.shape[0], *a.shape[2:] * 2))
    return jax.lax.optimization_barrier(product(product(identity, a, 2, 2), b, 2, 1))


def forward(
    q: Array,
    k: Array,
    v: Array,
    segment_ids: Array | None,
    window: Array | None,
    form: Form,
    scores: Scores,
):
    """The result, and what the backward pass needs."""
    outputs = []
    for band in bands(q.shape[2], form.rows):
        keys = band.keys(scores)
        earlier = k[:, keys], v[:, keys]

        def block(first, q, keys=keys, earlier=earlier):
            n, group, rows, size = q.shape
            own_k, own_v = earlier
            found = masked_scores(q, own_k, segment_ids, window, first, keys, scores)
            top = found.max(-1, keepdims=True)
            y, total = mixed(jnp.exp(found - top), own_v, form.by_products)
            y = (y / total).astype(q.dtype).reshape(n, group, rows, size)
            return (y, (top + jnp.log(total)).reshape(n, group, rows)), ()

        outputs.append(over_blocks(band, block, (q,))[0])
    y, logsumexp = (
        kept_by_name(jnp.concatenate(parts, axis=2)) for parts in zip(*outputs, strict=True)
    )
    return y, (q, k, v, segment_ids, window, y, logsumexp)


def backward(form: Form, scores: Scores, residuals, dy: Array):
    """Gradients for q, k and v."""
    q, k, v, segment_ids, window, y, logsumexp = residuals
    n, group, length, size = q.shape
    scale = np.float32(scores.scale_of(size))
    delta = (dy.astype(jnp.float32) * y.astype(jnp.float32)).sum(-1)
    dq, dk, dv = [], jnp.zeros((n, size, length)), jnp.zeros((n, size, length))
    for band in bands(length, form.rows):
        keys = band.keys(scores)
        earlier = k[:, keys], v[:, keys]

        def block(first, q, dy, logsumexp, delta, keys=keys, earlier=earlier):
            rows, (own_k, own_v) = q.shape[2], earlier
            found = masked_scores(q, own_k, segment_ids, window, first, keys, scores)
            q, dy = (a.reshape(n, -1, size) for a in (q, dy))
            weights = jnp.exp(found - logsumexp.reshape(n, -1, 1))
            dweights = product(dy, own_v, 2, 2, jnp.float32)
            dscores = weights * (dweights - delta.reshape(n, -1, 1)) * scale
            if scores.softcap is not None:
                dscores *= softcap_slope(found, scores.softcap)
            dscores = dscores.astype(q.dtype)
            dq = product(dscores, own_k, 2, 1).reshape(n, group, rows, size)
            dk = over_rows(q, dscores, form.by_products)
            return dq, (dk, over_rows(dy, weights.astype(q.dtype), form.by_products))

        dq_band, sums = over_blocks(band, block, (q, dy, logsumexp, delta))
        dq.append(dq_band)
        dk, dv = (a.at[:, :, keys].add(b) for a, b in zip((dk, dv), sums, strict=True))
    back = [a.swapaxes(1, 2).astype(q.dtype) for a in (dk, dv)]
    return jnp.concatenate(dq, axis=2), *back, None, None


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def attention(
    q: Array,
    k: Array,
    v: Array,
    segment_ids: Array | None,
    window: Array | None,
    form: Form,
    scores: Scores,
) -> Array:
    """q (N, G, S, head_dim), k and v (N, S, head_dim), segment_ids (N, S); N = B * K."""
    return forward(q, k, v, segment_ids, window, form, scores)[0]


attention.defvjp(forward, backward)
