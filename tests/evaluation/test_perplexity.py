"""Perplexity against log-softmax by hand, on windows and on datasets, with and without adapter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.adapters import init_lora
from qlora_jax.data import load_dataset
from qlora_jax.errors import InputError, NonFinite
from qlora_jax.evaluation import perplexity, windows
from qlora_jax.evaluation.perplexity import batch_loss
from qlora_jax.models import Decoder
from tests.data.small_tokenizer import byte_level
from tests.inference.tiny_model import tiny_model
from tests.tiny_model import FEW_TARGETS
from tests.tolerances import MEAN_NLL_RTOL

MODEL = tiny_model()
WINDOWS = np.random.default_rng(0).integers(0, 265, (5, 12)).astype(np.int32)


def nll_by_hand(model, ids, adapter=None) -> np.ndarray:
    """-log p of each token but the first, in float64."""
    logits = np.asarray(model(ids[None], adapter=adapter)[0], np.float64)
    logits -= logits.max(-1, keepdims=True)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return -log_p[np.arange(len(ids) - 1), ids[1:]]


@pytest.mark.parametrize("batch_size", [1, 2, 5, 8, 10**12])
def test_the_mean_over_all_targets_of_windows(batch_size):
    expected = np.mean([nll_by_hand(MODEL, ids) for ids in WINDOWS])
    result = perplexity(MODEL, WINDOWS, batch_size=batch_size)
    assert result.targets == 5 * 11
    np.testing.assert_allclose(result.mean_nll, expected, rtol=MEAN_NLL_RTOL)
    assert result.perplexity == np.exp(result.mean_nll)


def test_an_adapter_is_used():
    adapter = init_lora(MODEL, r=2, alpha=8.0, targets=FEW_TARGETS, key=jax.random.key(0))
    adapter = jax.tree.map(lambda leaf: leaf + 0.3, adapter)
    expected = np.mean([nll_by_hand(MODEL, ids, adapter) for ids in WINDOWS])
    result = perplexity(MODEL, WINDOWS, adapter=adapter)
    np.testing.assert_allclose(result.mean_nll, expected, rtol=MEAN_NLL_RTOL)
    assert abs(result.mean_nll - perplexity(MODEL, WINDOWS).mean_nll) > 0.01


def test_a_dataset_counts_its_own_labels_packed_or_not():
    rows = [{"prompt": "the", "completion": "ab" * n} for n in (3, 1, 6, 2)]
    means = []
    for packing in (True, False):
        data = load_dataset(rows, byte_level(), max_seq_length=32, packing=packing)
        result = perplexity(MODEL, data, batch_size=3)
        assert result.targets == data.statistics.trained_tokens
        means.append(result.mean_nll)
    by_hand = [nll_by_hand(MODEL, s.ids)[s.trained[1:]] for s in data.sequences]
    np.testing.assert_allclose(means, np.concatenate(by_hand).mean(), rtol=MEAN_NLL_RTOL)


def test_one_program_a_shape_and_progress():
    batch_loss.clear_cache()
    seen = []
    perplexity(MODEL, WINDOWS, batch_size=2, progress=lambda *of: seen.append(of))
    perplexity(MODEL, WINDOWS + 1 - 1, batch_size=2)
    assert batch_loss._cache_size() == 1
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_windows_are_cut_one_after_another():
    assert windows(range(1, 8), 3).tolist() == [[1, 2, 3], [4, 5, 6]]
    assert windows([1, 2], 2).dtype == np.int32
    with pytest.raises(InputError, match=r"text: 2 tokens \(expected at least one window of 3\)"):
        windows([1, 2], 3)
    with pytest.raises(InputError, match=r"length: 1 \(expected at least 2\)"):
        windows([1, 2], 1)


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (WINDOWS[0], r"windows: shape \(12,\) of int32"),
        (WINDOWS[:0], r"windows: shape \(0, 12\)"),
        (WINDOWS[:, :1], r"windows: shape \(5, 1\)"),
        (WINDOWS.astype(np.float32), "of float32"),
        (WINDOWS + 265, r"token ids 265 to .* \(expected 0 to 264\)"),
        (WINDOWS - 300, r"token ids -"),
    ],
)
def test_windows_that_are_none_are_refused(data, match):
    with pytest.raises(InputError, match=match):
        perplexity(MODEL, data)


def test_a_loss_that_is_not_finite_names_the_batch():
    weights = MODEL.weights()
    embedding = weights["model.embed_tokens.weight"]
    weights["model.embed_tokens.weight"] = embedding.at[264].set(jnp.nan)
    data = np.zeros((3, 4), np.int32)
    data[1, 2] = 264
    with pytest.raises(NonFinite, match="batch 2: the loss is nan"):
        perplexity(Decoder.from_weights(MODEL.config, weights, "float32"), data)
