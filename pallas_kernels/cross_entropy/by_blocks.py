"""The loss over blocks of the vocabulary: a head that is 4-bit or in host memory is read once.

With e = exp(logit - top), `top` the largest logit so far, three sums go over the blocks

    total = sum of e      weighted = sum of e * head row      target = the label's own row

and are scaled by exp(old top - new top) when a block has a larger logit, as in FlashAttention, of
which this is the case keys = values = head. Behind the last block

    loss = top + log(total) - label's logit          dx = weighted / total - target

A second pass over the head that computes the logits again, and then knows p, would take three
products where this takes two, and twice the copies; it would save `target`, T x D.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels import gpu
from pallas_kernels.cross_entropy.head_blocks import Blocks, Head, even_rows
from pallas_kernels.cross_entropy.sums import CrossEntropy

LEAST = np.finfo(np.float32).min  # no -inf: of two of them the difference is NaN
DENSE_BYTES = 32 << 20  # of a block: small beside T x D, many times what its launches cost
GPU_ROWS, CPU_ROWS = 8192, 4096
GPU_TOKENS, CPU_TOKENS = 1024, 64  # 1024 x 8192 float32 logits are 34 MB, 64 x 4096 1 MB
PARTS = 8  # of longer texts each part has more tokens: their own T x D are larger still


class Sizes(NamedTuple):
    """How much is computed at a time.

    Attributes:
      tokens: of a part, which shares a product with a block.
      rows: of the head in a block, at most.
    """

    tokens: int
    rows: int


class Running(NamedTuple):
    """What is known of each token after some blocks; float32 but for `target`.

    Attributes:
      top: the largest logit.
      total: sum of exp(logit - top).
      of_target: the label's logit; NaN while its block has not come.
      weighted: sum of exp(logit - top) * row, (T, D); None where no gradient is asked for.
      target: the label's row in x's dtype, (T, D), or None.
    """

    top: Float[Array, " T"]
    total: Float[Array, " T"]
    of_target: Float[Array, " T"]
    weighted: Float[Array, "T D"] | None
    target: Float[Array, "T D"] | None


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def by_blocks(
    x: Float[Array, "T D"], head: Head, labels: Int[Array, " T"], softcap: float | None
) -> CrossEntropy:
    """The sums, with a gradient for x."""
    return over_blocks(x, head, labels, softcap, for_x=False)[0]


def forward(x, head, labels, softcap):
    """The sums, and the gradient of the loss as what the backward pass needs."""
    return over_blocks(x, head, labels, softcap, for_x=True)


def backward(softcap, dx, cotangents):
    """The gradient, scaled by what comes from behind."""
    return (dx.astype(jnp.float32) * cotangents.loss).astype(dx.dtype), None, None


by_blocks.defvjp(forward, backward)


def sizes_here(tokens: int, width: int, itemsize: int) -> Sizes:
    """The sizes for this platform, for so many tokens and a dense head of rows of `width`."""
    part, rows = (CPU_TOKENS, CPU_ROWS) if gpu.here() is None else (GPU_TOKENS, GPU_ROWS)
    part = max(part, -(-tokens // PARTS))
    return Sizes(part, min(rows, max(DENSE_BYTES // (width * itemsize), 1)))


def over_blocks(x: Array, head: Head, labels: Array, softcap: float | None, for_x: bool):
    """The sums, and the loss's gradient for x (T, D), None where not asked for."""
    sizes = sizes_here(*x.shape, x.dtype.itemsize)
    blocks = Blocks(head, even_rows(head, sizes.rows))
    parts = [slice(at, at + sizes.tokens) for at in range(0, len(x), sizes.tokens)]

    def add(sums, block, number, rows: int):
        dense = blocks.dense(block, rows, x.dtype)
        places = labels - number * blocks.rows
        new = []
        for own, part in zip(sums, parts, strict=True):
            mine = x[part]
            if new:  # one after the other, or XLA makes one product, and logits, of all parts
                mine, new[-1] = jax.lax.optimization_barrier((mine, new[-1]))
            new.append(with_block(own, mine, places[part], dense, softcap))
        return new

    sums = [nothing_yet(x[part], for_x) for part in parts]
    count, rest = blocks.count, blocks.rest
    if count:
        # The counter starts at 1 and is itself the number of the block that is fetched, while the
        # one before it is computed. Were it 0 and the number one more, XLA would share that sum
        # with the counter's own increment, which waits for the body: no copy would overlap it.
        # The parts are no loop of their own, which XLA would let wait for the copy.
        def step(carry):
            number, block, sums = carry
            coming = blocks.fetched(number)
            return number + 1, coming, add(sums, block, number - 1, blocks.rows)

        start = jnp.int32(1), blocks.fetched(0), sums
        _, block, sums = jax.lax.while_loop(lambda carry: carry[0] < count, step, start)
        sums = add(sums, block, count - 1, blocks.rows)
    if rest:
        sums = add(sums, blocks.fetched_rest(), count, rest)
    ends = [finished(own, labels[part], softcap) for own, part in zip(sums, parts, strict=True)]
    losses, dxs = zip(*ends, strict=True)
    loss = jax.tree.map(lambda *each: jnp.stack(each).sum(), *losses)
    return loss, jnp.concatenate(dxs).astype(x.dtype) if for_x else None


