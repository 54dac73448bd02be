"""nf4_matmul for many rows: dequantizing first costs little then, and the product is XLA's own.

On paper, N = K = 4096, as multiples of an ideal bfloat16 product, by the instructions in
benchmarks/results/compiled.json. The fused kernels lie between decoding that hides behind the
tensor cores in full (benchmarks/roofline.py) and not at all (the two added):

    M = 4096      dequantize, then multiply    fused
    A100          1.05                         1.08 to 1.56
    RTX 4090      1.05                         1.01 to 1.11
    H100          1.09                         1.08 to 1.56
    H200          1.06                         1.08 to 1.56
    B200          1.09                         1.03 to 1.63

So from 4096 rows the safe choice is at most 0.06 worse than the best that fusing can be. Below it
dequantizing weighs twice as much with every halving of M. On Ada, where paper says that both are as
good, fusing is taken: it needs no dense W, and no product in float32 before the low-rank term. In a
70B model's step at 4096 tokens that saves about 1.1 GB (compiled, docs/log.md).
"""

from jaxtyping import Array, Float

from pallas_kernels import gpu
from pallas_kernels.backends import Unsupported
from pallas_kernels.nf4_matmul import dense
from pallas_kernels.nf4_matmul.weight import LowRank, Weight

NEVER = 1 << 62
# Rows from which this backend takes a product, by capability; from the table above until measured.
FEWEST_ROWS = {(8, 0): 4096, (8, 9): NEVER, (9, 0): 4096, (10, 0): 4096}
ELSEWHERE = 4096


def product(
    x: Float[Array, "M contracted"], w: Weight, low: LowRank | None, *, transposed: bool
) -> Float[Array, "M n"]:
    """What dense.py computes, from the number of rows on from which dequantizing first wins."""
    fewest = FEWEST_ROWS.get(gpu.require().gpu.capability, ELSEWHERE)
    if x.shape[0] < fewest:
        raise Unsupported(f"M is {x.shape[0]}: dequantizing first wins from {fewest} rows")
    return dense.product(x, w, low, transposed=transposed)
