"""A linear layer, dense or 4-bit, with or without an adapter; nothing above it knows which."""

from typing import NamedTuple

import jax
from flax import nnx
from jaxtyping import Array, Float

from pallas_kernels.lora_matmul import lora_delta, lora_matmul
from pallas_kernels.nf4_matmul import nf4_matmul
from qlora_jax.adapters.dropout import dropped
from qlora_jax.quantization.tensor import QuantizedTensor


class Branch(NamedTuple):
    """One layer's adapter of one linear: y += scale * (dropout(x) A^T) B^T."""

    A: Float[Array, "r in"]
    Bt: Float[Array, "r out"]  # B, transposed once for all layers
    scale: Float[Array, ""]
    dropout: float = 0.0
    key: Array | None = None  # for dropout; None in evaluation


Branches = dict[str, Branch]


class Linear(nnx.Module):
    """y = x W^T (+ bias) (+ an adapter's delta), in x's dtype.

    Args:
      weight: (out, in) dense or a QuantizedTensor, frozen; a leading L when layers are stacked.
      bias: (out,) or None.
    """

    def __init__(self, weight: Array | QuantizedTensor, bias: Array | None = None):
        self.weight = nnx.Variable(weight)
        self.bias = None if bias is None else nnx.Variable(bias)

    def __call__(self, x: Float[Array, "*rows in"], branch: Branch | None = None) -> Array:
        weight = self.weight.get_value()
        y = matmul(x, weight) if branch is None else adapted(x, weight, branch)
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)


def matmul(x: Float[Array, "*rows in"], weight: Array | QuantizedTensor) -> Array:
    """x W^T with a frozen W: no gradient reaches W, and nothing dense is kept for the backward.

    A dot_general that contracts both last axes: XLA on a CPU computes `x @ w.T` in bfloat16 by
    way of float32 copies of both operands, and this natively.
    """
    if isinstance(weight, QuantizedTensor):
        return nf4_matmul(x, weight.codes, weight.absmax, **stored_as(weight))
    frozen = jax.lax.stop_gradient(weight.astype(x.dtype))
    return jax.lax.dot_general(x, frozen, (((x.ndim - 1,), (1,)), ((), ())))


def adapted(x: Float[Array, "*rows in"], weight: Array | QuantizedTensor, branch: Branch) -> Array:
    """x W^T and the adapter's delta, in one product where x is the same for both."""
    inputs = dropped(x, branch.dropout, branch.key)
    if inputs is not x or not isinstance(weight, QuantizedTensor):
        return matmul(x, weight) + lora_delta(inputs, branch.A, branch.Bt, branch.scale)
    pair = branch.A, branch.Bt, branch.scale
    return lora_matmul(x, weight.codes, weight.absmax, *pair, **stored_as(weight))


def stored_as(weight: QuantizedTensor) -> dict:
    """What the kernels must know of how a weight is stored."""
    return {
        "shape": weight.shape,
        "kind": weight.kind,
        "block_size": weight.block_size,
        "layout": weight.layout,
    }
