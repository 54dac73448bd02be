"""Every number format against the gguf package, on random bytes."""

import gguf
import ml_dtypes
import numpy as np
import pytest
from gguf.quants import dequantize
from hypothesis import given
from hypothesis import strategies as st

from qlora_jax.checkpoints.gguf_blocks import BLOCKS, UNREAD


@pytest.mark.parametrize("kind", BLOCKS, ids=lambda kind: BLOCKS[kind].name)
@given(seed=st.integers(0, 2**32 - 1), count=st.integers(1, 9))
def test_values_equal_the_gguf_package_bit_for_bit(kind, seed, count):
    block = BLOCKS[kind]
    packed = np.random.default_rng(seed).integers(0, 256, (count, block.nbytes), np.uint8)
    out = np.empty((count, block.values), block.dtype)
    with np.errstate(all="ignore"):  # random scales are sometimes Inf or NaN
        block.unpack(packed, out)
        golden = dequantize(packed, gguf.GGMLQuantizationType(kind))
        np.testing.assert_array_equal(out.astype(np.float32), golden.reshape(out.shape))


@pytest.mark.parametrize("kind", BLOCKS, ids=lambda kind: BLOCKS[kind].name)
def test_names_and_sizes_are_ggufs(kind):
    block, known = BLOCKS[kind], gguf.GGMLQuantizationType(kind)
    assert (block.values, block.nbytes) == gguf.GGML_QUANT_SIZES[known]
    assert block.name == known.name


def test_formats_that_are_not_read_have_their_names():
    assert not BLOCKS.keys() & UNREAD.keys()
    for kind, name in UNREAD.items():
        assert gguf.GGMLQuantizationType(kind).name == name


def test_a_q4_1_block_by_hand():
    scale_and_minimum = np.array([0.5, -2.0], "<f2").tobytes()
    codes = bytes(low | (15 - low) << 4 for low in range(16))
    out = np.empty((1, 32), np.float32)
    packed = np.frombuffer(scale_and_minimum + codes, np.uint8).reshape(1, 20)
    BLOCKS[3].unpack(packed, out)
    low, high = np.arange(16) * 0.5 - 2, np.arange(15, -1, -1) * 0.5 - 2
    np.testing.assert_array_equal(out[0], np.concatenate([low, high]))


def test_bfloat16_stays_bfloat16():
    values = np.array([[1.5], [-3.0]], ml_dtypes.bfloat16)
    out = np.empty((2, 1), ml_dtypes.bfloat16)
    BLOCKS[30].unpack(values.view(np.uint8).reshape(2, 2), out)
    assert out.tolist() == values.tolist()
