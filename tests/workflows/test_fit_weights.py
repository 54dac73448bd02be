"""Weights by gradient: they reach the least loss, nothing is recompiled, and the table is true."""

import jax
import numpy as np
import pytest

from qlora_jax.adapters.adapter import Adapter
from qlora_jax.adapters.compose import compose
from qlora_jax.adapters.init import init_lora
from qlora_jax.data.load import load_dataset
from qlora_jax.errors import InputError
from qlora_jax.evaluation.perplexity import perplexity
from qlora_jax.workflows import fit_weights as module
from qlora_jax.workflows.fit_weights import Loss, fit_weights, halves
from tests.tolerances import FITTED_LOSS_ATOL, FITTED_WEIGHT_ATOL, SLOPE_RTOL
from tests.trained import trained


@pytest.fixture(scope="module")
def base(opened):
    return opened[0]


def moved(base, seed: int, **settings) -> Adapter:
    """A small adapter whose B is not zero."""
    fresh = init_lora(base, alpha=8, key=jax.random.key(seed), **settings)
    params = {
        name: {**pair, "B": jax.random.normal(jax.random.key(seed), pair["B"].shape) / 4}
        for name, pair in fresh.params.items()
    }
    return Adapter(params, fresh.spec)


@pytest.fixture(scope="module")
def adapters(base):
    return {
        "a": moved(base, 1, r=4, targets=["q_proj", "up_proj"]),
        "b": moved(base, 2, r=2, targets=["q_proj", "down_proj"]),
    }


TRUTH = {"a": 0.8, "b": 0.4}


@pytest.fixture(scope="module")
def text(base, adapters):
    """Windows drawn from the model with the adapters of weights TRUTH, which then are the best."""
    both = compose(adapters, TRUTH)
    logits = jax.jit(lambda model, ids, adapter: model(ids, adapter=adapter))
    ids = np.random.default_rng(0).integers(3, 250, (48, 32)).astype(np.int32)
    for at in range(1, ids.shape[1]):
        key = jax.random.fold_in(jax.random.key(0), at)
        ids[:, at] = jax.random.categorical(key, logits(base, ids, both)[:, at - 1])
    return ids


@pytest.fixture(scope="module")
def found(base, adapters, text):
    return fit_weights(base, adapters, text, free=True)


def test_the_gradient_is_the_differences(base, adapters, text):
    both = compose(adapters, dict.fromkeys(adapters, 1.0))
    loss = Loss(base, both, module.row_owners(adapters), "none")
    batches = list(module.batches_of(text[:2], 1, base.config.vocab_size)[0])
    at = np.array([[0.5], [-0.3]])
    value, slope = loss.with_slope(at, batches)
    assert slope.shape == at.shape
    np.testing.assert_allclose(value, loss(at, batches), rtol=SLOPE_RTOL)
    for number in range(2):
        step = np.zeros_like(at)
        step[number] = 0.05
        expected = (loss(at + step, batches) - loss(at - step, batches)) / 0.1
        np.testing.assert_allclose(slope[number], expected, rtol=SLOPE_RTOL, atol=1e-4)
    by_layer = loss.with_slope(np.broadcast_to(at, (2, 2)), batches)[1]
    np.testing.assert_allclose(by_layer.sum(1, keepdims=True), slope, rtol=SLOPE_RTOL)


def test_the_table_is_what_evaluate_says_of_the_composed_adapters(base, adapters, text, found):
    told = halves(text, module.TOKENS, 0)[1]
    expected = {
        "base": None,
        **adapters,
        "uniform, 1/2 each": compose(adapters, {"a": 0.5, "b": 0.5}),
        "fitted": compose(adapters, found.weights),
    }
    losses = {
        name: perplexity(base, told, adapter=adapter).mean_nll for name, adapter in expected.items()
    }
    assert losses.keys() == dict(found.rows).keys()
    for name, loss in found.rows:
        np.testing.assert_allclose(loss, losses[name], atol=FITTED_LOSS_ATOL, err_msg=name)
    assert found.targets == told.size - len(told)


