"""The product under transformations: gradients of gradients, and batches that become rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.nf4_matmul import reference
from pallas_kernels.nf4_matmul.vjp import frozen_matmul
from pallas_kernels.nf4_matmul.weight import Weight
from pallas_kernels.quantize.api import quantize_4bit
from tests.random_arrays import normal
from tests.tolerances import VJP_ATOL, VJP_RTOL

OUT, IN = 24, 64
CLOSE = {"rtol": VJP_RTOL, "atol": VJP_ATOL}


class Recorded:
    """The reference as the only backend, which notes the rows that it is asked for."""

    def __init__(self):
        self.rows = []
        self.forward = (("reference", self.noted(reference.forward)),)
        self.backward = (("reference", self.noted(reference.backward)),)

    def noted(self, run):
        def noting(x, w):
            self.rows.append(x.shape[0])
            return run(x, w)

        return noting

    def __call__(self, x, w):
        return frozen_matmul(x, w, self.forward, self.backward, None)


@pytest.fixture
def product():
    return Recorded()


def weight(seed=0):
    return Weight(*quantize_4bit(normal(seed, OUT, IN)), (OUT, IN), "nf4", 64, "bnb")


def dense(w):
    return reference.dense(w, jnp.float32)


def test_a_batch_of_x_becomes_rows(product):
    w, x = weight(), normal(1, 5, 3, IN)
    y = jax.jit(jax.vmap(lambda x: product(x, w)))(x)
    assert product.rows[-1] == 15
    np.testing.assert_allclose(y, x @ dense(w).T, **CLOSE)


def test_batches_within_batches_on_any_axis(product):
    w, x = weight(), normal(1, 3, 2, 5, IN)
    inner = jax.vmap(lambda x: product(x, w), in_axes=1, out_axes=1)
    y = jax.vmap(inner, in_axes=1)(x)  # x: (3, 5, IN) and then (3, IN)
    assert product.rows[-1] == 30
    np.testing.assert_allclose(y, jnp.einsum("abci,oi->baco", x, dense(w)), **CLOSE)


def test_the_gradient_of_a_batch_becomes_rows(product):
    w, x, c = weight(), normal(1, 5, 3, IN), normal(2, 5, 3, OUT)
    dx = jax.vmap(jax.grad(lambda x, c: (product(x, w) * c).sum()))(x, c)
    assert product.rows[-1] == 15
    np.testing.assert_allclose(dx, c @ dense(w), **CLOSE)


@pytest.mark.parametrize("shared_x", [False, True])
def test_a_batch_of_weights_is_a_product_each(product, shared_x):
    weights = [weight(seed) for seed in range(3)]
    x = normal(9, 4, IN) if shared_x else normal(9, 3, 4, IN)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *weights)
    y = jax.vmap(product, in_axes=(None if shared_x else 0, 0))(x, stacked)
    want = [(x if shared_x else x[i]) @ dense(w).T for i, w in enumerate(weights)]
    np.testing.assert_allclose(y, jnp.stack(want), **CLOSE)
    assert set(product.rows) == {4}


def test_the_gradient_of_the_gradient(product):
    w, x, v = weight(), 0.1 * normal(1, 3, IN), normal(2, 3, IN)

    def along_v(matmul):
        def loss(x):
            return jnp.sin(matmul(x)).sum()

        return jax.grad(lambda x: (jax.grad(loss)(x) * v).sum())(x)

    ours, plain = along_v(lambda x: product(x, w)), along_v(lambda x: x @ dense(w).T)
    np.testing.assert_allclose(ours, plain, rtol=VJP_RTOL, atol=VJP_ATOL * jnp.abs(plain).max())


def test_the_weight_gets_no_gradient(product):
    w = weight()
    _, pull_back = jax.vjp(lambda scales: product(normal(1, 3, IN), replace(w, scales)), w.scales)
    np.testing.assert_array_equal(pull_back(jnp.ones((3, OUT)))[0], 0)


def replace(w, scales):
    return Weight(w.codes, scales, w.shape, w.kind, w.block_size, w.layout)
