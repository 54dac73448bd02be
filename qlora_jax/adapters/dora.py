"""DoRA: each row of W + s B A is divided by its length n and given a trained length m instead.

    y = m/n (W x + s B A x)        n_o = ||(W + s B A)_o||, row o; it has no gradient

The length of a row needs neither the sum W + s B A nor, in 4 bits, W itself as a dense matrix:

    n_o^2 = ||W_o||^2 + 2 s <(A W^T)_o, B_o> + s^2 B_o (A A^T) B_o^T

Source: Liu and others 2024, arXiv 2402.09353, section 4.3 for the constant n; values and gradients
are PEFT's.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pallas_kernels.codebooks import codebook
from pallas_kernels.dequantize.api import expand_scales
from qlora_jax.quantization.tensor import QuantizedTensor


def row_squares(weight: Float[Array, "out in"] | QuantizedTensor) -> Float[Array, " out"]:
    """||W_o||^2 of each row of one matrix, float32.

    Of a 4-bit one from its codes: the squares of the two values in a byte come from one table of
    256 sums, and a block's sum is multiplied by its scale squared.
    """
    if not isinstance(weight, QuantizedTensor):
        return jnp.square(weight.astype(jnp.float32)).sum(-1)
    if not weight.by_rows:
        return row_squares(weight.dequantize("float32"))
    squares = np.square(codebook(weight.kind))
    of_byte = jnp.asarray((squares[:, None] + squares).reshape(-1))
    codes = weight.unpack().codes.reshape(weight.shape[0], -1, weight.block_size // 2)
    of_block = of_byte.at[codes].get(mode="promise_in_bounds").sum(-1)
    return (of_block * jnp.square(expand_scales(weight.absmax))).sum(-1)


def row_norms(
    squares: Float[Array, " out"],
    AW: Float[Array, "r out"],
    A: Float[Array, "r in"],
    Bt: Float[Array, "r out"],
    scale: Float[Array, ""],
) -> Float[Array, " out"]:
    """The length of each row of W + scale * B A, float32.

    Args:
      squares: ||W_o||^2.
      AW: A W^T.
      A: (r, in).
      Bt: (r, out), B transposed.
      scale: of B A.
    """
    AW, A, Bt = (matrix.astype(jnp.float32) for matrix in (AW, A, Bt))
    gram = jnp.matmul(A, A.T, precision=jax.lax.Precision.HIGHEST)
    quadratic = (Bt * jnp.matmul(gram, Bt, precision=jax.lax.Precision.HIGHEST)).sum(0)
    total = squares + 2 * scale * (AW * Bt).sum(0) + scale * scale * quadratic
    return jnp.sqrt(jnp.maximum(total, 0))  # rounding can leave a zero row below zero


def stretch(
    magnitude: Float[Array, " out"], norms: Float[Array, " out"], scale: Float[Array, ""]
) -> Float[Array, " out"]:
    """m/n, what each row is multiplied by; differentiable in m alone.

    It is 1 for a row of zeros, where PEFT has 0/0, and in a layer of rank 0, whose scale is 0.
    """
    given = (norms > 0) & (scale > 0)
    return jnp.where(given, magnitude / jax.lax.stop_gradient(jnp.where(given, norms, 1)), 1)
