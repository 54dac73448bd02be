"""Packing floats: the gguf package's own packers are the oracle, byte for byte."""

import gguf
import ml_dtypes
import numpy as np
import pytest
from gguf.quants import quantize
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from qlora_jax.checkpoints.gguf_pack import BY_NAME, PIECE, packed
from qlora_jax.errors import InputError

KINDS = ["F32", "F16", "BF16", "Q8_0", "Q4_0"]
RANGE = {"F32": 3e38, "BF16": 3e38, "F16": 65504, "Q8_0": 65504 * 127, "Q4_0": 65504 * 8}


def ours(values: np.ndarray, kind: str) -> bytes:
    return b"".join(piece.tobytes() for piece in packed(values, kind, "t"))


def theirs(values: np.ndarray, kind: str) -> bytes:
    return quantize(values, gguf.GGMLQuantizationType[kind]).tobytes()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1.0, 1e-6, 3e4, 0.0, -0.0])
def test_bytes_equal_those_of_the_gguf_package(kind, scale):
    values = np.random.default_rng(0).standard_normal((48, 96)).astype(np.float32)
    values = np.clip(values, -2, 2) * np.float32(scale)
    assert ours(values, kind) == theirs(values, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_more_values_than_a_piece(kind):
    values = np.random.default_rng(1).standard_normal((3, PIECE)).astype(np.float32)
    assert ours(values, kind) == theirs(values, kind)


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_any_values_pack_as_the_gguf_package_packs_them(kind, data):
    """Halves, ties of the largest and signed zeros are what shrinking and `width` turn up."""
    limit = float(np.float32(RANGE[kind]))
    # Scales whose inverse is no float32 pack as zeros here; the reference leaves them undefined.
    small = 1e-30
    floats = st.floats(-limit, limit, width=32).filter(lambda x: x == 0 or abs(x) >= small)
    some = st.one_of(floats, st.sampled_from([0.0, -0.0, 0.5, -0.5, 1.5, 63.5, 127.0, -127.0, 8.0]))
    values = data.draw(arrays(np.float32, (2, 32), elements=some))
    assert ours(values, kind) == theirs(values, kind)


@pytest.mark.parametrize(("kind", "largest"), [("Q8_0", 127.0), ("Q4_0", -8.0)])
def test_numbers_next_to_halves(kind, largest):
    """With a scale of 1: where an eager rounding goes wrong."""
    halves = np.arange(-7.5, 8, 1, dtype=np.float32)
    values = np.full((3, 32), largest, np.float32)
    for row, towards in zip(values, (-np.inf, 0, np.inf), strict=True):
        row[1:17] = np.nextafter(halves, np.float32(towards))
    values[1, 17:25] = halves[:8]
    assert ours(values, kind) == theirs(values, kind)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_ties_of_the_largest_go_to_the_first(kind):
    values = np.array([[1, -3, 3, 2] * 8, [3, 1, -3, 2] * 8], np.float32)
    assert ours(values, kind) == theirs(values, kind)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_a_block_whose_scale_has_no_inverse_is_zero(kind):
    values = np.full((1, 32), 1e-42, np.float32)
    block = BY_NAME[kind][1]
    out = np.empty((1, 32), np.float32)
    block.unpack(np.frombuffer(ours(values, kind), np.uint8).reshape(1, -1), out)
    assert not out.any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_dtypes_go_through_float32(kind, dtype):
    values = np.random.default_rng(2).standard_normal((4, 64)).astype(dtype)
    assert ours(values, kind) == theirs(values.astype(np.float32), kind)


@pytest.mark.parametrize(
    ("kind", "value", "fits"),
    [
        ("F32", 1e300, 3e38),
        ("BF16", 3.4e38, 3.38e38),
        ("F16", 65520.0, 65519.0),
        ("Q8_0", 65520.0 * 127, 65519.0 * 127),
        ("Q4_0", 65520.0 * 8, 65519.0 * 8),
    ],
)
def test_what_is_too_large_is_refused_by_name(kind, value, fits):
    values = np.zeros((3, 64))
    values[1, 40] = -fits
    ours(values, kind)
    values[1, 40] = -value
    found = rf"error\[GG-RANGE\]: t: -.* is too large for {kind}\."
    with pytest.raises(InputError, match=found) as caught:
        ours(values, kind)
    wider = {"F32": "", "BF16": "the type f32"}.get(kind, "the type bf16 or f32")
    assert caught.value.hint == wider
