"""The chunked loss against all logits at once: values, gradients, uncounted labels, memory."""

import dataclasses
from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import gpu
from pallas_kernels.cross_entropy import api, reference
from tests.random_arrays import normal
from tests.tolerances import VJP_ATOL, VJP_RTOL


def case(tokens: int, seed: int = 0):
    labels = np.random.default_rng(seed).integers(-1, 50, tokens)
    labels = jnp.asarray(np.where(labels < 0, -100, labels), jnp.int32)
    return normal(seed, tokens, 8), normal(seed + 1, 50, 8), labels


@pytest.mark.parametrize("tokens", [1, 4, 11])
@pytest.mark.parametrize("piece", [16, None])
def test_equals_the_reference(monkeypatch, strict_promotion, piece, tokens):
    monkeypatch.setattr(api, "sizes_here", lambda: api.Sizes(4, piece))
    x, head, labels = case(tokens)

    def with_gradient(compute):
        def loss(x):
            found = compute(x, head, labels)
            return 3.0 * found[0], found[1]

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(x)

    (loss, right), dx = with_gradient(api.cross_entropy)
    (expected_loss, expected_right), expected = with_gradient(reference.cross_entropy)
    np.testing.assert_allclose(loss, expected_loss, rtol=VJP_RTOL)
    assert right == expected_right
    np.testing.assert_allclose(dx, expected, rtol=VJP_RTOL, atol=VJP_ATOL)
    assert not np.asarray(dx)[np.asarray(labels) < 0].any()


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("train_head", [False, True])
def test_a_soft_cap_and_a_trained_head(monkeypatch, strict_promotion, softcap, train_head):
    monkeypatch.setattr(api, "sizes_here", lambda: api.Sizes(4, 16))
    x, head, labels = case(11)

    def ours(x, head):
        found = api.cross_entropy(x, head, labels, softcap=softcap, train_head=train_head)
        return 3.0 * found.loss, found.right

    def plain(x, head):
        loss, right = reference.cross_entropy(x, head, labels, softcap)
        return 3.0 * loss, right

    wrt = (0, 1) if train_head else (0,)
    found, expected = (
        jax.jit(jax.value_and_grad(f, argnums=wrt, has_aux=True))(x, head) for f in (ours, plain)
    )
    for own, plainly in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(own, plainly, rtol=VJP_RTOL, atol=VJP_ATOL)


def test_nothing_counted_is_zero():
    x, head, _ = case(5)
    labels = jnp.full((5,), -100)
    loss, right = api.cross_entropy(x, head, labels)
    dx = jax.grad(lambda x: api.cross_entropy(x, head, labels).loss)(x)
    assert loss == 0
    assert right == 0
    assert not dx.any()


def temporary_bytes(loss, tokens: int, vocabulary: int, gradient: bool) -> int:
    shapes = (
        jax.ShapeDtypeStruct((tokens, 8), jnp.float32),
        jax.ShapeDtypeStruct((vocabulary, 8), jnp.float32),
        jax.ShapeDtypeStruct((tokens,), jnp.int32),
    )

    def first(x, head, labels):
        return loss(x, head, labels)[0]

    step = jax.jit(jax.grad(first) if gradient else first)
    return step.lower(*shapes).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("platform", ["cpu", "rtx4090"])
@pytest.mark.parametrize(
    ("loss", "few"), [(api.cross_entropy, True), (reference.cross_entropy, False)]
)
def test_logits_of_all_tokens_are_never_in_memory(loss, few, platform, gradient):
    """The reference, which holds them, shows that the bound would catch it."""
    tokens, vocabulary = 2048, 16384
    here = gpu.pretend(gpu.KNOWN[platform], interpret=False) if platform != "cpu" else nullcontext()
    with here:
        temporary = temporary_bytes(loss, tokens, vocabulary, gradient)
    assert (temporary < tokens * vocabulary * 4 / 2) == few


def test_a_cpu_keeps_its_sizes():
    assert api.sizes_here() == api.Sizes(64, 4096)


@pytest.mark.parametrize("name", gpu.KNOWN)
def test_a_gpu_computes_longer_than_it_reads(name):
    known = gpu.KNOWN[name]
    with gpu.pretend(known, interpret=False):
        chunk, piece = api.sizes_here()
    assert 1 <= chunk * known.bandwidth / known.flops < 2
    assert piece is None


def test_a_gpu_without_figures_gets_the_largest_chunk():
    unknown = dataclasses.replace(gpu.KNOWN["h100"], name="new", bandwidth=0, flops=0)
    with gpu.pretend(unknown, interpret=False):
        assert api.sizes_here() == api.Sizes(512, None)


def test_dtypes_must_agree():
    x, head, labels = case(4)
    with pytest.raises(ValueError, match=r"x is bfloat16 \(4, 8\), head is float32"):
        api.cross_entropy(x.astype(jnp.bfloat16), head, labels)