def nothing_yet(x: Float[Array, "T D"], for_x: bool) -> Running:
    """The sums over no block."""
    return Running(
        top=jnp.full(len(x), LEAST),
        total=jnp.zeros(len(x), jnp.float32),
        of_target=jnp.full(len(x), jnp.nan, jnp.float32),
        weighted=jnp.zeros(x.shape, jnp.float32) if for_x else None,
        target=jnp.zeros_like(x) if for_x else None,
    )


def with_block(
    sums: Running,
    x: Float[Array, "T D"],
    places: Int[Array, " T"],
    block: Float[Array, "rows D"],
    softcap: float | None,
) -> Running:
    """The sums of some tokens with one more block.

    Args:
      places: each label's row in this block; outside it for labels of other blocks.
    """
    logits = product(x, block, 1)
    if softcap is not None:
        logits = jnp.tanh(logits / softcap) * softcap
    top = jnp.maximum(sums.top, logits.max(axis=1))
    exps = jnp.exp(logits - top[:, None])
    shrink = jnp.exp(sums.top - top)
    inside = (places >= 0) & (places < len(block))
    row = jnp.where(inside, places, 0)
    of_target = jnp.take_along_axis(logits, row[:, None], axis=1)[:, 0]
    new = Running(
        top=top,
        # A sum, which keeps NaN; a maximum does not on a CPU (docs/log.md).
        total=sums.total * shrink + exps.sum(axis=1),
        of_target=jnp.where(inside, of_target, sums.of_target),
        weighted=None,
        target=None,
    )
    if sums.weighted is None:
        return new
    weights = exps if softcap is None else exps * (1 - jnp.square(logits / softcap))
    weighted = sums.weighted * shrink[:, None] + product(weights.astype(x.dtype), block, 0)
    target = jnp.where(inside[:, None], block[row], sums.target)
    return new._replace(weighted=weighted, target=target)


def product(a: Array, block: Float[Array, "rows D"], contracted: int) -> Float[Array, "T n"]:
    """a block^T (contracted 1) or a block (0), accumulated and left in float32."""
    axes = (((1,), (contracted,)), ((), ()))
    return jax.lax.dot_general(a, block, axes, preferred_element_type=jnp.float32)


def finished(
    sums: Running, labels: Int[Array, " T"], softcap: float | None
) -> tuple[CrossEntropy, Float[Array, "T D"] | None]:
    """What comes of the sums over all blocks."""
    counted = labels >= 0
    loss = jnp.where(counted, sums.top + jnp.log(sums.total) - sums.of_target, 0).sum()
    right = (counted & (sums.of_target >= sums.top)).sum().astype(jnp.float32)
    if sums.weighted is None:
        return CrossEntropy(loss, right), None
    target = sums.target.astype(jnp.float32)
    if softcap is not None:
        target *= 1 - jnp.square(sums.of_target / softcap)[:, None]
    dx = sums.weighted * (1 / sums.total)[:, None] - target
    return CrossEntropy(loss, right), jnp.where(counted[:, None], dx, 0)
