"""What a backend is given for W: the stored arrays and what they mean."""

import dataclasses
from typing import NamedTuple

import jax
from jaxtyping import Array, Float, UInt8

from pallas_kernels.quantize.api import DoubleQuantized


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Weight:
    """One frozen 4-bit matrix (out, in).

    Attributes:
      codes: uint8, two codes a byte, in the order that `layout` names.
      scales: per block, float32 or double-quantized.
      shape: (out, in).
      kind: the codebook: nf4, fp4 or int4.
      block_size: weights that share a scale, along the rows flattened one after the other.
      layout: `bnb`, or what layout.prepack made of it.
    """

    codes: UInt8[Array, "..."]
    scales: Array | DoubleQuantized
    shape: tuple[int, int] = dataclasses.field(metadata={"static": True})
    kind: str = dataclasses.field(metadata={"static": True})
    block_size: int = dataclasses.field(metadata={"static": True})
    layout: str = dataclasses.field(metadata={"static": True})


class LowRank(NamedTuple):
    """A term h b that a backend adds to its product, before the one rounding of the sum.

    Attributes:
      h: (M, r), in x's dtype.
      b: (r, n) for a result (M, n), in x's dtype.
    """

    h: Float[Array, "M r"]
    b: Float[Array, "r n"]
