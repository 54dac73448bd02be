"""Codes and scales are bitsandbytes' bit for bit, and no finite input makes them otherwise.

A tie is a quotient w / absmax that equals a boundary; it takes the smaller value, as there, so the
golden codes are compared without an exception: 0 of their 1,327,104 bytes differ.
"""

from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ml_dtypes import bfloat16

from pallas_kernels.codebooks import CODEBOOKS, DYNAMIC_SIGNED, codebook, midpoints, sorted_codes
from pallas_kernels.dequantize.api import dequantize_4bit, expand_scales
from pallas_kernels.quantize.api import BLOCK_SIZES, double_quantize, quantize_4bit
from pallas_kernels.quantize.reference import mean
from tests.golden_data import GoldenFile, golden_folder
from tests.tiers import tiered
from tests.tolerances import DYNAMIC_GRID_ATOL, HALF_GAP_RTOL, OFFSET_ATOL

pytestmark = pytest.mark.fully_compiled

FILES = sorted(path.stem for path in golden_folder("nf4").glob("*.npz") if path.stem != "tables")
SHAPES = [(1, 1), (3, 7), (5, 64), (33, 96), (2, 4096), (577, 33)]


@pytest.fixture(autouse=True, scope="module")
def strict():
    with jax.numpy_dtype_promotion("strict"):
        yield


def weights(seed: int, shape, dtype="float32") -> np.ndarray:
    w = np.random.default_rng(seed).standard_normal(shape) * 0.05
    return w.astype(np.float32).astype(jnp.dtype(dtype))


@pytest.mark.parametrize("name", FILES)
def test_golden(name):
    def ours(key):
        return not key.endswith(".dequant")

    with GoldenFile(golden_folder("nf4") / f"{name}.npz", inputs={"x"}, part=ours) as golden:
        x = golden.input("x")
        for case in dict.fromkeys(key.rpartition(".")[0] for key in golden.outputs()):
            dtype, kind, block_size, scales = case.split(".")
            w = jnp.asarray(x).astype(dtype)
            codes, absmax = quantize_4bit(w, kind=kind, block_size=int(block_size))
            if x.shape[1] % int(block_size):  # flat, like the golden codes, though not by rows
                assert codes.ndim == 1
            golden.compare_exact(f"{case}.codes", codes.reshape(-1))
            if scales == "single":
                golden.compare_exact(f"{case}.absmax", absmax.reshape(-1))
            else:
                double = double_quantize(absmax)
                golden.compare_exact(f"{case}.absmax", double.codes.reshape(-1))
                golden.compare_exact(f"{case}.nested_absmax", double.absmax)
                golden.compare_exact(f"{case}.nested_offset", double.offset)


def test_one_program_gives_the_same_bits():
    """XLA may fuse products into sums and divide by reciprocals; here it must not."""

    def whole(w):
        codes, absmax = quantize_4bit(w)
        double = double_quantize(absmax)
        return codes, double, dequantize_4bit(codes, double, shape=w.shape)

    w = jnp.asarray(weights(0, (96, 320)))
    apart, fused = whole(w), jax.jit(whole)(w)
    jax.tree.map(np.testing.assert_array_equal, apart, fused)
    with jax.disable_jit():
        jax.tree.map(np.testing.assert_array_equal, apart, whole(w))


def test_two_codes_a_byte_the_first_in_the_high_nibble():
    w = np.tile(codebook("nf4"), 4)[None]
    codes, absmax = quantize_4bit(w)
    expected = [0x01, 0x23, 0x45, 0x67, 0x89, 0xAB, 0xCD, 0xEF]
    np.testing.assert_array_equal(codes, [expected * 4])
    np.testing.assert_array_equal(absmax, [[1]])


def test_an_int4_tie_takes_the_even_number():
    """round(w / (absmax / 7)) in both kinds of block: 0.5 is 0, 1.5 is 2, -2.5 is -2."""
    w = np.zeros((1, 40), np.float32)
    w[0, :32] = np.tile(np.arange(-7.5, 8.5), 2).clip(-7, 7)
    w[0, 32:] = [7, 0.5, 1.5, -0.5, -1.5, -2.5, 6.5, -7]
    codes, absmax = quantize_4bit(w, kind="int4", block_size=32)
    dense = dequantize_4bit(codes, absmax, shape=w.shape, kind="int4", block_size=32)
    np.testing.assert_array_equal(absmax, [7, 7])
    np.testing.assert_array_equal(dense, np.round(w))


