"""lora_matmul as two products and a sum: on every device, and the oracle of the fused form."""

from jaxtyping import Array, Float

from pallas_kernels.lora_matmul.delta import lora_delta
from pallas_kernels.nf4_matmul.api import multiply
from pallas_kernels.nf4_matmul.weight import Weight


def run(
    x: Float[Array, "*rows in"],
    w: Weight,
    A: Float[Array, "r in"],
    Bt: Float[Array, "r out"],
    scale: Float[Array, ""],
) -> Float[Array, "*rows out"]:
    """The product and the term, each rounded to x's dtype, and their sum."""
    y = multiply(x.reshape(-1, x.shape[-1]), w).reshape(*x.shape[:-1], w.shape[0])
    return y + lora_delta(x, A, Bt, scale)
