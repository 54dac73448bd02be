"""nf4_matmul on a CPU: dequantize one matrix without interleaving, then one native product."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels.backends import Unsupported
from pallas_kernels.codebooks import codebook
from pallas_kernels.dequantize.api import expand_scales
from pallas_kernels.nf4_matmul.weight import Weight


def check(w: Weight) -> None:
    """Raises Unsupported for another device or code order."""
    if jax.default_backend() != "cpu":
        raise Unsupported(f"the default device is a {jax.default_backend()}, not a CPU")
    if w.layout != "halves":
        raise Unsupported(f"layout is {w.layout!r}: prepack the codes as 'halves'")


def dense(w: Weight, dtype: DTypeLike) -> Float[Array, "out in"]:
    """W, dequantized, the same numbers as the reference's.

    In `halves` order a row's first half is all high nibbles and its second all low ones, so the
    two are joined as they are; interleaving them takes twice as long (docs/log.md).
    """
    out, width = w.shape
    codes = jnp.concatenate([w.codes >> 4, w.codes & 15], axis=1)
    table = jnp.asarray(codebook(w.kind))
    values = table.at[codes].get(mode="promise_in_bounds")
    scales = expand_scales(w.scales).reshape(out, width // w.block_size, 1)
    return (values.reshape(out, -1, w.block_size) * scales).reshape(out, width).astype(dtype)


def forward(x: Float[Array, "M in"], w: Weight) -> Float[Array, "M out"]:
    """x W^T. Contracting both last axes is native in bfloat16; `x @ w.T` is not (docs/log.md)."""
    check(w)
    return jax.lax.dot_general(x, dense(w, x.dtype), (((1,), (1,)), ((), ())))


def backward(dy: Float[Array, "M out"], w: Weight) -> Float[Array, "M in"]:
    """dy W."""
    check(w)
    return jax.lax.dot_general(dy, dense(w, dy.dtype), (((1,), (0,)), ((), ())))
