"""A linear layer, dense or 4-bit, with or without an adapter; nothing above it knows which."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from pallas_kernels import gpu
from pallas_kernels.lora_matmul import lora_delta, lora_matmul
from pallas_kernels.nf4_matmul import nf4_matmul
from qlora_jax.adapters.dora import row_norms, row_squares, stretch
from qlora_jax.adapters.dropout import dropped
from qlora_jax.adapters.prepared import Segments
from qlora_jax.quantization.tensor import QuantizedTensor


class Branch(NamedTuple):
    """One layer's adapter of one linear: y += scale * (dropout(x) A^T) B^T; DoRA with magnitude."""

    A: Float[Array, "r in"]
    Bt: Float[Array, "r out"]  # B, transposed once for all layers
    scale: Float[Array, ""]
    dropout: float = 0.0
    key: Array | None = None  # for dropout; None in evaluation
    magnitude: Float[Array, " out"] | None = None  # DoRA's length of each row


class PreparedBranch(NamedTuple):
    """One layer's part of a `Prepared` adapter: y + B^T' (A x), times DoRA's `ratio`."""

    A: Float[Array, "*B nr in"]
    Bt: tuple[Float[Array, "*B r out"], ...]  # scaled; of each adapted segment
    segments: Segments  # what the linear was joined from
    ratio: Float[Array, " out"] | None = None


Branches = dict[str, Branch | PreparedBranch]
HEAD_ROWS = 2048  # of a block of the head
FEW = 16  # rows of a product that XLA on a CPU multiplies best in float32


class Linear(nnx.Module):
    """y = x W^T (+ bias) (+ an adapter's delta), in x's dtype.

    Args:
      weight: (out, in) dense or a QuantizedTensor, frozen; a leading L when layers are stacked.
      bias: (out,) or None.
    """

    def __init__(self, weight: Array | QuantizedTensor, bias: Array | None = None):
        self.weight = nnx.Variable(weight)
        self.bias = None if bias is None else nnx.Variable(bias)

    def __call__(
        self, x: Float[Array, "*rows in"], branch: Branch | PreparedBranch | None = None
    ) -> Array:
        weight = self.weight.get_value()
        if branch is None:
            y = matmul(x, weight)
        elif isinstance(branch, PreparedBranch):
            y = with_prepared(x, matmul(x, weight), branch)
        else:
            y = adapted(x, weight, branch)
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)


def matmul(
    x: Float[Array, "*rows in"], weight: Array | QuantizedTensor, *, frozen: bool = True
) -> Array:
    """x W^T; of a frozen W no gradient is known, and nothing dense is kept for the backward.

    A dot_general that contracts both last axes: XLA on a CPU computes `x @ w.T` in bfloat16 by
    way of float32 copies of both operands, and this natively.
    """
    if isinstance(weight, QuantizedTensor):
        return nf4_matmul(x, weight.codes, weight.absmax, **stored_as(weight))
    weight = weight.astype(x.dtype)
    own = jax.lax.stop_gradient(weight) if frozen else weight
    return jax.lax.dot_general(x, own, (((x.ndim - 1,), (1,)), ((), ())))


def head_matmul(
    x: Float[Array, "*rows D"], head: Array | QuantizedTensor, *, frozen: bool
) -> Float[Array, "*rows V"]:
    """x W^T for the head, float32.

    One row on a CPU goes by blocks of a bfloat16 vocabulary: outside of a loop XLA has no quick
    product for it, and in one it makes float32 of a block at a time, which the cache holds.
    """
    narrow = not isinstance(head, QuantizedTensor) and head.dtype != jnp.float32
    if not (narrow and frozen and one_row(x) and len(head) >= HEAD_ROWS):
        return matmul(x, head, frozen=frozen).astype(jnp.float32)
    blocks = len(head) // HEAD_ROWS
    wide, whole = x.astype(jnp.float32), blocks * HEAD_ROWS

    def block(_, start):
        return None, matmul(wide, jax.lax.dynamic_slice_in_dim(head, start, HEAD_ROWS))

    _, parts = jax.lax.scan(block, None, jnp.arange(blocks) * HEAD_ROWS)
    parts = jnp.moveaxis(parts, 0, -2).reshape(*x.shape[:-1], whole)
    return jnp.concatenate([parts, matmul(wide, head[whole:])], axis=-1)


