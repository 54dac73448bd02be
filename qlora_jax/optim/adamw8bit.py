"""AdamW with its moments in 8 bits: a code a number, and a float32 scale for 256 of them.

    m    0.031 -0.002 0.017 ...       codes   203 49 187 ...      absmax   0.031

A quarter of the state: 2.03 bytes a parameter and not 8. Blocks run over one layer's part of a
leaf, which is a whole tensor in PyTorch, so they are bitsandbytes' blocks; and since a page has
whole layers, the numbers do not depend on where the state lives.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float32, UInt8

from pallas_kernels.codebooks import DYNAMIC_SIGNED, DYNAMIC_UNSIGNED
from pallas_kernels.quantize.dynamic import dynamic_code_of
from qlora_jax.optim.adamw import Moments, adamw

BLOCK = 256
SMALLEST = 4096  # numbers of a layer's part of a leaf; smaller ones stay in 32 bits
TINY = np.finfo(np.float32).tiny  # a smaller divisor is a zero where denormals are flushed


class Moment8(NamedTuple):
    """A moment in 8 bits: dynamic map[codes] * absmax.

    Attributes:
      codes: uint8 (layers, blocks, 256), zeros behind a layer's end.
      absmax: float32 (layers, blocks), the largest magnitude of each block.
    """

    codes: UInt8[Array, "layers blocks 256"]
    absmax: Float32[Array, "layers blocks"]


def adamw8bit(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    loraplus_lr_ratio: float | None = None,
) -> optax.GradientTransformation:
    """`adamw` with moments in 8 bits; a step uses them before they are rounded again.

    Leaves have a leading axis of layers, (L, r, in) say. A leaf of which a layer has fewer than
    4096 numbers stays in 32 bits. A longer leaf, a trained lm_head of (V, D), is cut into L parts
    of ceil(V / L) rows; unless these are a multiple of 256 numbers, the blocks at their ends are
    shorter than in bitsandbytes, which cuts it as one tensor.

    Source: Dettmers et al. 2021, arXiv 2110.02861; bitsandbytes.optim.AdamW8bit (0.50, CPU), to
    2.4e-7 after 20 steps. One thing differs: there a moment that is exactly zero comes back as 2e-5
    of its block's largest, and a parameter that never has a gradient drifts. Here it stays zero,
    as in bitsandbytes' CUDA kernels.
    """
    return adamw(
        learning_rate,
        b1=b1,
        b2=b2,
        eps=eps,
        weight_decay=weight_decay,
        loraplus_lr_ratio=loraplus_lr_ratio,
        moments=Moments(zeros, packed, unpacked),
    )


def zeros(
    leaf: Float32[Array, "rows *rest"], layers: int, signed: bool
) -> Moment8 | Float32[Array, "rows *rest"]:
    """`packed` of zeros, said and not computed: XLA would do it while it compiles, for seconds."""
    blocks = jax.eval_shape(functools.partial(in_blocks, layers=layers), leaf)
    if blocks is None:
        return jnp.zeros_like(leaf)
    codes = jnp.full(blocks.shape, code_of_zero(signed), jnp.uint8)
    return Moment8(codes, jnp.zeros(blocks.shape[:2], jnp.float32))


def packed(
    moment: Float32[Array, "rows *rest"], layers: int, signed: bool
) -> Moment8 | Float32[Array, "rows *rest"]:
    """A moment in 8 bits, or itself where a layer has fewer than 4096 numbers of it."""
    blocks = in_blocks(moment, layers)
    if blocks is None:
        return moment
    absmax = jnp.abs(blocks).max(axis=-1)
    scaled = blocks / jnp.maximum(absmax, TINY)[..., None]
    codes = dynamic_code_of(scaled, table_of(signed))
    return Moment8(jnp.where(blocks == 0, code_of_zero(signed), codes), absmax)


def unpacked(
    kept: Moment8 | Float32[Array, "rows *rest"], like: Float32[Array, "rows *rest"], signed: bool
) -> Float32[Array, "rows *rest"]:
    """The moment that `packed` packed, in the shape of `like`."""
    if not isinstance(kept, Moment8):
        return kept
    values = jnp.asarray(table_of(signed))[kept.codes] * kept.absmax[..., None]
    layers = len(kept.absmax)
    rows = -(-len(like) // layers)
    size = rows * like[0].size
    values = values.reshape(layers, -1)[:, :size]
    return values.reshape(layers * rows, *like.shape[1:])[: len(like)]


def in_blocks(
    moment: Float32[Array, "rows *rest"], layers: int
) -> Float32[Array, "layers blocks 256"] | None:
    """Each layer's numbers in blocks, zeros behind their end; None where they are too few."""
    rows = -(-len(moment) // layers)
    size = rows * moment[0].size
    if size < SMALLEST:
        return None
    missing = rows * layers - len(moment)
    moment = jnp.pad(moment, [(0, missing)] + [(0, 0)] * (moment.ndim - 1))
    flat = jnp.pad(moment.reshape(layers, size), ((0, 0), (0, -size % BLOCK)))
    return flat.reshape(layers, -1, BLOCK)


def table_of(signed: bool) -> np.ndarray:
    """The dynamic map of 256 float32 values: signed for m, unsigned for v."""
    return DYNAMIC_SIGNED if signed else DYNAMIC_UNSIGNED


def code_of_zero(signed: bool) -> np.uint8:
    """The code whose value is 0."""
    return np.uint8(np.flatnonzero(table_of(signed) == 0)[0])
