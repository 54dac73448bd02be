"""Dequantized values are bitsandbytes' bit for bit, with and without layers in front."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.backends import explain
from pallas_kernels.codebooks import DYNAMIC_SIGNED, codebook
from pallas_kernels.dequantize.api import BACKENDS, dequantize_4bit, expand_scales
from pallas_kernels.quantize.api import DoubleQuantized, double_quantize, quantize_4bit
from tests.golden_data import GoldenFile, golden_folder

pytestmark = pytest.mark.fully_compiled

FILES = sorted(path.stem for path in golden_folder("nf4").glob("*.npz") if path.stem != "tables")
NESTED = ("nested_absmax", "nested_offset")


@pytest.fixture(autouse=True, scope="module")
def strict():
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.mark.parametrize("name", FILES)
def test_golden(name):
    def stored(key):
        return not key.endswith(".dequant")

    path = golden_folder("nf4") / f"{name}.npz"
    with GoldenFile(path, inputs=stored, part=lambda key: key != "x") as golden:
        for key in golden.outputs():
            case = key.removesuffix(".dequant")
            dtype, kind, block_size, scales = case.split(".")
            shape, block_size = golden.arrays[key].shape, int(block_size)
            codes = jnp.asarray(golden.input(f"{case}.codes"))
            absmax = jnp.asarray(golden.input(f"{case}.absmax"))
            if shape[1] % block_size == 0:
                codes, absmax = codes.reshape(shape[0], -1), absmax.reshape(shape[0], -1)
            if scales == "dq":
                nested = [jnp.asarray(golden.input(f"{case}.{part}")) for part in NESTED]
                absmax = DoubleQuantized(absmax, *nested)
            dense = dequantize_4bit(
                codes, absmax, shape=shape, kind=kind, block_size=block_size, dtype=dtype
            )
            assert dense.dtype == dtype
            golden.compare_exact(key, dense.astype(jnp.float32))


def test_a_product_is_rounded_before_the_offset_is_added():
    """One fused multiply-add would round once; 4,096 random scales would show it."""
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 256, 4096).astype(np.uint8)
    nested, offset = rng.random(16).astype(np.float32), np.float32(0.7)
    expected = DYNAMIC_SIGNED[codes] * np.repeat(nested, 256) + offset
    scales = DoubleQuantized(jnp.asarray(codes), jnp.asarray(nested), jnp.asarray(offset))
    np.testing.assert_array_equal(expand_scales(scales), expected)
    fused = jax.jit(lambda scales: expand_scales(scales) * 1)(scales)
    np.testing.assert_array_equal(fused, expected)


@pytest.mark.parametrize("shape", [(6, 128), (5, 33)])
@pytest.mark.parametrize("double", [False, True])
def test_leading_axes_are_layers(shape, double):
    w = np.random.default_rng(0).standard_normal((2, 3, *shape)).astype(np.float32)
    rows = []
    for layer in w.reshape(-1, *shape):
        codes, absmax = quantize_4bit(layer)
        rows.append((codes, double_quantize(absmax) if double else absmax))
    layers = [dequantize_4bit(*row, shape=shape) for row in rows]
    stacked = jax.tree.map(lambda *x: jnp.stack(x).reshape(2, 3, *x[0].shape), *rows)
    whole = dequantize_4bit(*stacked, shape=shape)
    np.testing.assert_array_equal(whole, jnp.stack(layers).reshape(w.shape))


def test_codes_are_read_high_nibble_first():
    codes, absmax = jnp.full((1, 32), 0x2F, jnp.uint8), jnp.full((1, 1), 2.0)
    table = codebook("nf4")
    dense = dequantize_4bit(codes, absmax, shape=(1, 64))
    np.testing.assert_array_equal(dense, [[2 * table[2], 2 * table[15]] * 32])


def test_the_reference_is_the_backend_of_a_cpu():
    codes, absmax = jnp.zeros((1, 32), jnp.uint8), jnp.ones((1, 1))
    static = {"shape": (1, 64), "kind": "nf4", "block_size": 64, "dtype": "float32"}
    choice = "reference (not mosaic: the default device is a cpu, not a GPU)"
    assert str(explain(BACKENDS, codes, absmax, **static)) == choice
    named = dequantize_4bit(codes, absmax, **static, backend="reference")
    np.testing.assert_array_equal(named, dequantize_4bit(codes, absmax, **static))
    with pytest.raises(ValueError, match="backend is 'gpu'; the backends are mosaic, reference"):
        dequantize_4bit(codes, absmax, **static, backend="gpu")


@pytest.mark.parametrize(
    ("codes", "blocks"),
    [((4, 31), (4, 1)), ((4, 32), (4, 2)), ((128,), (4,)), ((4, 32), (2, 4, 1))],
)
def test_shapes_that_do_not_fit_are_refused(codes, blocks):
    with pytest.raises(ValueError, match=r"has codes \(4, 32\) and scales \(4, 1\)"):
        dequantize_4bit(jnp.zeros(codes, jnp.uint8), jnp.zeros(blocks), shape=(4, 64))
