"""A layout only moves codes: where each goes, and that it comes back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from pallas_kernels.nf4_matmul.layout import LAYOUTS, prepack, unpack

ROWS = arrays.arrays(
    np.uint8,
    st.tuples(st.integers(0, 3), st.integers(1, 4), st.integers(0, 9).map(lambda n: 2 * n)),
)


@pytest.fixture(autouse=True, scope="module")
def strict():
    with jax.numpy_dtype_promotion("strict"):
        yield


def nibbles(codes):
    return np.stack([codes >> 4, codes & 15], axis=-1).reshape(
        *codes.shape[:-1], 2 * codes.shape[-1]
    )


def test_the_drawing_in_the_docstring():
    bnb = np.array([[0x01, 0x23, 0x45, 0x67]], np.uint8)
    halves = np.array([[0x04, 0x15, 0x26, 0x37]], np.uint8)
    np.testing.assert_array_equal(prepack(bnb, "halves"), halves)
    np.testing.assert_array_equal(unpack(halves, "halves"), bnb)


@given(codes=ROWS)
def test_halves_hold_the_first_half_of_a_row_in_the_high_nibbles(codes):
    packed, order = prepack(codes, "halves"), nibbles(codes)
    half = order.shape[-1] // 2
    np.testing.assert_array_equal(packed >> 4, order[..., :half])
    np.testing.assert_array_equal(packed & 15, order[..., half:])


@given(codes=ROWS, layout=st.sampled_from(LAYOUTS))
def test_unpack_undoes_prepack(codes, layout):
    there = prepack(codes, layout)
    assert isinstance(there, np.ndarray)
    assert there.shape == codes.shape
    np.testing.assert_array_equal(unpack(there, layout), codes)
    np.testing.assert_array_equal(prepack(unpack(codes, layout), layout), codes)


def test_on_the_device_as_on_the_host():
    codes = np.random.default_rng(0).integers(0, 256, (3, 5, 64)).astype(np.uint8)
    for function in (prepack, unpack):
        ours = jax.jit(lambda c, function=function: function(c, "halves"))(jnp.asarray(codes))
        assert isinstance(ours, jax.Array)
        np.testing.assert_array_equal(ours, function(codes, "halves"))


def test_wrong_calls_say_what_was_expected():
    for function in (prepack, unpack):
        with pytest.raises(ValueError, match="layout is 'thirds'; the layouts are bnb, halves"):
            function(np.zeros((2, 4), np.uint8), "thirds")
        with pytest.raises(ValueError, match="even number of bytes a row"):
            function(np.zeros((2, 3), np.uint8), "halves")
