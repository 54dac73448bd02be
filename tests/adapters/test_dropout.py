"""Dropout of LoRA's input: how much is dropped, and what becomes of the rest."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.adapters.dropout import dropped
from tests.tolerances import SAMPLED_SHARE_ATOL

ONES = jnp.ones((200, 100))


@pytest.mark.parametrize("rate", [0.1, 0.75])
def test_the_rate_is_the_share_that_is_dropped_and_the_mean_stays(rate):
    found = np.asarray(dropped(ONES, rate, jax.random.key(0)))
    np.testing.assert_allclose(np.unique(found), [0, 1 / (1 - rate)], rtol=1e-6)
    assert abs((found == 0).mean() - rate) < SAMPLED_SHARE_ATOL
    assert (found != dropped(ONES, rate, jax.random.key(1))).any()


def test_nothing_is_dropped_without_a_key_or_a_rate():
    assert dropped(ONES, 0.5, None) is ONES
    assert dropped(ONES, 0.0, jax.random.key(0)) is ONES


def test_the_dtype_stays():
    assert dropped(ONES.astype(jnp.bfloat16), 0.5, jax.random.key(0)).dtype == jnp.bfloat16