def test_no_weights_nearby_are_better(base, adapters, text, found):
    fitted_on = halves(text, module.TOKENS, 0)[0]

    def loss(weights):
        return perplexity(base, fitted_on, adapter=compose(adapters, weights)).mean_nll

    best = loss(found.weights)
    for name in adapters:
        for step in (-0.2, 0.2):
            near = found.weights | {name: found.weights[name] + step}
            assert loss(near) > best
        assert abs(found.weights[name] - TRUTH[name]) < FITTED_WEIGHT_ATOL
    assert best < loss({"a": 0.5, "b": 0.5})


def test_it_is_deterministic_and_stops_by_itself(base, adapters, text, found):
    assert fit_weights(base, adapters, text, free=True) == found
    assert found.losses < module.MOST_LOSSES


def test_nothing_is_recompiled(base, adapters, text, found):
    before = module.slope._cache_size(), module.weighted_loss._cache_size()
    fit_weights(base, adapters, text, start={"a": 1, "b": 0.2})
    fit_weights(base, adapters, text, per_layer=True)
    assert (module.slope._cache_size(), module.weighted_loss._cache_size()) == before


def test_weights_are_not_negative_unless_they_may_be(base, adapters, text):
    params = {name: {**pair, "B": -pair["B"]} for name, pair in adapters["a"].params.items()}
    turned = {**adapters, "a": Adapter(params, adapters["a"].spec)}
    free = fit_weights(base, turned, text, free=True).weights["a"]
    assert abs(free + TRUTH["a"]) < FITTED_WEIGHT_ATOL
    assert fit_weights(base, turned, text).weights["a"] == 0


def test_a_weight_for_each_layer(base, adapters, text, found):
    layered = fit_weights(base, adapters, text, per_layer=True, free=True)
    assert {len(row) for row in layered.weights.values()} == {base.config.num_hidden_layers}
    fitted_on = halves(text, module.TOKENS, 0)[0]
    losses = [
        perplexity(base, fitted_on, adapter=compose(adapters, fit.weights)).mean_nll
        for fit in (layered, found)
    ]
    assert losses[0] < losses[1] + 2e-4


def test_the_start_is_told_where_it_was_given(base, adapters, text, found):
    given = fit_weights(base, adapters, text, start={"a": 1, "b": 0})
    rows = dict(given.rows)
    np.testing.assert_allclose(rows["weights as given"], rows["a"], atol=FITTED_LOSS_ATOL)
    assert "weights as given" not in dict(found.rows)


def test_halves_have_nothing_in_common_and_are_from_everywhere():
    data = np.repeat(np.arange(100), 4).reshape(100, 4)
    parts = halves(data, 80, seed=3)
    first, second = ({int(row[0]) for row in part} for part in parts)
    assert len(first) == len(second) == 20
    assert not first & second
    for part in (first, second):
        assert all(
            len([row for row in part if low <= row < low + 25]) > 2 for low in (0, 25, 50, 75)
        )
    assert halves(data, 10**9, 0)[0].shape == (50, 4)
    assert halves(data, 1, 0)[0].shape == (1, 4)


@pytest.mark.slow
def test_rows_of_a_file(home, opened, adapters):
    base, tokenizer = opened
    data = load_dataset(home / "train.jsonl", tokenizer, max_seq_length=64)
    found = fit_weights(base, adapters, data)
    first, second = halves(data, module.TOKENS, 0)
    names = [{sequence.where for sequence in part.sequences} for part in (first, second)]
    assert all(names)
    assert not names[0] & names[1]
    tokens = [part.statistics.trained_tokens for part in (first, second)]
    assert [found.fitted_on, found.targets] == tokens


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data": np.ones((1, 8), np.int32)}, r"FIT-DATA\]: data: 1 row or window \(expected two"),
        ({"start": {"a": -1, "b": 1}}, r"FIT-START\]: .*: -1 \(expected 0 or more.*--free"),
        ({"start": {"a": [1, 2], "b": 1}}, r"FIT-START\]: start: a weight for each layer"),
        ({"start": {"a": 1}}, r"COMPOSE-WEIGHT\]: weights: none for b"),
    ],
)
def test_what_cannot_be_fitted_is_refused(base, adapters, text, changes, words):
    arguments = {"data": text} | changes
    with pytest.raises(InputError, match=words):
        fit_weights(base, adapters, **arguments)


def test_a_dora_adapter_is_refused_alone_too(base, text):
    with pytest.raises(InputError, match=r"COMPOSE-KIND\]: d: is a DoRA adapter"):
        fit_weights(base, {"d": trained(base, use_dora=True)}, text)
