"""Each VJP of our own against plain autodiff of the same formula, in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.lora_matmul.delta import lora_delta, plain_lora_delta
from qlora_jax.models.mlp import ACTIVATIONS, gated, plain_gated
from qlora_jax.models.norms import RMSNorm, plain_rms_norm, rms_norm
from tests.random_arrays import normal
from tests.tolerances import VJP_ATOL, VJP_RTOL


def assert_same_gradients(own, plain, args, wrt):
    """Values and gradients of sum(f(*args) * fixed weights) agree."""
    weights = normal(99, *own(*args).shape)

    def scalar(f):
        return jax.value_and_grad(lambda *a: (f(*a) * weights).sum(), argnums=wrt)

    (y, dy), (y0, dy0) = scalar(own)(*args), scalar(plain)(*args)
    np.testing.assert_allclose(y, y0, rtol=VJP_RTOL)
    for ours, autodiff in zip(dy, dy0, strict=True):
        np.testing.assert_allclose(ours, autodiff, rtol=VJP_RTOL, atol=VJP_ATOL)


def test_rms_norm(strict_promotion):
    args = normal(0, 2, 3, 16), 1 + normal(1, 16), 1e-5
    assert_same_gradients(rms_norm, plain_rms_norm, args, (0,))


def test_gemmas_offset_is_added_in_float32():
    """A weight of 2^-9 is lost beside 1 in bfloat16."""
    norm = RMSNorm(jnp.full(4, 2.0**-9, jnp.bfloat16), eps=0.0, offset=1.0)
    np.testing.assert_array_equal(norm(jnp.full((1, 4), 512.0)), np.full((1, 4), 1 + 2.0**-9))


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_gated(strict_promotion, activation):
    args = normal(0, 2, 3, 16), normal(1, 2, 3, 16)
    assert_same_gradients(
        lambda gate, up: gated(gate, up, activation),
        lambda gate, up: plain_gated(gate, up, activation),
        args,
        (0, 1),
    )


def test_activations_are_jax_s():
    x = normal(0, 64) * 3
    for name, theirs in {"silu": jax.nn.silu, "gelu_tanh": jax.nn.gelu}.items():
        ours, slope = ACTIVATIONS[name](x)
        np.testing.assert_allclose(ours, theirs(x), rtol=VJP_RTOL, atol=VJP_ATOL)
        expected = jax.vmap(jax.grad(theirs))(x)
        np.testing.assert_allclose(slope, expected, rtol=VJP_RTOL, atol=VJP_ATOL)


def test_lora_delta(strict_promotion):
    args = normal(0, 2, 5, 16), normal(1, 4, 16), normal(2, 4, 12), jnp.float32(1.5)
    assert_same_gradients(lora_delta, plain_lora_delta, args, (0, 1, 2))