def test_int4_divides_by_its_unit():
    """Beside the ties a product with the unit's reciprocal would give other codes."""
    rng = np.random.default_rng(0)
    absmax = np.exp(rng.uniform(-3, 3, (500, 1))).astype(np.float32)
    unit = absmax / np.float32(7)
    ties = (rng.integers(-7, 7, (500, 63)) + np.float32(0.5)) * unit
    w = np.concatenate([absmax, np.nextafter(ties, np.float32(9))], axis=1).astype(np.float32)

    def code_of(quotient):
        level = np.clip(np.round(quotient), -7, 7)
        return np.where(level < 0, 8 - level, 7 - level)

    expected = code_of(w / unit)
    assert (expected != code_of(w * (1 / unit))).any()
    codes, _ = quantize_4bit(w, kind="int4")
    np.testing.assert_array_equal(np.stack([codes >> 4, codes & 15], -1).reshape(w.shape), expected)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_a_tie_takes_the_smaller_value(kind):
    w = np.ones((1, 32), np.float32)
    w[0, :15] = midpoints(kind)
    above = np.nextafter(midpoints(kind), np.float32(2))
    w[0, 15:30] = np.maximum(above, np.where(midpoints(kind) < 0, -1, 1e-30))  # 0: no denormal
    codes, _ = quantize_4bit(w, kind=kind, block_size=32)
    codes = np.stack([codes >> 4, codes & 15], -1).reshape(-1)
    np.testing.assert_array_equal(codes[:15], sorted_codes(kind)[:-1])
    np.testing.assert_array_equal(codes[15:30], sorted_codes(kind)[1:])


