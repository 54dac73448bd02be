"""A linear layer, dense or 4-bit, with or without an adapter; nothing above it knows which."""

from typing import NamedTuple

import jax
from flax import nnx
from jaxtyping import Array, Float

from pallas_kernels.nf4_matmul import nf4_matmul
from qlora_jax.adapters.lora import dropped, lora_delta
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
        y = matmul(x, self.weight.get_value())
        if self.bias is not None:
            y = y + self.bias[...].astype(y.dtype)
        if branch is not None:
            inputs = dropped(x, branch.dropout, branch.key)
            y = y + lora_delta(inputs, branch.A, branch.Bt, branch.scale)
        return y


def matmul(x: Float[Array, "*rows in"], weight: Array | QuantizedTensor) -> Array:
    """x W^T with a frozen W: no gradient reaches W, and nothing dense is kept for the backward.

    A dot_general that contracts both last axes: XLA on a CPU computes `x @ w.T` in bfloat16 by
    way of float32 copies of both operands, and this natively.
    """
    if isinstance(weight, QuantizedTensor):
        return nf4_matmul(
            x,
            weight.codes,
            weight.absmax,
            shape=weight.shape,
            kind=weight.kind,
            block_size=weight.block_size,
            layout=weight.layout,
        )
    frozen = jax.lax.stop_gradient(weight.astype(x.dtype))
    return jax.lax.dot_general(x, frozen, (((x.ndim - 1,), (1,)), ((), ())))
