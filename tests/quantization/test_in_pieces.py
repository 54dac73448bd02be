"""A matrix quantized piece by piece has the bits of one that is quantized at once."""

from itertools import product

import jax
import ml_dtypes
import numpy as np
import pytest

from qlora_jax.quantization import in_pieces
from qlora_jax.quantization.in_pieces import quantize_in_pieces
from qlora_jax.quantization.tensor import quantize
from tests.tiers import tiered

pytestmark = pytest.mark.fully_compiled

# Against pieces of 8,192 weights: less than one, one, some, some and a rest, and a rest whose last
# block is short, of an odd number of weights.
CASES = [
    ((16, 64), "float32"),
    ((2, 4096), "bfloat16"),
    ((128, 128), "float16"),
    ((90, 128), "bfloat16"),
    ((67, 257), "float32"),
    ((5, 4099), "bfloat16"),
]


NF4, *OTHERS = [("nf4", 64, True), ("fp4", 4096, True), ("int4", 32, False)]


@pytest.mark.parametrize(
    ("case", "how"),
    tiered(product(CASES, [NF4, *OTHERS]), [*product(CASES, [NF4]), *product(CASES[4:5], OTHERS)]),
)
def test_has_the_bits_of_quantize(monkeypatch, case, how):
    monkeypatch.setattr(in_pieces, "PIECE", (2, 4096))
    (shape, dtype), (kind, block_size, double_quant) = case, how
    w = np.random.default_rng(0).normal(size=shape).astype(ml_dtypes.bfloat16).astype(dtype)
    how = {"kind": kind, "block_size": block_size, "double_quant": double_quant}
    expected, found = quantize(w, **how), quantize_in_pieces(w, **how)
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(found))
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_refuses_what_quantize_refuses():
    with pytest.raises(ValueError, match="block_size is 48"):
        quantize_in_pieces(np.zeros((4, 64), np.float32), block_size=48)
    with pytest.raises(ValueError, match="nf5"):
        quantize_in_pieces(np.zeros((4, 64), np.float32), kind="nf5")
