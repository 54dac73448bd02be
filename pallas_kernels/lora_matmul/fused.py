"""lora_matmul in the GPU kernels of nf4_matmul: the thin term enters their accumulators."""

import jax
from jaxtyping import Array, Float

from pallas_kernels import gpu
from pallas_kernels.lora_matmul.delta import adapter_gradients, nt
from pallas_kernels.nf4_matmul.api import GPU_BACKWARD, GPU_FORWARD
from pallas_kernels.nf4_matmul.vjp import by_rows
from pallas_kernels.nf4_matmul.weight import LowRank, Weight


def run(
    x: Float[Array, "*rows in"],
    w: Weight,
    A: Float[Array, "r in"],
    Bt: Float[Array, "r out"],
    scale: Float[Array, ""],
) -> Float[Array, "*rows out"]:
    """One kernel for both terms; Unsupported where there is no GPU."""
    gpu.require()
    return product(x, w, A, Bt, scale)


@jax.custom_vjp
def product(x, w: Weight, A, Bt, scale):
    """x W^T + (x A^T) (s B^T), the thin first product by XLA."""
    rows = x.reshape(-1, x.shape[-1])
    low = LowRank(nt(rows, A.astype(x.dtype)), (Bt * scale).astype(x.dtype))
    return by_rows(GPU_FORWARD, None)(rows, w, low).reshape(*x.shape[:-1], w.shape[0])


def keep(x, w, A, Bt, scale):
    """The result, and what the backward pass needs: nothing that the caller does not hold."""
    return product(x, w, A, Bt, scale), (x, w, A, Bt, scale)


def pull_back(residuals, dy):
    """dx = dy W + dh A in one kernel, and the gradients of A and B^T; W and s have none."""
    x, w, A, Bt, scale = residuals
    rows, dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    dh, dA, dBt = adapter_gradients(rows, A, Bt, scale, dy)
    dx = by_rows(GPU_BACKWARD, None)(dy, w, LowRank(dh, A.astype(x.dtype)))
    return dx.reshape(x.shape), None, dA, dBt, None


product.defvjp(keep, pull_back)
