"""nf4_matmul for many rows: dequantizing first costs little then, and the product is XLA's own.

On paper, N = K = 4096, as multiples of an ideal bfloat16 product (benchmarks/roofline.py); the
fused kernels lie between decoding that hides behind the tensor cores in full and not at all:

    M = 4096      dequantize, then multiply    fused
    A100          1.05                         1.08 to 1.66
    RTX 4090      1.05                         1.01 to 1.15
    H100          1.09                         1.08 to 1.55

So from 4096 rows the safe choice is at most 0.04 worse than the best that fusing can be. Below it
dequantizing weighs twice as much with every halving of M.
"""

from jaxtyping import Array, Float

from pallas_kernels import gpu
from pallas_kernels.backends import Unsupported
from pallas_kernels.nf4_matmul import dense
from pallas_kernels.nf4_matmul.weight import LowRank, Weight

# Rows from which this backend takes a product, by capability; from the table above until measured.
FEWEST_ROWS = {(8, 0): 4096, (8, 9): 4096, (9, 0): 4096, (10, 0): 4096}
ELSEWHERE = 4096


def forward(
    x: Float[Array, "M in"], w: Weight, low: LowRank | None = None
) -> Float[Array, "M out"]:
    """x W^T (+ h b)."""
    check(x)
    return dense.forward(x, w, low)


def backward(
    dy: Float[Array, "M out"], w: Weight, low: LowRank | None = None
) -> Float[Array, "M in"]:
    """dy W (+ h b)."""
    check(dy)
    return dense.backward(dy, w, low)


def check(x) -> None:
    """Unsupported below the number of rows from which dequantizing first wins."""
    target = gpu.here()
    capability = target.gpu.capability if target else None
    fewest = FEWEST_ROWS.get(capability, ELSEWHERE)
    if x.shape[0] < fewest:
        raise Unsupported(f"M is {x.shape[0]}: dequantizing first wins from {fewest} rows")