def adapted(x: Float[Array, "*rows in"], weight: Array | QuantizedTensor, branch: Branch) -> Array:
    """The layer's output with its adapter; only the adapter's input is dropped from."""
    inputs = dropped(x, branch.dropout, branch.key)
    if branch.magnitude is not None:
        return stretched(x, inputs, weight, branch)
    if inputs is x:
        return with_delta(x, weight, branch)
    return matmul(x, weight) + lora_delta(inputs, branch.A, branch.Bt, branch.scale)


def with_delta(
    x: Float[Array, "*rows in"], weight: Array | QuantizedTensor, branch: Branch
) -> Array:
    """x (W + s B A)^T, for a 4-bit W in one product."""
    pair = branch.A, branch.Bt, branch.scale
    if isinstance(weight, QuantizedTensor):
        return lora_matmul(x, weight.codes, weight.absmax, *pair, **stored_as(weight))
    return matmul(x, weight) + lora_delta(x, *pair)


def stretched(
    x: Float[Array, "*rows in"],
    inputs: Float[Array, "*rows in"],
    weight: Array | QuantizedTensor,
    branch: Branch,
) -> Array:
    """DoRA: W x + (m/n - 1) W x' + m/n s B A x', where x' is x after dropout.

    As W (x - x') + m/n (W + s B A) x': without dropout the first term is none.
    """
    A, Bt = (jax.lax.stop_gradient(matrix) for matrix in (branch.A, branch.Bt))
    AW = matmul(A.astype(x.dtype), weight)
    norms = row_norms(row_squares(weight), AW, A, Bt, branch.scale)
    ratio = stretch(branch.magnitude, norms, branch.scale)
    y = (with_delta(inputs, weight, branch).astype(jnp.float32) * ratio).astype(x.dtype)
    # The sum over rows for m has a fusion of its own: the same bits however layers are run.
    y = jax.lax.optimization_barrier(y)
    return y if inputs is x else matmul(x - inputs, weight) + y


def with_prepared(
    x: Float[Array, "B S in"], y: Float[Array, "B S out"], branch: PreparedBranch
) -> Float[Array, "B S out"]:
    """y + B^T' (A x), with one A and B^T for all rows or one for each.

    Few rows on a CPU are multiplied in float32 and rounded once: a thin product of one row in
    bfloat16 is many times slower there (docs/log.md).
    """
    dtype = jnp.float32 if on_cpu_few(x) else x.dtype
    A, Bt = branch.A.astype(dtype), iter(branch.Bt)
    rank, each = branch.Bt[0].shape[-2], A.ndim == 3
    h = jnp.einsum("bsi,bri->bsr" if each else "bsi,ri->bsr", x.astype(dtype), A)
    form = "bsr,bro->bso" if each else "bsr,ro->bso"
    pieces, at, start = [], 0, 0
    for out, adapted in branch.segments:
        stop = start + out
        piece = y[..., start:stop]
        if adapted:
            own = h[..., at : at + rank]
            piece = piece.astype(jnp.float32) + jnp.einsum(form, own, next(Bt).astype(dtype))
            at += rank
        if branch.ratio is not None:
            piece = piece * branch.ratio[start:stop]
        pieces.append(piece.astype(y.dtype))
        start = stop
    # Joined linears are taken apart behind this: XLA then joins nothing.
    return pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces, axis=-1)


def one_row(x: Float[Array, "*rows in"]) -> bool:
    """Whether this is one row, on a CPU."""
    return gpu.here() is None and math.prod(x.shape[:-1]) == 1


def on_cpu_few(x: Float[Array, "*rows in"]) -> bool:
    """Whether these are few rows, on a CPU."""
    return gpu.here() is None and math.prod(x.shape[:-1]) <= FEW


def stored_as(weight: QuantizedTensor) -> dict:
    """What the kernels must know of how a weight is stored."""
    return {
        "shape": weight.shape,
        "kind": weight.kind,
        "block_size": weight.block_size,
        "layout": weight.layout,
    }
