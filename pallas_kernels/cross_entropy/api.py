"""The public call: the loss by chunks of tokens, or by blocks of a head that is not at hand."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import gpu
from pallas_kernels.cross_entropy.by_blocks import by_blocks
from pallas_kernels.cross_entropy.head_blocks import Head, in_host
from pallas_kernels.cross_entropy.sums import CrossEntropy as CrossEntropy
from pallas_kernels.nf4_matmul.weight import Weight

CPU_CHUNK = 64  # tokens whose logits exist at one time: 64 x 49,152 float32 are 13 MB
CPU_PIECE = 4096  # a product over a whole vocabulary runs at half speed on a CPU (docs/log.md)
LARGEST_CHUNK = 512  # for a GPU whose peaks are not known: enough for each in gpu.KNOWN


class Sizes(NamedTuple):
    """How much is computed at a time.

    Attributes:
      chunk: tokens whose logits exist at one time.
      piece: rows of the head in one product of the gradient; None for all of them.
    """

    chunk: int
    piece: int | None


def cross_entropy(
    x: Float[Array, "T D"],
    head: Head,
    labels: Int[Array, " T"],
    *,
    softcap: float | None = None,
    train_head: bool = False,
) -> CrossEntropy:
    """Sum of -log softmax(logits)[label] over the labels that are not negative.

        logits = x head^T, or softcap * tanh(x head^T / softcap)

    A dense head in device memory is used whole, for chunks of tokens. The gradient with respect to
    x is known as soon as the logits are: differentiating computes both in one pass, keeps dx, and
    never computes the logits again. A head that is trained gets its gradient in the same pass,
    (V, D) float32.

    A head that is 4-bit (a Weight), or in host memory, is read once, by blocks of the vocabulary:
    two or three of them are in device memory at a time, and one of these dense (by_blocks.py).
    The gradient comes of the same single pass.

    Log-sum-exp and the sums are float32; products run in x's dtype.

    Args:
      x: (T, D) hidden states in the compute dtype.
      head: (V, D), in x's dtype; in host memory it may have another, which is rounded to x's.
      labels: (T,) int32; negative labels (-100) count neither in the loss nor in the gradient. With
        a label that is no row of the head the loss is NaN.
      softcap: the largest logit that can be; None for no bound.
      train_head: the head has a gradient; otherwise it is frozen.

    Raises:
      ValueError: x and head differ in width or dtype, or a head to train is not dense in device
        memory.
    """
    apart = isinstance(head, Weight) or in_host(head)
    if x.shape[1] != head.shape[1] or not (apart or x.dtype == head.dtype):
        what = "4-bit" if isinstance(head, Weight) else head.dtype
        raise ValueError(
            f"cross_entropy: x is {x.dtype} {x.shape}, head is {what} {head.shape}; "
            "the widths and dtypes must be equal"
        )
    if apart and train_head:
        raise ValueError("cross_entropy: a head to train must be dense and in device memory")
    if apart:
        return by_blocks(x, head, labels, softcap)
    return chunked(x, head, labels, softcap, train_head)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def chunked(
    x: Array, head: Array, labels: Array, softcap: float | None, train_head: bool
) -> CrossEntropy:
    """The sums, with a gradient for x, and for the head when it is trained."""
    return over_chunks(x, head, labels, softcap)[0]


def forward(x, head, labels, softcap, train_head):
    """The sums, and the gradients of the loss as what the backward pass needs."""
    return over_chunks(x, head, labels, softcap, for_x=True, for_head=train_head)


def backward(softcap, train_head, gradients, cotangents):
    """The gradients, scaled by what comes from behind; the other sum has none."""
    dx, dhead = (
        None if g is None else (g.astype(jnp.float32) * cotangents.loss).astype(g.dtype)
        for g in gradients
    )
    return dx, None if dhead is None else dhead.astype(dx.dtype), None


chunked.defvjp(forward, backward)


def sizes_here() -> Sizes:
    """The sizes for this platform.

    A GPU reads the head twice for each chunk, 4 V D bytes in 16 bits, and computes 4 V D flops a
    token with it: `chunk` flops a byte. So the chunk is the least power of two that is more than
    the flops that the GPU does while a byte comes from memory: 256 on A100, RTX 4090 and H200, 512
    on H100 and B200. At 64 an H100 would wait for memory four fifths of the time.
    """
    target = gpu.here()
    if target is None:
        return Sizes(CPU_CHUNK, CPU_PIECE)
    if not target.gpu.bandwidth:
        return Sizes(LARGEST_CHUNK, None)
    flops_a_byte = target.gpu.flops / target.gpu.bandwidth
    return Sizes(min(1 << math.ceil(math.log2(flops_a_byte)), LARGEST_CHUNK), None)


def over_chunks(
    x: Array,
    head: Array,
    labels: Array,
    softcap: float | None,
    for_x: bool = False,
    for_head: bool = False,
):
    """The sums, and the loss's gradients for x (T, D) and head (V, D), None where not asked for."""
    tokens, width = x.shape
    chunk, piece = sizes_here()
    size = min(chunk, tokens)
    count = -(-tokens // size)
    padding = count * size - tokens
    xs = jnp.pad(x, ((0, padding), (0, 0))).reshape(count, size, width)
    ys = jnp.pad(labels, (0, padding), constant_values=-100).reshape(count, size)

    def one(dhead, xy):
        x, labels = xy
        counted = labels >= 0
        target = jnp.maximum(labels, 0)
        logits = jax.lax.dot_general(x, head, (((1,), (1,)), ((), ()))).astype(jnp.float32)
        if softcap is not None:
            logits = jnp.tanh(logits / softcap) * softcap
        top = logits.max(axis=1, keepdims=True)
        exps = jnp.exp(logits - top)
        total = exps.sum(axis=1, keepdims=True)
        of_target = jnp.take_along_axis(logits, target[:, None], axis=1)
        loss = jnp.where(counted, (top + jnp.log(total) - of_target)[:, 0], 0).sum()
        right = (counted & (of_target >= top)[:, 0]).sum().astype(jnp.float32)
        sums = CrossEntropy(loss, right)
        if not for_x:
            return dhead, (sums, None)
        p = exps * (1 / total)
        if softcap is None and not for_head:
            mean = weighted_rows(p.astype(x.dtype), head, piece)
            dx = mean - head[target].astype(jnp.float32)
            return dhead, (sums, jnp.where(counted[:, None], dx, 0).astype(x.dtype))
        dlogits = p - jax.nn.one_hot(target, head.shape[0])
        if softcap is not None:
            dlogits *= 1 - jnp.square(logits / softcap)
        dlogits = jnp.where(counted[:, None], dlogits, 0).astype(x.dtype)
        if for_head:
            dhead += jax.lax.dot_general(
                dlogits, x, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32
            )
        return dhead, (sums, weighted_rows(dlogits, head, piece).astype(x.dtype))

    dhead = jnp.zeros(head.shape, jnp.float32) if for_head else None
    dhead, (sums, dx) = jax.lax.scan(one, dhead, (xs, ys))
    sums = jax.tree.map(lambda a: a.sum(), sums)
    return sums, (None if dx is None else dx.reshape(-1, width)[:tokens], dhead)


def weighted_rows(
    p: Float[Array, "T V"], head: Float[Array, "V D"], piece: int | None
) -> Float[Array, "T D"]:
    """p head in float32, by pieces of the vocabulary."""
    size = piece or head.shape[0]
    total = jnp.zeros((p.shape[0], head.shape[1]), jnp.float32)
    for i in range(0, head.shape[0], size):
        total += jax.lax.dot_general(
            p[:, i : i + size],
            head[i : i + size],
            (((1,), (0,)), ((), ())),
            preferred_element_type=jnp.float32,
        )
    return total
