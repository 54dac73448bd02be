"""The product with its adapter: fused in the kernels against the plain composition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.backends import Unsupported
from pallas_kernels.lora_matmul import lora_matmul
from pallas_kernels.lora_matmul.api import BACKENDS
from pallas_kernels.nf4_matmul import nf4_matmul
from tests.pallas_kernels.interpreted import interpreter
from tests.pallas_kernels.kernels import Shape, error, rows, weight
from tests.tolerances import INTERPRETED_RTOL, VJP_RTOL

RANK = 5  # no multiple of anything
SHAPE = Shape(70, 192, 320)


def arguments(shape: Shape, dtype=jnp.bfloat16):
    """(x, A, B^T, scale) for a W of this shape; the low-rank term as large as the product."""
    rng = np.random.default_rng(0)
    A = jnp.asarray(rng.standard_normal((RANK, shape.contraction)), jnp.float32)
    Bt = jnp.asarray(rng.standard_normal((RANK, shape.n)), jnp.float32)
    return rows(shape, dtype), A, Bt, jnp.float32(0.5)


def stored(shape: Shape) -> tuple[tuple, dict]:
    """(codes, scales) and the keywords of a weight."""
    w = weight(shape, "forward")
    return (w.codes, w.scales), {"shape": w.shape}


def results(shape: Shape, backend: str | None, dtype=jnp.bfloat16):
    """(y, dx, dA, dB^T) by one backend, for a fixed dy."""
    x, A, Bt, scale = arguments(shape, dtype)
    arrays, static = stored(shape)

    def f(x, A, Bt):
        return lora_matmul(x, *arrays, A, Bt, scale, backend=backend, **static)

    y, pull_back = jax.vjp(f, x, A, Bt)
    dy = jnp.asarray(np.random.default_rng(1).standard_normal(y.shape), dtype)
    return y, *pull_back(dy)


def test_plain_is_the_formula():
    x, A, Bt, scale = arguments(SHAPE, jnp.float32)
    arrays, static = stored(SHAPE)
    y = lora_matmul(x, *arrays, A, Bt, scale, **static)
    expected = nf4_matmul(x, *arrays, **static) + scale * (x @ A.T) @ Bt
    assert error(y, np.asarray(expected, np.float64)) < VJP_RTOL


# In float32 the composition is the oracle; its whole tiles add the term within the kernel, its
# shared ones after it.
@pytest.mark.slow
@pytest.mark.parametrize(
    "shape", [SHAPE, Shape(70, 200, 640, sms=3)], ids=["within the kernel", "after it"]
)
def test_fused_is_plain(shape):
    exact = [np.asarray(a, np.float64) for a in results(shape, "plain", jnp.float32)]
    with interpreter("h100", sms=shape.sms):
        found = results(shape, "fused")
    for name, one, oracle in zip(("y", "dx", "dA", "dBt"), found, exact, strict=True):
        assert error(one, oracle) < 2 * INTERPRETED_RTOL["bfloat16"], name


@pytest.mark.slow
def test_batches_become_rows():
    x, A, Bt, scale = arguments(SHAPE)
    arrays, static = stored(SHAPE)
    with interpreter("h100", sms=1):

        def f(x):
            return lora_matmul(x, *arrays, A, Bt, scale, backend="fused", **static)

        np.testing.assert_array_equal(
            jax.vmap(f)(x[:64].reshape(2, 32, -1)).reshape(64, -1), f(x[:64])
        )


def test_without_a_gpu():
    with pytest.raises(Unsupported, match="the default device is a cpu, not a GPU"):
        results(SHAPE, "fused")
    assert [name for name, _ in BACKENDS] == ["fused", "plain"]


def test_shapes_that_do_not_fit():
    x, A, Bt, scale = arguments(SHAPE)
    arrays, static = stored(SHAPE)
    with pytest.raises(ValueError, match=r"B\^T \(5, 191\); .* B\^T \(r, 192\)"):
        lora_matmul(x, *arrays, A, Bt[:, 1:], scale, **static)


def test_gradients_of_the_matrices_are_not_rounded_to_16_bits():
    for gradient in results(SHAPE, "plain")[2:]:
        assert gradient.dtype == jnp.float32
        assert (gradient != gradient.astype(jnp.bfloat16).astype(jnp.float32)).any()
