"""The public call: y = x W^T for a frozen 4-bit W, differentiable with respect to x."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from pallas_kernels import gpu
from pallas_kernels.codebooks import Kind
from pallas_kernels.nf4_matmul import cpu, reference
from pallas_kernels.nf4_matmul.on_gpu import OnGpu
from pallas_kernels.nf4_matmul.vjp import frozen_matmul
from pallas_kernels.nf4_matmul.weight import Weight, stored
from pallas_kernels.quantize.api import DoubleQuantized

# In the order in which they are asked.
GPU_NAMES = "small_m", "large_m", "hopper", "blackwell", "ampere", "dense"
GPU_BACKENDS = {name: OnGpu(name) for name in GPU_NAMES}
BACKENDS = {**GPU_BACKENDS, "cpu": cpu, "reference": reference}
FORWARD = tuple((name, module.forward) for name, module in BACKENDS.items())
BACKWARD = tuple((name, module.backward) for name, module in BACKENDS.items())
GPU_FORWARD, GPU_BACKWARD = FORWARD[: len(GPU_BACKENDS)], BACKWARD[: len(GPU_BACKENDS)]
DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)  # of x
LAYOUTS = {"cpu": "halves"}  # the code order that the kernels of a platform want


def nf4_matmul(
    x: Float[Array, "*rows in"],
    codes: UInt8[Array, "..."],
    scales: Array | DoubleQuantized,
    *,
    shape: tuple[int, int],
    kind: Kind = "nf4",
    block_size: int = 64,
    layout: str = "bnb",
    backend: str | None = None,
) -> Float[Array, "*rows out"]:
    """x W^T without W in memory for longer than one product; in x's dtype.

        y[m, o] = sum over i of x[m, i] * table[code[o, i]] * scale[(o * in + i) // block_size]

    W is frozen: the gradient is that of x alone, dy W, and dequantizes again.

    Args:
      x: float32, bfloat16 or float16, any leading axes.
      codes: uint8, two codes a byte in the order that `layout` names; of one matrix, no layers.
      scales: float32 per block, or DoubleQuantized.
      shape: (out, in) of W.
      kind: the codebook: nf4, fp4, int4, or the 16 values of a table of one's own.
      block_size: weights that share a scale.
      layout: `bnb`, as bitsandbytes stores it, or what `prepack` made of it.
      backend: the only one to ask; by default the first that takes the input.

    Raises:
      ValueError: arrays that cannot be x and this W, no such codebook, layout or backend.
      Unsupported: the named backend does not take this input, and why.
    """
    if x.shape[-1] != shape[1]:
        raise ValueError(f"nf4_matmul: x is {x.shape}, W is {shape}: the last axes must be equal")
    if x.dtype not in DTYPES:
        raise ValueError(f"nf4_matmul: x is {x.dtype}; it can be float32, bfloat16 or float16")
    weight = stored(codes, scales, shape, kind, block_size, layout)
    y = multiply(x.reshape(-1, shape[1]), weight, backend)
    return y.reshape(*x.shape[:-1], shape[0])


def multiply(
    x: Float[Array, "M in"], weight: Weight, backend: str | None = None
) -> Float[Array, "M out"]:
    """`nf4_matmul` for rows and a Weight."""
    return frozen_matmul(x, weight, FORWARD, BACKWARD, backend)


def preferred_layout() -> str:
    """The code order that is fastest on the default device: prepack into it once, when loading."""
    return "bnb" if gpu.here() else LAYOUTS.get(jax.default_backend(), "bnb")
