import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_jax.errors import InputError
from qlora_jax.optim.schedules import ELSEWHERE, SCHEDULES, schedule
from tests.tolerances import SCHEDULE_ATOL

PEAK, TOTAL = 2e-4, 20
STEPS = (0, 1, 2, 3, 4, 10, 19, 20, 21)

# get_scheduler(name, SGD(lr=2e-4), warmup, 20).get_last_lr() of transformers 5.23.0, in 1e-4.
W3 = (0.0, 0.6666666667, 1.333333333, 2.0)  # any warmup of three steps
TRANSFORMERS = {
    ("constant", 0): (2,) * 9,
    ("constant", 3): (2,) * 9,
    ("constant_with_warmup", 0): (2,) * 9,
    ("constant_with_warmup", 3): (*W3, 2, 2, 2, 2, 2),
    ("linear", 0): (2, 1.9, 1.8, 1.7, 1.6, 1, 0.1, 0, 0),
    ("linear", 3): (*W3, 1.882352941, 1.176470588, 0.1176470588, 0, 0),
    ("cosine", 0): (
        *(2, 1.987688341, 1.951056516, 1.891006524, 1.809016994),
        *(1, 0.0123116594, 0, 0.0123116594),
    ),
    ("cosine", 3): (*W3, 1.9829731, 1.27366299, 0.01702690032, 0, 0.01702690032),
    ("cosine_with_restarts", 0): (
        *(2, 1.987688341, 1.951056516, 1.891006524, 1.809016994, 1, 0.0123116594, 0, 0),
    ),
    ("cosine_with_restarts", 3): (*W3, 1.9829731, 1.27366299, 0.01702690032, 0, 0),
    ("polynomial", 0): (*(2, 1.90005, 1.8001, 1.70015, 1.6002, 1.0005, 0.10095, 0.001, 0.001),),
    ("polynomial", 3): (*W3, 1.882411765, 1.176882353, 0.1185882353, 0.001, 0.001),
    ("inverse_sqrt", 0): (
        *(2, 1.999900007, 1.99980003, 1.999700067, 1.99960012),
        *(1.999000749, 1.998102703, 1.998002995, 1.997903302),
    ),
    ("inverse_sqrt", 3): (
        *(*W3, 1.732050808, 1.095445115, 0.7947194142, 0.7745966692, 0.755928946),
    ),
}


@pytest.mark.parametrize(("name", "warmup"), TRANSFORMERS)
def test_equals_transformers(name, warmup):
    rate = schedule(name, PEAK, TOTAL, warmup / TOTAL)
    for step, value in zip(STEPS, TRANSFORMERS[name, warmup], strict=True):
        for found in (rate(step), jax.jit(rate)(jnp.int32(step))):
            assert found.dtype == jnp.float32
            np.testing.assert_allclose(found / PEAK, value / 2, rtol=0, atol=SCHEDULE_ATOL)


def test_every_schedule_is_compared():
    assert {name for name, _ in TRANSFORMERS} == set(SCHEDULES)


@given(st.sampled_from(sorted(SCHEDULES)), st.integers(1, 5000), st.floats(0, 1), st.data())
def test_every_rate_is_finite_and_between_zero_and_the_peak(name, total, ratio, data):
    step = data.draw(st.integers(0, total))
    value = float(schedule(name, PEAK, total, ratio)(step))
    assert 0.0 <= value <= PEAK * (1 + SCHEDULE_ATOL)


def test_the_warmup_is_rounded_up_as_in_transformers():
    rate = schedule("constant_with_warmup", 1.0, 100, 0.021)  # 2.1 steps: 3
    np.testing.assert_allclose(
        [rate(i) for i in range(4)], [0, 1 / 3, 2 / 3, 1], atol=SCHEDULE_ATOL
    )


@pytest.mark.parametrize("name", ELSEWHERE)
def test_schedules_of_transformers_that_are_missing_are_refused_by_name(name):
    with pytest.raises(InputError, match=f"{name} is not supported: it needs"):
        schedule(name, PEAK, TOTAL)


def test_an_unknown_name_gets_the_nearest():
    with pytest.raises(InputError, match=r"unknown 'cosin' .*did you mean cosine"):
        schedule("cosin", PEAK, TOTAL)


def test_polynomial_refuses_a_peak_below_its_end():
    with pytest.raises(InputError, match="more than 1e-07"):
        schedule("polynomial", 1e-8, TOTAL)
