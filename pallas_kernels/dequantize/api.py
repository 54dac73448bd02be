"""The public calls: codes and scales back to a matrix, and double-quantized scales to float32."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, UInt8

from pallas_kernels import gpu
from pallas_kernels.backends import dispatch
from pallas_kernels.codebooks import Kind
from pallas_kernels.dequantize import reference
from pallas_kernels.quantize.api import check
from pallas_kernels.quantize.reference import DoubleQuantized

STATIC = "shape", "kind", "block_size", "dtype", "backend"


def by_mosaic(codes: UInt8[Array, "*bytes"], absmax: Float32[Array, "*blocks"], **static):
    """The GPU kernel's answer; the kernel is imported, in 0.3 s, only where there is a GPU."""
    gpu.require()
    from pallas_kernels.dequantize import mosaic

    return mosaic.dequantize_4bit(codes, absmax, **static)


BACKENDS = (("mosaic", by_mosaic), ("reference", reference.dequantize_4bit))


def jit_for_target(function: Callable) -> Callable:
    """jax.jit, that traces again for another GPU: backends are chosen by it while tracing."""

    @functools.partial(jax.jit, static_argnames=(*STATIC, "target"))
    def traced(*arrays, target, **static):
        return function(*arrays, **static)

    @functools.wraps(function)
    def call(*arrays, **static):
        return traced(*arrays, target=gpu.here(), **static)

    return call


@jit_for_target
def dequantize_4bit(
    codes: UInt8[Array, "*packed"],
    scales: Float32[Array, "*blocks"] | DoubleQuantized,
    *,
    shape: tuple[int, int],
    kind: Kind = "nf4",
    block_size: int = 64,
    dtype: DTypeLike = jnp.float32,
    backend: str | None = None,
) -> Float[Array, "*lead out in"]:
    """The matrix that codes and scales stand for: codebook[code] * absmax, rounded to `dtype`.

    Args:
      codes: uint8 as quantize_4bit gives them, (*lead, out, in/2) or flat (*lead, ceil(n/2)).
      scales: float32 (*lead, out, in/block_size) or flat (*lead, blocks), or double-quantized.
      shape: (out, in) of one matrix.
      kind: nf4, fp4 or int4.
      block_size: a power of two from 32 to 4096.
      dtype: of the result; the product is float32 and rounded once, to nearest even. Under jit,
        XLA may keep the float32 product where the result is at once converted back to float32.
      backend: the only implementation to ask; default the first that takes the input.

    Raises:
      ValueError: an unknown kind, block size or backend, or shapes that do not fit together.
      Unsupported: the named backend does not take this input.

    The values are those of bitsandbytes.functional.dequantize_4bit (0.50, CPU), bit for bit.
    """
    check(kind, block_size)
    lead = check_shapes(codes, scales, shape, block_size)
    flat = codes.reshape(*lead, -1), expand_scales(scales).reshape(*lead, -1)
    static = {"shape": shape, "kind": kind, "block_size": block_size, "dtype": dtype}
    return dispatch(BACKENDS, *flat, backend=backend, **static)


@jax.jit
def expand_scales(
    scales: Float32[Array, "*blocks"] | DoubleQuantized,
) -> Float32[Array, "*blocks"]:
    """The float32 scale of each block: dynamic map[code] * nested absmax + offset.

    Float32 scales pass unchanged. The product is rounded before the sum, as bitsandbytes does;
    a fused multiply-add would change every fourth dequantized value.
    """
    return reference.expand(scales) if isinstance(scales, DoubleQuantized) else scales


def check_shapes(codes, scales, shape: tuple[int, int], block_size: int) -> tuple[int, ...]:
    """The leading (layer) axes; ValueError unless codes and scales fit one shape (out, in)."""
    out, width = shape
    if width % block_size == 0:
        expected = (out, width // 2), (out, width // block_size)
    else:
        n = out * width
        expected = (-(-n // 2),), (-(-n // block_size),)
    blocks = scales.codes if isinstance(scales, DoubleQuantized) else scales
    lead = codes.shape[: max(codes.ndim - len(expected[0]), 0)]
    if (codes.shape, blocks.shape) != (lead + expected[0], lead + expected[1]):
        raise ValueError(
            f"codes are {codes.shape} and scales {blocks.shape}; a matrix {shape} in blocks of "
            f"{block_size} has codes {expected[0]} and scales {expected[1]}"
        )
    return lead
