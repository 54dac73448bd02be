"""The dequantizing kernel of GPUs: bit for bit the reference, interpreted and in registers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.backends import Unsupported
from pallas_kernels.choices import explain
from pallas_kernels.codebooks import codebook
from pallas_kernels.dequantize import mosaic
from pallas_kernels.dequantize.api import dequantize_4bit
from pallas_kernels.quantize.api import double_quantize, quantize_4bit
from tests.pallas_kernels import warpgroup
from tests.pallas_kernels.interpreted import interpreter


@pytest.fixture(autouse=True, scope="module")
def strict():
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize(
    ("kind", "shape", "block_size"),
    [("nf4", (48, 192), 64), ("fp4", (96, 128), 128), ("int4", (64, 256), 64)],
)
def test_the_kernel_is_the_reference_bit_for_bit(kind, shape, block_size, dtype):
    """Blocks of which 16, 32 and 128 are a block of threads' share, one or many of them."""
    w = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    codes, absmax = quantize_4bit(w, kind=kind, block_size=block_size)
    static = {"shape": shape, "kind": kind, "block_size": block_size, "dtype": dtype}
    expected = dequantize_4bit(codes, absmax, **static)
    with interpreter("h100", sms=1):
        dense = dequantize_4bit(codes, absmax, **static, backend="mosaic")
        assert str(explain("dequantize", codes, absmax, **static).forward) == "mosaic"
    assert dense.dtype == dtype
    np.testing.assert_array_equal(bits(dense), bits(expected))


def bits(array):
    """The array as integers: 0 is not -0."""
    return np.asarray(array).view(f"uint{8 * array.dtype.itemsize}")


def test_the_kernel_takes_layers_and_double_quantized_scales():
    w = np.random.default_rng(0).standard_normal((3, 32, 128)).astype(np.float32)
    layers = [quantize_4bit(layer) for layer in w]
    rows = [(codes, double_quantize(absmax)) for codes, absmax in layers]
    codes, scales = jax.tree.map(lambda *x: jnp.stack(x), *rows)
    expected = dequantize_4bit(codes, scales, shape=(32, 128))
    with interpreter("a100", sms=1):
        dense = dequantize_4bit(codes, scales, shape=(32, 128), backend="mosaic")
    np.testing.assert_array_equal(bits(dense), bits(expected))


@pytest.mark.parametrize(
    ("shape", "block_size", "reason"),
    [
        ((64, 64), 32, r"\(64, 64\) in blocks of 32: the kernel takes whole blocks of a multiple"),
        ((5, 33), 64, r"\(5, 33\) in blocks of 64: the kernel takes whole blocks"),
        ((24, 64), 64, "24 blocks of 64: the kernel takes a multiple of 16"),
    ],
)
def test_what_the_kernel_refuses_goes_to_the_reference(shape, block_size, reason):
    w = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    codes, absmax = quantize_4bit(w, block_size=block_size)
    static = {"shape": shape, "block_size": block_size}
    with interpreter("a100", sms=1):
        with pytest.raises(Unsupported, match=reason):
            dequantize_4bit(codes, absmax, **static, backend="mosaic")
        dense = dequantize_4bit(codes, absmax, **static)
    np.testing.assert_array_equal(dense, dequantize_4bit(codes, absmax, **static))


@pytest.mark.parametrize("layout", ["WEIGHTS", "FOURS"])
@pytest.mark.parametrize("kind", ["nf4", "fp4", "int4"])
def test_registers_are_fetched_from_the_right_lanes(kind, layout):
    """The inline PTX, executed in NumPy on registers that lie as Mosaic says: every byte of codes.

    ptx.py passes data between lanes only along the last axis, which is a warp's 32.
    """
    layout = getattr(mosaic, layout)
    codes = np.random.default_rng(0).permutation(np.arange(128 * 32) % 256).astype(np.uint8)
    codes = codes.reshape(128, 32)
    table = np.tile(codebook(kind), 8)
    with warpgroup.on(mosaic):
        in_lanes = warpgroup.spread(table, mosaic.TABLE)
        values = mosaic.look_up(warpgroup.spread(codes, mosaic.CODES), in_lanes, layout)
    twin = mosaic.look_up_jnp(jnp.asarray(codes), list(codebook(kind)))
    np.testing.assert_array_equal(values.gathered(), twin)
    weights = warpgroup.places(layout, (64, 64))
    rows = warpgroup.places(layout.reduce(1), (64,))
    per_row = len(weights) // len(rows)
    np.testing.assert_array_equal(weights[..., 0] // 64, rows[..., 0].repeat(per_row, axis=0))
