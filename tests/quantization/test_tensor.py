"""A QuantizedTensor is its codes and scales, stacks, and passes through JAX's transformations."""

from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ml_dtypes import bfloat16

from pallas_kernels.codebooks import CODEBOOKS
from pallas_kernels.dequantize.api import dequantize_4bit
from pallas_kernels.quantize.api import DoubleQuantized, double_quantize, quantize_4bit
from qlora_jax.quantization.tensor import QuantizedTensor, quantize, stack
from tests.tiers import tiered
from tests.tolerances import SCAN_RTOL

pytestmark = pytest.mark.fully_compiled

BY_ROWS, FLAT = (6, 128), (5, 33)


@pytest.fixture(autouse=True, scope="module")
def strict():
    with jax.numpy_dtype_promotion("strict"):
        yield


def weights(shape, dtype="float32", seed=0) -> np.ndarray:
    w = np.random.default_rng(seed).standard_normal(shape) * 0.05
    return w.astype(np.float32).astype(jnp.dtype(dtype))


def assert_equal(a: QuantizedTensor, b: QuantizedTensor):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize(
    ("shape", "dtype", "double"),
    tiered(
        product([BY_ROWS, FLAT], ["float32", "bfloat16", "float16"], [False, True]),
        [(BY_ROWS, "bfloat16", True), (FLAT, "float32", False)],
    ),
)
def test_quantize_is_the_kernels_and_keeps_what_they_need(shape, dtype, double):
    w = weights(shape, dtype)
    tensor = quantize(w, kind="fp4", block_size=32, double_quant=double)
    codes, absmax = quantize_4bit(w, kind="fp4", block_size=32)
    scales = double_quantize(absmax) if double else absmax
    assert_equal(tensor, QuantizedTensor(codes, scales, shape, dtype, 32, "fp4", "bnb"))
    static = {"shape": shape, "kind": "fp4", "block_size": 32}
    for asked, given_ in ((None, dtype), ("float32", "float32"), (bfloat16, "bfloat16")):
        dense = tensor.dequantize(asked)
        assert dense.dtype == given_
        expected = dequantize_4bit(codes, scales, **static, dtype=given_)
        np.testing.assert_array_equal(dense, expected)


def test_from_the_device_as_from_the_host():
    w = weights(BY_ROWS)
    assert_equal(quantize(w), quantize(jnp.asarray(w)))
    assert_equal(quantize(w), jax.jit(quantize)(w))
    on_host = jax.tree.map(np.asarray, quantize(w))
    np.testing.assert_array_equal(on_host.dequantize(), quantize(w).dequantize())


@pytest.mark.parametrize(
    ("shape", "double", "host"),
    tiered(
        product([BY_ROWS, FLAT], [False, True], [False, True]),
        [(BY_ROWS, True, False), (FLAT, False, True)],
    ),
)
def test_a_stack_is_its_layers(shape, double, host):
    layers = [quantize(weights(shape, seed=i), double_quant=double) for i in range(3)]
    if host:
        layers = [jax.tree.map(np.asarray, layer) for layer in layers]
    stacked = stack(layers)
    kind = np.ndarray if host else jax.Array
    assert all(isinstance(leaf, kind) for leaf in jax.tree.leaves(stacked))
    assert (stacked.lead, stacked.shape, layers[0].lead) == ((3,), shape, ())
    assert stacked.nbytes == 3 * layers[0].nbytes
    assert stacked.bits_per_parameter == layers[0].bits_per_parameter
    for i, layer in enumerate(layers):
        assert_equal(stacked[i], layer)
    assert_equal(stacked[1:], stack(layers[1:]))
    np.testing.assert_array_equal(
        stacked.dequantize(), np.stack([layer.dequantize() for layer in layers])
    )


def test_layers_that_differ_are_not_stacked():
    with pytest.raises(ValueError, match="nf4"):
        stack([quantize(weights(BY_ROWS)), quantize(weights(BY_ROWS), kind="fp4")])


def test_one_matrix_has_no_layers_to_index():
    with pytest.raises(IndexError, match="one matrix"):
        quantize(weights(BY_ROWS))[0]


@given(
    seed=st.integers(0, 2**32 - 1),
    kind=st.sampled_from(sorted(CODEBOOKS)),
    shape=st.sampled_from([BY_ROWS, FLAT, (1, 64)]),
    double=st.booleans(),
)
def test_flattening_and_layouts_lose_nothing(seed, kind, shape, double):
    tensor = quantize(weights(shape, seed=seed), kind=kind, double_quant=double)
    leaves, structure = jax.tree.flatten(tensor)
    assert_equal(jax.tree.unflatten(structure, leaves), tensor)
    halves = tensor.prepack("halves")
    assert halves.layout == ("halves" if tensor.by_rows else "bnb")
    assert_equal(halves.unpack(), tensor)
    assert_equal(halves.prepack("halves"), halves)
    assert_equal(halves.prepack("bnb"), tensor)
    np.testing.assert_array_equal(halves.dequantize(), tensor.dequantize())


@pytest.mark.parametrize(
    ("shape", "double", "layout"),
    tiered(
        product([BY_ROWS, FLAT], [False, True], ["bnb", "halves"]),
        [(BY_ROWS, True, "halves"), (FLAT, False, "bnb")],
    ),
)
def test_passes_through_jit_scan_checkpoint_and_grad(shape, double, layout):
    layers = [quantize(weights(shape, seed=i), double_quant=double) for i in range(3)]
    stacked = stack(layers).prepack(layout)
    x = jnp.asarray(weights((2, shape[1])))

    def layer(x, tensor):
        assert tensor.shape == shape
        assert tensor.lead == ()
        return x + x @ tensor.dequantize().T @ tensor.dequantize()

    @jax.jit
    def scanned(x, stacked):
        return jax.lax.scan(lambda x, t: (jax.checkpoint(layer)(x, t), None), x, stacked)[0]

    expected = x
    for tensor in layers:
        expected = jax.jit(layer)(expected, tensor)
    np.testing.assert_allclose(scanned(x, stacked), expected, rtol=SCAN_RTOL)
    gradient = jax.grad(lambda x: scanned(x, stacked).sum())(x)
    assert np.isfinite(gradient).all()
    assert_equal(jax.jit(lambda t: t)(stacked), stacked)
    dense = jax.vmap(lambda t: t.dequantize())(stacked)
    np.testing.assert_array_equal(dense, stacked.dequantize())


def test_size_in_bits():
    w = weights((64, 256))
    assert quantize(w, double_quant=False).bits_per_parameter == 4 + 32 / 64
    double = quantize(w)
    assert isinstance(double.absmax, DoubleQuantized)
    assert double.nbytes == 64 * 128 + 256 + 4 + 4  # codes, scale codes, one nested scale, offset
    assert double.bits_per_parameter == 8 * double.nbytes / w.size
    shapes = jax.eval_shape(quantize, w)
    assert (shapes.nbytes, shapes.lead) == (double.nbytes, ())
