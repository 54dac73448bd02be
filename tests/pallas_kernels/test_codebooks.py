"""The tables are bitsandbytes' to the bit; codes and boundaries follow from them."""

import numpy as np
import pytest

from pallas_kernels import codebooks
from pallas_kernels.codebooks import CODEBOOKS, codebook, midpoints, sorted_codes
from tests.golden_data import GoldenFile, golden_folder


def test_golden_tables():
    ours = CODEBOOKS | {
        "dynamic_signed": codebooks.DYNAMIC_SIGNED,
        "dynamic_unsigned": codebooks.DYNAMIC_UNSIGNED,
    }
    with GoldenFile(golden_folder("nf4") / "tables.npz") as golden:
        for key in golden.outputs():
            assert ours[key].dtype == np.float32
            golden.compare_exact(key, ours[key])


def test_int4_is_sevenths_falling():
    np.testing.assert_array_equal(
        CODEBOOKS["int4"],
        np.array([7, 6, 5, 4, 3, 2, 1, 0, 0, -1, -2, -3, -4, -5, -6, -7], np.float32)
        / np.float32(7),
    )


@pytest.mark.parametrize("kind", CODEBOOKS)
def test_codebooks_are_float32_within_one_and_without_negative_zero(kind):
    table = codebook(kind)
    assert table.dtype == np.float32
    assert table.shape == (16,)
    assert table.min() == -1
    assert table.max() == 1
    assert not np.signbit(table[table == 0]).any()


@pytest.mark.parametrize("kind", CODEBOOKS)
def test_boundaries_lie_between_the_sorted_values(kind):
    order, boundaries = sorted_codes(kind), midpoints(kind)
    assert sorted(order) == list(range(16))
    values = codebook(kind)[order]
    assert (np.diff(values) >= 0).all()
    assert boundaries.dtype == np.float32
    assert ((values[:-1] <= boundaries) & (boundaries <= values[1:])).all()


def test_tables_cannot_be_changed():
    for table in (*CODEBOOKS.values(), codebooks.DYNAMIC_SIGNED, codebooks.DYNAMIC_UNSIGNED):
        with pytest.raises(ValueError, match="read-only"):
            table[0] = 2


def test_an_unknown_kind_names_those_that_exist():
    with pytest.raises(ValueError, match="kind is 'nf8'; the codebooks are nf4, fp4, int4"):
        codebook("nf8")
