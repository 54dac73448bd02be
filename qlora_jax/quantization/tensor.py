"""QuantizedTensor: one 4-bit matrix as a pytree, in bitsandbytes' layout."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels.dequantize.api import dequantize_4bit
from pallas_kernels.nf4_matmul import layout as layouts
from pallas_kernels.quantize.api import double_quantize, quantize_4bit


def static(**options: Any) -> Any:
    """A field that belongs to the tree's structure, not to its leaves."""
    return dataclasses.field(metadata={"static": True}, **options)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """One matrix (out, in) in 4 bits, or a stack of such matrices: codebook[codes] * absmax.

    A pytree: it goes through jit, scan, checkpoint and device_put. Layers are leading axes of
    every leaf, and `shape` stays that of one matrix, so that a slice of scan is a tensor again.

    Attributes:
      codes: uint8 (*lead, out, in/2), two codes a byte, the first in the high nibble; flat
        (*lead, ceil(out in/2)) where `in` is no multiple of block_size.
      absmax: float32 (*lead, out, in/block_size), or flat (*lead, blocks), or DoubleQuantized.
      shape: (out, in) of ONE matrix.
      dtype: of the dense source: float32, bfloat16 or float16.
      block_size: weights that share a scale, over the matrix flattened row by row.
      kind: the codebook: nf4, fp4 or int4.
      layout: the order of the codes: bnb, or what `prepack` made of it.

    Codes and scales are bitsandbytes' (0.50), bit for bit, so its checkpoints enter unchanged.
    """

    # No array types: transformations put tracers, shapes and placeholders where arrays were.
    codes: Any
    absmax: Any
    shape: tuple[int, int] = static()
    dtype: str = static()
    block_size: int = static(default=64)
    kind: str = static(default="nf4")
    layout: str = static(default="bnb")

    @property
    def by_rows(self) -> bool:
        """Whether blocks fill the rows, so that `out` is an axis of the leaves."""
        return self.shape[1] % self.block_size == 0

    @property
    def lead(self) -> tuple[int, ...]:
        """The leading (layer) axes; () for one matrix."""
        return tuple(self.codes.shape[: -2 if self.by_rows else -1])

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales, of all layers."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    @property
    def bits_per_parameter(self) -> float:
        """Bits a weight, scales included; 4.127 for NF4 by 64 with double quantization."""
        return 8 * self.nbytes / max(math.prod(self.lead) * math.prod(self.shape), 1)

    def dequantize(self, dtype: DTypeLike | None = None) -> Float[Array, "*lead out in"]:
        """The dense matrix (*lead, out, in) in `dtype`, by default that of the source."""
        tensor = jax.tree.map(jnp.asarray, self.unpack())
        return dequantize_4bit(
            tensor.codes,
            tensor.absmax,
            shape=self.shape,
            kind=self.kind,
            block_size=self.block_size,
            dtype=jnp.dtype(dtype or self.dtype),
        )

    def prepack(self, layout: str) -> "QuantizedTensor":
        """The same matrix with its codes in the order that a kernel wants; `unpack` undoes it.

        A matrix that is not `by_rows` has no rows to reorder, and stays in bitsandbytes' order.
        """
        tensor = self.unpack()
        if not self.by_rows:
            layout = "bnb"
        codes = layouts.prepack(tensor.codes, layout)
        return dataclasses.replace(tensor, codes=codes, layout=layout)

    def unpack(self) -> "QuantizedTensor":
        """The same matrix with its codes in bitsandbytes' order."""
        codes = layouts.unpack(self.codes, self.layout)
        return dataclasses.replace(self, codes=codes, layout="bnb")

    def __getitem__(self, index: Any) -> "QuantizedTensor":
        """One layer, or a slice of layers."""
        if not self.lead:
            raise IndexError("this is one matrix, without layers")
        return jax.tree.map(lambda leaf: leaf[index], self)


def quantize(
    w: Float[Array | np.ndarray, "out in"],
    *,
    kind: str = "nf4",
    block_size: int = 64,
    double_quant: bool = True,
) -> QuantizedTensor:
    """One dense matrix in 4 bits; `w` must be finite.

        tensor = quantize(w)                    # NF4, blocks of 64, double quantization
        tensor.dequantize()                     # near w, in w's dtype

    Args:
      w: (out, in) in float32, bfloat16 or float16.
      kind: nf4, fp4 or int4.
      block_size: a power of two from 32 to 4096.
      double_quant: scales in 8 bits: 0.37 bits a weight less for blocks of 64.

    Raises:
      ValueError: an unknown kind, block size or dtype, or `w` is not a matrix.
    """
    codes, absmax = quantize_4bit(w, kind=kind, block_size=block_size)
    scales = double_quantize(absmax) if double_quant else absmax
    return QuantizedTensor(codes, scales, tuple(w.shape), w.dtype.name, block_size, kind)


def stack(tensors: Sequence[QuantizedTensor]) -> QuantizedTensor:
    """Layers as one tensor with a new leading axis; all of one shape, kind and layout.

    Leaves that are NumPy arrays stay in host memory.
    """

    def join(*leaves):
        return (np if isinstance(leaves[0], np.ndarray) else jnp).stack(leaves)

    return jax.tree.map(join, *tensors)
