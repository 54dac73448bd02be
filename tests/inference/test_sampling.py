"""Each rule against a few lines of NumPy, and draws against the probabilities that they follow."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_jax.errors import InputError
from qlora_jax.inference.sampling import (
    Sampling,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    penalize_repetition,
    sample,
)
from tests.tolerances import SAMPLED_SHARE_ATOL

LOGITS = np.log(np.array([[0.4, 0.1, 0.3, 0.2]], np.float32))
# Quarters apart, so that no rounding moves a token over a threshold.
rows = st.lists(st.integers(-40, 40), min_size=2, max_size=12, unique=True).map(
    lambda values: np.array([values], np.float32) / 4
)


def kept(logits) -> list[int]:
    return np.flatnonzero(np.isfinite(np.asarray(logits)[0])).tolist()


def probabilities(logits):
    weights = np.exp(logits[0].astype(np.float64) - logits.max())
    return weights / weights.sum()


@given(rows, st.integers(1, 12))
def test_top_k(logits, k):
    k = min(k, logits.shape[1])
    assert kept(keep_top_k(logits, k)) == sorted(np.argsort(-logits[0])[:k].tolist())


@given(rows, st.floats(0.01, 0.99))
def test_top_p(logits, p):
    chosen, total = [], 0.0
    for index in np.argsort(-logits[0]):
        if total >= p + 1e-5:
            break
        if total > p - 1e-5 and chosen:
            return  # within float32's rounding of the threshold: either answer is right
        chosen.append(int(index))
        total += probabilities(logits)[index]
    assert kept(keep_top_p(logits, p)) == sorted(chosen)


@given(rows, st.sampled_from([0.9, 0.5, 0.1, 0.01]))
def test_min_p(logits, p):
    share = probabilities(logits)
    assert kept(keep_min_p(logits, p)) == np.flatnonzero(share >= p * share.max()).tolist()


def test_what_is_kept_keeps_its_logit():
    for rule in (keep_top_k(LOGITS, 2), keep_top_p(LOGITS, 0.6), keep_min_p(LOGITS, 0.6)):
        assert kept(rule) == [0, 2]
        np.testing.assert_array_equal(np.asarray(rule)[0, [0, 2]], LOGITS[0, [0, 2]])


def test_ties_are_kept_together():
    equal = np.zeros((1, 4), np.float32)
    assert kept(keep_top_k(equal, 1)) == kept(keep_top_p(equal, 0.1)) == [0, 1, 2, 3]


def test_repetition_penalty():
    logits = np.array([[2.0, -2.0, 2.0, -2.0]], np.float32)
    seen = np.array([[True, True, False, False]])
    assert penalize_repetition(logits, seen, 2.0).tolist() == [[1.0, -4.0, 2.0, -2.0]]


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(temperature=1), [0.4, 0.1, 0.3, 0.2]),
        (Sampling(temperature=0.5), [0.16 / 0.3, 0.01 / 0.3, 0.09 / 0.3, 0.04 / 0.3]),
        (Sampling(temperature=1, top_k=2), [4 / 7, 0, 3 / 7, 0]),
        (Sampling(temperature=1, top_p=0.85), [4 / 9, 0, 3 / 9, 2 / 9]),
        (Sampling(temperature=1, min_p=0.7), [4 / 7, 0, 3 / 7, 0]),
        (Sampling(temperature=1, top_k=3, top_p=0.5), [4 / 7, 0, 3 / 7, 0]),
        (Sampling(temperature=0), [1, 0, 0, 0]),
    ],
)
def test_draws_follow_the_probabilities(sampling, expected):
    """top_k=3 then top_p=0.5 keeps two: after top_k the likeliest holds 4/9, below a half."""
    keys = jax.random.split(jax.random.key(0), 20_000)
    drawn = jax.vmap(lambda key: sample(jnp.asarray(LOGITS), key, sampling)[0])(keys)
    share = np.bincount(np.asarray(drawn), minlength=4) / len(keys)
    np.testing.assert_allclose(share, expected, atol=SAMPLED_SHARE_ATOL)
    assert (share[np.array(expected) == 0] == 0).all()


def test_a_temperature_near_0_takes_the_likeliest():
    logits = jnp.array([[5.0, 80.0, 79.0, -3.0]])
    for key in jax.random.split(jax.random.key(0), 20):
        assert sample(logits, key, Sampling(temperature=1e-38)).tolist() == [1]


def test_the_penalty_changes_the_greedy_choice():
    logits = jnp.array([[2.0, 1.5, 0.0]])
    seen = jnp.array([[True, False, False]])
    key = jax.random.key(0)
    assert sample(logits, key, Sampling(repetition_penalty=2.0), seen).tolist() == [1]
    assert sample(logits, key, Sampling(), seen).tolist() == [0]


def test_sampling_is_one_program_and_int32():
    logits = jnp.asarray(LOGITS)
    settings = Sampling(temperature=0.7, top_k=3, top_p=0.9, min_p=0.1)
    compiled = jax.jit(sample, static_argnames="sampling")
    key = jax.random.key(3)
    token = compiled(logits, key, settings)
    assert token.dtype == jnp.int32
    assert token.tolist() == sample(logits, key, settings).tolist()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_k", -1),
        ("top_k", 1.5),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("min_p", float("nan")),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", float("inf")),
    ],
)
def test_a_value_out_of_range_is_named(name, value):
    with pytest.raises(InputError, match=rf"GEN-SAMPLING\]: {name}: {value} \(expected"):
        Sampling(**{name: value})
