"""Each VJP of our own against plain autodiff of the same formula, in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.lora_matmul.delta import lora_delta, plain_lora_delta
from qlora_jax.models import attention
from qlora_jax.models.mlp import plain_swiglu, swiglu
from qlora_jax.models.norms import plain_rms_norm, rms_norm
from tests.tolerances import VJP_ATOL, VJP_RTOL


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


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


def test_swiglu(strict_promotion):
    args = normal(0, 2, 3, 16), normal(1, 2, 3, 16)
    assert_same_gradients(swiglu, plain_swiglu, args, (0, 1))


def test_lora_delta(strict_promotion):
    args = normal(0, 2, 5, 16), normal(1, 4, 16), normal(2, 4, 12), jnp.float32(1.5)
    assert_same_gradients(lora_delta, plain_lora_delta, args, (0, 1, 2))


def plain_attention(q, k, v, segment_ids):
    """Attention as the formula says it, with all scores at once."""
    length, size = q.shape[1], q.shape[3]
    k, v = (jnp.repeat(a, q.shape[2] // a.shape[2], axis=2) for a in (k, v))
    seen = jnp.tril(jnp.ones((length, length), bool))[None]
    if segment_ids is not None:
        seen = seen & (segment_ids[:, :, None] == segment_ids[:, None, :])
    scores = jnp.einsum("bshd,bthd->bhst", q, k) * size**-0.5
    weights = jax.nn.softmax(jnp.where(seen[:, None], scores, -jnp.inf), axis=-1)
    return jnp.einsum("bhst,bthd->bshd", weights, v)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("length", [7, 16, 21])
def test_attention(monkeypatch, packed, length):
    monkeypatch.setattr(attention, "SMALLEST_BLOCK", 4)
    assert len(attention.blocks(length)) > 1
    q, k, v = normal(0, 2, length, 6, 8), normal(1, 2, length, 2, 8), normal(2, 2, length, 2, 8)
    ids = jnp.sort(jax.random.randint(jax.random.key(3), (2, length), 0, 3)) if packed else None
    args = q, k, v, ids
    assert_same_gradients(attention.causal_attention, plain_attention, args, (0, 1, 2))


@pytest.mark.parametrize("length", [1, 255, 256, 257, 1024, 5000])
def test_blocks_cover_every_row_once(length):
    blocks = attention.blocks(length)
    assert len(blocks) <= attention.MOST_BLOCKS
    assert [row for start, stop in blocks for row in range(start, stop)] == list(range(length))
