"""The factor on a float16 loss: when it falls, when it grows, and when it stays."""

import pytest

from qlora_jax.train.loss_scale import FIRST, GROWTH_INTERVAL, LossScale


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_other_dtypes_need_none(dtype):
    scale = LossScale.for_dtype(dtype)
    assert scale.after(finite=False) == scale.after(finite=True) == scale
    assert (scale.value, scale.can_fall()) == (1, False)


def test_it_doubles_after_enough_steps_without_an_overflow():
    scale = LossScale.for_dtype("float16")
    for _ in range(GROWTH_INTERVAL - 1):
        scale = scale.after(finite=True)
    assert scale.value == FIRST
    scale = scale.after(finite=True)
    assert (scale.value, scale.good_steps) == (2 * FIRST, 0)


def test_an_overflow_halves_it_and_starts_the_count_anew():
    scale = LossScale(8.0, GROWTH_INTERVAL - 1, dynamic=True).after(finite=False)
    assert (scale.value, scale.good_steps) == (4, 0)
    assert scale.after(finite=True).value == 4


def test_it_ends_at_1():
    scale = LossScale(1.5, 0, dynamic=True)
    assert scale.can_fall()
    scale = scale.after(finite=False)
    assert scale.value == 1
    assert not scale.can_fall()
    assert scale.after(finite=False).value == 1
