"""The chunked loss against all logits at once: values, gradients, uncounted labels, memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.cross_entropy import api, reference
from tests.tolerances import VJP_ATOL, VJP_RTOL


def case(tokens: int, seed: int = 0):
    keys = jax.random.split(jax.random.key(seed), 3)
    x, head = jax.random.normal(keys[0], (tokens, 8)), jax.random.normal(keys[1], (50, 8))
    labels = jax.random.randint(keys[2], (tokens,), -1, 50)
    return x, head, jnp.where(labels < 0, -100, labels)


@pytest.mark.parametrize("tokens", [1, 4, 11])
def test_equals_the_reference(monkeypatch, strict_promotion, tokens):
    monkeypatch.setattr(api, "CHUNK", 4)
    monkeypatch.setattr(api, "PIECE", 16)
    x, head, labels = case(tokens)
    loss, right = reference.cross_entropy(x, head, labels)
    ours = api.cross_entropy(x, head, labels)
    np.testing.assert_allclose(ours.loss, loss, rtol=VJP_RTOL)
    assert ours.right == right
    dx = jax.grad(lambda x: 3.0 * api.cross_entropy(x, head, labels).loss)(x)
    expected = jax.grad(lambda x: 3.0 * reference.cross_entropy(x, head, labels)[0])(x)
    np.testing.assert_allclose(dx, expected, rtol=VJP_RTOL, atol=VJP_ATOL)
    assert not np.asarray(dx)[np.asarray(labels) < 0].any()


def test_nothing_counted_is_zero():
    x, head, _ = case(5)
    labels = jnp.full((5,), -100)
    loss, right = api.cross_entropy(x, head, labels)
    dx = jax.grad(lambda x: api.cross_entropy(x, head, labels).loss)(x)
    assert loss == 0
    assert right == 0
    assert not dx.any()


def test_logits_of_all_tokens_are_never_in_memory():
    tokens, vocabulary = 2048, 16384
    shapes = (
        jax.ShapeDtypeStruct((tokens, 8), jnp.float32),
        jax.ShapeDtypeStruct((vocabulary, 8), jnp.float32),
        jax.ShapeDtypeStruct((tokens,), jnp.int32),
    )
    step = jax.jit(jax.grad(lambda x, head, labels: api.cross_entropy(x, head, labels).loss))
    temporary = step.lower(*shapes).compile().memory_analysis().temp_size_in_bytes
    assert temporary < tokens * vocabulary * 4 / 2


def test_dtypes_must_agree():
    x, head, labels = case(4)
    with pytest.raises(ValueError, match=r"x is bfloat16 \(4, 8\), head is float32"):
        api.cross_entropy(x.astype(jnp.bfloat16), head, labels)
