"""What a backend is given for W: the stored arrays and what they mean."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from pallas_kernels.codebooks import Kind
from pallas_kernels.dequantize.api import check_shapes
from pallas_kernels.nf4_matmul.layout import check as check_layout
from pallas_kernels.quantize.api import DoubleQuantized
from pallas_kernels.quantize.api import check as check_codebook


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Weight:
    """One frozen 4-bit matrix (out, in).

    Attributes:
      codes: uint8, two codes a byte, in the order that `layout` names.
      scales: per block, float32 or double-quantized.
      shape: (out, in).
      kind: the codebook: nf4, fp4, int4, or 16 values.
      block_size: weights that share a scale, along the rows flattened one after the other.
      layout: `bnb`, or what layout.prepack made of it.
    """

    codes: UInt8[Array, "..."]
    scales: Array | DoubleQuantized
    shape: tuple[int, int] = dataclasses.field(metadata={"static": True})
    kind: Kind = dataclasses.field(metadata={"static": True})
    block_size: int = dataclasses.field(metadata={"static": True})
    layout: str = dataclasses.field(metadata={"static": True})


def stored(
    codes: UInt8[Array, "..."],
    scales: Array | DoubleQuantized,
    shape: tuple[int, int],
    kind: Kind,
    block_size: int,
    layout: str,
) -> Weight:
    """The Weight, if these arrays can be one matrix of this shape; ValueError otherwise."""
    check_codebook(kind, block_size)
    check_layout(codes, layout)
    if codes.dtype != jnp.uint8:
        raise ValueError(f"codes are {codes.dtype}; two 4-bit codes share a uint8")
    if lead := check_shapes(codes, scales, shape, block_size):
        raise ValueError(f"codes are {codes.shape}, {lead} matrices {shape}: multiply by one")
    return Weight(codes, scales, tuple(shape), kind, block_size, layout)


class LowRank(NamedTuple):
    """A term h b that a backend adds to its product, before the one rounding of the sum.

    Attributes:
      h: (M, r), in x's dtype.
      b: (r, n) for a result (M, n), in x's dtype.
    """

    h: Float[Array, "M r"]
    b: Float[Array, "r n"]
