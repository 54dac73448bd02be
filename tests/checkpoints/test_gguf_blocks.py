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


# Byte offsets of a block's float16 scales and minima.
SCALES = {
    "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0], "Q2_K": [80, 82],
    "Q3_K": [108], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208], "IQ4_NL": [0], "IQ4_XS": [0],
}  # fmt: skip


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", [k for k in BLOCKS if BLOCKS[k].name in SCALES])
def test_a_scale_that_is_not_finite_shows_in_the_values(kind, value):
    block = BLOCKS[kind]
    for fill in (0, 0xFF, 0x5A):  # even where all codes and all scales of groups are 0
        for offset in SCALES[block.name]:
            packed = np.full((1, block.nbytes), fill, np.uint8)
            for other in SCALES[block.name]:
                packed[:, other : other + 2].view("<f2")[:] = 1.0
            packed[:, offset : offset + 2].view("<f2")[:] = value
            out = np.empty((1, block.values), np.float32)
            with np.errstate(invalid="ignore"):
                block.unpack(packed, out)
            assert not np.isfinite(out).any(), (block.name, offset, fill)
