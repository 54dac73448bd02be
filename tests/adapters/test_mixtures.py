"""Entries that are left out and signs that are outvoted, on numbers that are written down."""

import numpy as np
import pytest

from qlora_jax.adapters.mixtures import MIXTURES, at_random, largest, mixture, summed
from qlora_jax.adapters.parts import Part
from tests.tolerances import SAMPLED_SHARE_ATOL

SEED = np.random.SeedSequence(0)


@pytest.mark.parametrize(
    ("density", "expected"),
    [
        (1.0, [[1, -2, 3], [0, 2, -5]]),
        (0.5, [[0, -2, 3], [0, 0, -5]]),  # of two entries of size 2 the first
        (0.49, [[0, 0, 3], [0, 0, -5]]),  # int(0.49 * 6) = 2
        (0.1, [[0, 0, 0], [0, 0, 0]]),
    ],
)
def test_the_largest_entries_stay(density, expected):
    array = np.float32([[1, -2, 3], [0, 2, -5]])
    np.testing.assert_array_equal(largest(array, density, SEED), np.float32(expected))


def test_random_entries_stay_and_keep_the_mean():
    ones = np.ones((200, 100), np.float32)
    found = at_random(ones, 0.25, SEED)
    assert set(np.unique(found)) == {0.0, 4.0}
    assert abs((found > 0).mean() - 0.25) < SAMPLED_SHARE_ATOL
    np.testing.assert_array_equal(at_random(ones, 0.25, np.random.SeedSequence(0)), found)
    assert (at_random(ones, 0.25, np.random.SeedSequence(1)) != found).any()
    # numpy promises the raw numbers: these stay on every version.
    assert np.flatnonzero(found[0, :20]).tolist() == [0, 3, 7, 8, 9, 14, 15, 18, 19]


def test_each_matrix_and_each_side_has_random_bits_of_its_own():
    ones = np.ones((8, 8), np.float32)
    parts = [Part(ones, ones, 1.0, "a", 0), Part(ones, ones, 1.0, "b", 1)]
    how = MIXTURES["dare_linear"]
    A, B = mixture(parts, how, 0.5, "total", (0, 1, 2))
    assert (A != B).any()
    assert len(np.unique(A)) == 3, "both adapters lose the same entries"
    for place in ((1, 1, 2), (0, 2, 2), (0, 1, 3)):
        assert (mixture(parts, how, 0.5, "total", place)[0] != A).any()


def test_signs_are_elected():
    """ties by hand, weights 2 and 1 and 1.

    a           4   1   1   0
    b          -1  -2   1   0
    c          -2  -2   0   0
    total       +   -   +   +       sum of values 1, -3, 2, 0
    frequency   -   -   +   +       sum of signs -1, -1, 2, 0
    """
    arrays = np.float32([[[4, 1, 1, 0]], [[-1, -2, 1, 0]], [[-2, -2, 0, 0]]])
    factors = np.float32([2, 1, 1])
    total, frequency = (summed(arrays, factors, sign)[0] for sign in ("total", "frequency"))
    np.testing.assert_array_equal(total, [8, -2, 1.5, 0])
    np.testing.assert_array_equal(frequency, [-1.5, -2, 1.5, 0])
    np.testing.assert_array_equal(summed(arrays, factors, None)[0], [5, -2, 3, 0])


def test_a_draw_of_signs_is_positive():
    arrays = np.float32([[[3, -1, 2]], [[-1, 3, -2]]])
    factors = np.float32([1, 1])
    np.testing.assert_array_equal(summed(arrays, factors, "frequency")[0], [3, 3, 2])
    np.testing.assert_array_equal(summed(arrays, factors, "total")[0], [3, 3, 2])


def test_a_negative_factor_is_on_one_side():
    A, B = np.float32([[1, 2]]), np.float32([[3], [4]])
    made = mixture([Part(A, B, -4.0, "a", 0)], MIXTURES["linear"], 1.0, "total", (0,))
    np.testing.assert_array_equal(made[0], -2 * A)
    np.testing.assert_array_equal(made[1], 2 * B)
