"""A matrix in 4 bits whose errors make up for each other, on inputs like those that it will see.

Rounding each weight to its nearest code keeps the weights near, not the outputs. Here the second
moments H of the inputs say what an error costs, and the error of every column is made up for by
those that are not rounded yet:

    loss = tr((W - Q) H (W - Q)^T)          the sum over the inputs of |W x - Q x|^2
    H^-1 = U^T U, U upper triangular        column j: e = (w_j - q_j) / U_jj,  W -= e U_j

Source: Frantar and others 2022, arXiv 2210.17323 (GPTQ). What differs: codes and scales are those
that bitsandbytes stores, 8-bit scales too, so that what is made up for is what is stored; a block's
scale is chosen when its turn comes, from its weights as they are by then; blocks, and the columns
of a block, come in the order of their inputs' size, which changes nothing of how they are stored.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8
from scipy.linalg import lapack

from pallas_kernels.codebooks import DYNAMIC_SIGNED, codebook
from pallas_kernels.quantize.api import DoubleQuantized, double_quantize
from pallas_kernels.quantize.reference import NESTED_BLOCK, chosen, code_of, packed
from qlora_jax.quantization.tensor import QuantizedTensor

DAMPING = 0.01  # of the mean of H's diagonal, added to it: the paper's
# A block's scale is tried as these parts of its largest magnitude.
SHRINK = np.linspace(0.75, 1.05, 9, dtype=np.float32)


@dataclasses.dataclass(frozen=True)
class InputCosts:
    """What errors cost by a linear's inputs, ready for every matrix that takes them.

    Attributes:
      order: the columns in the order in which they are rounded.
      factor: U in that order, float32.
      block_size: weights that share a scale.
    """

    order: Int[np.ndarray, " in"]
    factor: Float[np.ndarray, "in in"]
    block_size: int

    @staticmethod
    def of(moments: Float[np.ndarray, "in in"], block_size: int = 64) -> "InputCosts":
        """Those of H = X^T X.

        Args:
          moments: H, of more inputs than a row has weights: of fewer, codes fit these alone.
          block_size: `in` is a multiple of it.

        Raises:
          ValueError: rows that are no whole blocks.
        """
        if len(moments) % block_size:
            raise ValueError(f"in is {len(moments)}; expected a multiple of {block_size}, a block")
        order = turns(np.diag(moments), block_size)
        factor = inverse_factor(moments[np.ix_(order, order)], DAMPING)
        return InputCosts(order, factor.astype(np.float32), block_size)


def quantize_compensated(
    w: Float[np.ndarray, "out in"],
    costs: InputCosts,
    *,
    kind: str = "nf4",
    double_quant: bool = True,
) -> QuantizedTensor:
    """One matrix in 4 bits, its outputs near those of `w`; with NumPy leaves, stored as `quantize`.

        costs = InputCosts.of(X.T @ X)                # X (tokens, in): inputs of this linear
        tensor = quantize_compensated(w, costs)       # X @ tensor.dequantize().T is near X @ w.T

    Args:
      w: must be finite.
      costs: of its inputs.
      kind, double_quant: as for `quantize`.
    """
    out, width = w.shape
    order, block_size = costs.order, costs.block_size
    blocks = order[::block_size] // block_size
    w = np.asarray(w, np.float32)
    absmax = np.abs(w.reshape(out, -1, block_size)).max(axis=-1)
    # Offset and nested scales are those of plain quantizing; a block chooses among 256 scales.
    grid, nested, offset = None, np.zeros_like(absmax), np.float32(0)
    if double_quant:
        grid = jax.tree.map(np.asarray, double_quantize(absmax))
        nested, offset = np.repeat(grid.absmax, NESTED_BLOCK)[: absmax.size], grid.offset
        nested = nested.reshape(absmax.shape)
    codes, scales = in_turn(
        w.T[order],
        costs.factor,
        nested.T[blocks],
        offset,
        kind=kind,
        block_size=block_size,
        double_quant=double_quant,
    )
    whole = np.empty((out, width), np.uint8)
    whole[:, order] = np.asarray(codes).T
    own = np.empty(absmax.shape, scales.dtype)
    own[:, blocks] = np.asarray(scales).T
    if double_quant:
        own = DoubleQuantized(own, grid.absmax, grid.offset)
    codes = np.asarray(packed(jnp.asarray(whole)))
    return QuantizedTensor(codes, own, (out, width), "float32", block_size, kind)


def turns(sizes: Float[np.ndarray, " in"], block_size: int) -> Int[np.ndarray, " in"]:
    """The columns, largest blocks first, and within a block the largest first.

    sizes 1 2 | 9 4 | 5 0  ->  columns 2 3 | 4 5 | 1 0
    """
    by_block = sizes.reshape(-1, block_size)
    inner = np.argsort(-by_block, axis=1, kind="stable")
    columns = inner + block_size * np.arange(len(by_block))[:, None]
    return columns[np.argsort(-by_block.sum(axis=1), kind="stable")].reshape(-1)


def inverse_factor(
    moments: Float[np.ndarray, "in in"], damping: float
) -> Float[np.ndarray, "in in"]:
    """U of H^-1 = U^T U in float64, H damped; no inverse of H is made.

    H = R R^T with R upper triangular is the Cholesky factor of H with both axes reversed; U = R^-1.
    """
    H = np.array(moments, np.float64)
    H[np.diag_indices_from(H)] += damping * np.diag(H).mean() or 1.0  # 1: there were no inputs
    lower, failed = lapack.dpotrf(H[::-1, ::-1], lower=1, clean=1)
    U, singular = lapack.dtrtri(lower[::-1, ::-1], lower=0)
    assert not failed, "the damped moments are not positive definite"
    assert not singular, "the damped moments have no inverse"
    return U


@functools.partial(jax.jit, static_argnames=("kind", "block_size", "double_quant"))
def in_turn(
    w: Float[Array, "in out"],
    factor: Float[Array, "in in"],
    nested: Float[Array, "blocks out"],
    offset: Float[Array, ""],
    *,
    kind: str,
    block_size: int,
    double_quant: bool,
) -> tuple[UInt8[Array, "in out"], Array]:
    """Codes, and scales (blocks, out) as they are stored: float32, or codes of the dynamic map."""

    def block(w, own):
        i, rows, nested = own
        here = jax.lax.dynamic_slice_in_dim(w, i * block_size, block_size)
        mine = jax.lax.dynamic_slice_in_dim(rows, i * block_size, block_size, axis=1)
        stored, scales = tried(jnp.abs(here).max(axis=0), nested, offset, double_quant)
        best = loss_of(here, scales, jnp.diag(mine), kind).argmin(axis=0)
        stored, scale = (jnp.take_along_axis(all_, best[None], 0)[0] for all_ in (stored, scales))

        def column(j, state):
            here, codes, errors = state
            code, value = nearest(here[j], scale, kind)
            error = (here[j] - value) / mine[j, j]
            return here - mine[j][:, None] * error, codes.at[j].set(code), errors.at[j].set(error)

        empty = jnp.zeros(here.shape, jnp.uint8), jnp.zeros_like(here)
        _, codes, errors = jax.lax.fori_loop(0, block_size, column, (here, *empty))
        # Rows of U are zero before their own column: what is done already stays.
        behind = jnp.matmul(rows.T, errors, precision=jax.lax.Precision.HIGHEST)
        return w - behind, (codes, stored)

    blocks = len(w) // block_size
    own = jnp.arange(blocks), factor.reshape(blocks, block_size, -1), nested
    _, (codes, scales) = jax.lax.scan(block, w, own)
    return codes.reshape(w.shape), scales


def tried(
    absmax: Float[Array, " out"],
    nested: Float[Array, " out"],
    offset: Float[Array, ""],
    double_quant: bool,
) -> tuple[Array, Float[Array, "tries out"]]:
    """The scales that a block may have, as they are stored and as numbers."""
    wanted = SHRINK[:, None] * absmax
    if not double_quant:
        return wanted, wanted
    middles = (DYNAMIC_SIGNED[:-1] + DYNAMIC_SIGNED[1:]) / 2
    code = jnp.searchsorted(middles, (wanted - offset) / jnp.where(nested > 0, nested, 1))
    code = jnp.where(nested > 0, code, 0).astype(jnp.uint8)
    return code, jnp.asarray(DYNAMIC_SIGNED)[code] * nested + offset


def loss_of(
    w: Float[Array, "block out"],
    scales: Float[Array, "tries out"],
    diagonal: Float[Array, " block"],
    kind: str,
) -> Float[Array, "tries out"]:
    """What each scale would add to the loss if no column of the block made up for another."""

    def cost(scale):
        left = w - nearest(w, scale, kind)[1]
        return jnp.square(left / diagonal[:, None]).sum(axis=0)

    # One after the other: all at once would be an array for each.
    return jax.lax.map(cost, scales)


def nearest(
    w: Float[Array, "*columns out"], scale: Float[Array, " out"], kind: str
) -> tuple[UInt8[Array, "*columns out"], Float[Array, "*columns out"]]:
    """The codes nearest to w / scale, and their values; any code where the scale is 0."""
    code = code_of(w / jnp.where(scale == 0, 1, scale), kind)
    bits = [code & np.uint8(bit) > 0 for bit in (8, 4, 2, 1)]
    return code, chosen(codebook(kind), bits) * scale
