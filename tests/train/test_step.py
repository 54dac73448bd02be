"""A step's mean gradient: what is divided by what, what clips it, and what makes it not finite."""

import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.train.step import Sums, finish

GRADS = np.float32([3, -4])


def sums(grads=GRADS, loss=6.0, right=2, count=4) -> Sums:
    return Sums({"w": jnp.asarray(grads)}, jnp.float32(loss), jnp.int32(right), jnp.int32(count))


def test_a_mean_over_targets_without_the_loss_scale():
    grads, metrics = finish(sums(8 * GRADS), max_grad_norm=None, loss_scale=8.0)
    np.testing.assert_array_equal(grads["w"], GRADS / 4)
    assert (metrics.loss, metrics.accuracy, metrics.count) == (1.5, 0.5, 4)
    assert metrics.grad_norm == 1.25
    assert metrics.finite


@pytest.mark.parametrize(("most", "factor"), [(0.5, 0.4), (1.5, 1)])
def test_clipping_is_by_the_norm_of_the_mean(most, factor):
    grads, metrics = finish(sums(), max_grad_norm=most)
    np.testing.assert_allclose(grads["w"], GRADS / 4 * factor, rtol=1e-5)
    assert metrics.grad_norm == 1.25, "before it is clipped"


def test_no_target_is_no_step():
    grads, metrics = finish(sums(0 * GRADS, loss=0.0, right=0, count=0), max_grad_norm=1.0)
    assert not grads["w"].any()
    assert (metrics.loss, metrics.accuracy, metrics.finite) == (0, 0, True)


@pytest.mark.parametrize(
    "wrong", [{"grads": [3, np.inf]}, {"grads": [np.nan, 0]}, {"loss": np.nan}]
)
def test_either_of_gradient_and_loss_is_not_finite(wrong):
    assert not finish(sums(**wrong), max_grad_norm=1.0)[1].finite
