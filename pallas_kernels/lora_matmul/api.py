"""The public call: y = x W^T + s (x A^T) B^T for a frozen 4-bit W, differentiable in x, A and B."""

from jaxtyping import Array, Float, UInt8

from pallas_kernels.backends import dispatch
from pallas_kernels.codebooks import Kind
from pallas_kernels.lora_matmul import fused, plain
from pallas_kernels.nf4_matmul.weight import stored
from pallas_kernels.quantize.api import DoubleQuantized

BACKENDS = (("fused", fused.run), ("plain", plain.run))


def lora_matmul(
    x: Float[Array, "*rows in"],
    codes: UInt8[Array, "..."],
    scales: Array | DoubleQuantized,
    A: Float[Array, "r in"],
    Bt: Float[Array, "r out"],
    scale: Float[Array, ""],
    *,
    shape: tuple[int, int],
    kind: Kind = "nf4",
    block_size: int = 64,
    layout: str = "bnb",
    backend: str | None = None,
) -> Float[Array, "*rows out"]:
    """x W^T + scale * (x A^T) B^T in x's dtype.

    W is frozen; A and B^T get gradients in their own dtype, float32 as a rule; scale has none.
    Fused, the second term is added to the first one's accumulators, forward and backward: neither
    y nor dx is read and written again, and the sum is rounded once.

    Args:
      x, codes, scales, shape, kind, block_size, layout: as of nf4_matmul.
      A: (r, in).
      Bt: (r, out), B transposed: once, not in every call.
      scale: alpha / r, or alpha / sqrt(r) for rsLoRA.
      backend: `fused`, `plain`, or by default the first that takes the input.

    Raises:
      ValueError: shapes that do not fit together.
      Unsupported: the named backend does not take this input, and why.

    Source: Hu and others 2021, arXiv 2106.09685, section 4.1.
    """
    out, width = shape
    if x.shape[-1] != width or A.shape[1] != width or Bt.shape != (A.shape[0], out):
        raise ValueError(
            f"lora_matmul: x is {x.shape}, W {shape}, A {A.shape}, B^T {Bt.shape}; "
            f"x must end in {width}, A be (r, {width}) and B^T (r, {out})"
        )
    weight = stored(codes, scales, shape, kind, block_size, layout)
    # x keeps its axes: kept for the backward pass in another shape it would be kept twice.
    return dispatch(BACKENDS, x, weight, A, Bt, scale, backend=backend)