def test_the_short_block_is_divided_and_whole_blocks_are_multiplied():
    """The two round differently where a quotient is next to a boundary, as these all are."""
    rng = np.random.default_rng(0)
    absmax = (1 + rng.random((500, 1))).astype(np.float32)
    near = np.nextafter(absmax * midpoints("nf4"), np.float32(2)).astype(np.float32)
    w = np.concatenate([absmax, near], axis=1)  # 500 x 16

    def order_of(scaled):
        return np.searchsorted(midpoints("nf4"), scaled)

    divided, multiplied = order_of(w / absmax), order_of(w * (1 / absmax))
    assert (divided != multiplied).any()
    quantize = jax.jit(lambda w: quantize_4bit(w, block_size=32))
    for row, expected in zip(w, divided, strict=True):
        codes, _ = quantize(row[None])
        np.testing.assert_array_equal(np.stack([codes >> 4, codes & 15], -1).reshape(-1), expected)
    codes, _ = quantize(np.tile(w, 2))
    codes = np.stack([codes >> 4, codes & 15], -1).reshape(500, 32)
    np.testing.assert_array_equal(codes, np.tile(multiplied, 2))


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape, block_size):
    out, width = shape
    codes, absmax = jax.eval_shape(
        lambda w: quantize_4bit(w, block_size=block_size), weights(0, shape)
    )
    if width % block_size == 0:
        assert (codes.shape, absmax.shape) == ((out, width // 2), (out, width // block_size))
    else:
        n = out * width
        assert (codes.shape, absmax.shape) == (((n + 1) // 2,), (-(-n // block_size),))
    assert (codes.dtype, absmax.dtype) == (jnp.uint8, jnp.float32)


@given(
    seed=st.integers(0, 2**32 - 1),
    kind=st.sampled_from(sorted(CODEBOOKS)),
    block_size=st.sampled_from([32, 64, 4096]),
    shape=st.sampled_from(SHAPES),
)
def test_no_weight_is_further_than_half_a_gap(seed, kind, block_size, shape):
    w = weights(seed, shape)
    codes, absmax = quantize_4bit(w, kind=kind, block_size=block_size)
    dense = dequantize_4bit(codes, absmax, shape=shape, kind=kind, block_size=block_size)
    gap = np.diff(np.sort(codebook(kind))).max()
    scale = np.repeat(np.asarray(absmax).reshape(-1), block_size)[: w.size].reshape(shape)
    assert (np.abs(w - dense) <= gap / 2 * scale * (1 + HALF_GAP_RTOL)).all()


@given(
    seed=st.integers(0, 2**32 - 1),
    kind=st.sampled_from(sorted(CODEBOOKS)),
    shape=st.sampled_from([(3, 7), (5, 64), (33, 96)]),
)
def test_values_of_the_codebook_come_back_as_they_are(seed, kind, shape):
    rng = np.random.default_rng(seed)
    table, n = codebook(kind), shape[0] * shape[1]
    values = table[rng.integers(0, 16, n)]
    values[::32] = rng.choice([-1, 1], len(values[::32]))  # the largest magnitude of each block
    scales = np.exp(rng.standard_normal(-(-n // 32))).astype(np.float32)
    w = (values * np.repeat(scales, 32)[:n]).reshape(shape)
    codes, absmax = quantize_4bit(w, kind=kind, block_size=32)
    np.testing.assert_array_equal(absmax.reshape(-1), scales)
    dense = dequantize_4bit(codes, absmax, shape=shape, kind=kind, block_size=32)
    np.testing.assert_array_equal(dense, w)


@pytest.mark.parametrize(
    ("shape", "kind", "dtype"),
    tiered(
        product(
            [(3, 7), (4, 64), (0, 64), (4, 0), (1, 1), (3, 100)],
            CODEBOOKS,
            [np.float32, bfloat16, np.float16],
        ),
        [
            ((3, 7), "fp4", np.float32),
            ((4, 64), "nf4", bfloat16),
            ((0, 64), "int4", np.float32),
            ((4, 0), "nf4", np.float16),
            ((3, 100), "nf4", np.float16),
        ],
    ),
)
def test_edges_stay_finite(shape, kind, dtype):
    info = jnp.finfo(dtype)
    for value in (0, 1, -3, float(info.max), float(info.smallest_subnormal), float(info.tiny)):
        w = np.full(shape, value, dtype)
        codes, absmax = quantize_4bit(w, kind=kind)
        dense = dequantize_4bit(codes, absmax, shape=shape, kind=kind, dtype=dtype)
        double = double_quantize(absmax)
        twice = dequantize_4bit(codes, double, shape=shape, kind=kind, dtype=np.float32)
        assert np.isfinite(dense.astype(jnp.float32)).all()
        assert np.isfinite(twice).all()
        if value == 0 or abs(value) >= 1:
            np.testing.assert_array_equal(dense, w)
            np.testing.assert_array_equal(twice.astype(dtype), w)


@pytest.mark.parametrize("bad", [np.inf, -np.inf])
@pytest.mark.parametrize("shape", [(4, 64), (3, 50)])
def test_what_is_infinite_shows_in_the_scales(shape, bad):
    w = weights(0, shape)
    w[-1, -1] = bad
    _, absmax = quantize_4bit(w)
    assert np.flatnonzero(~np.isfinite(absmax)).tolist() == [absmax.size - 1]
    assert not np.isfinite(double_quantize(absmax).offset)


def test_constant_scales_cost_nothing():
    double = double_quantize(jnp.full((3, 5), 0.25))
    np.testing.assert_array_equal(double.codes, np.zeros((3, 5)))
    np.testing.assert_array_equal(expand_scales(double), np.full((3, 5), 0.25))


@given(seed=st.integers(0, 2**32 - 1), n=st.sampled_from([1, 255, 256, 257, 5000]))
def test_scales_lose_at_most_one_step_of_the_dynamic_map(seed, n):
    scales = np.abs(np.random.default_rng(seed).standard_normal(n)).astype(np.float32)
    double = double_quantize(scales)
    assert double.absmax.shape == (-(-n // 256),)
    spread = np.repeat(np.asarray(double.absmax), 256)[:n]
    gap = np.diff(DYNAMIC_SIGNED).max() / 2 + DYNAMIC_GRID_ATOL
    assert (np.abs(expand_scales(double) - scales) <= gap * spread + OFFSET_ATOL).all()


@pytest.mark.parametrize("n", [1, 7, 8, 31, 32, 33, 511, 512, 1000, 13824, 131072])
def test_the_mean_is_a_mean(n):
    """The order of its additions is held by the golden offsets; here no number may be lost."""
    x = np.arange(n, dtype=np.float32) % 97  # sums stay exact in float32
    assert jax.jit(mean)(jnp.asarray(x)) == np.float32(x.sum(dtype=np.float64)) / np.float32(n)


def test_wrong_calls_say_what_was_expected():
    w = weights(0, (4, 64))
    with pytest.raises(ValueError, match="kind is 'nf8'; the codebooks are nf4, fp4, int4"):
        quantize_4bit(w, kind="nf8")
    with pytest.raises(ValueError, match="block_size is 48; expected one of"):
        quantize_4bit(w, block_size=48)
