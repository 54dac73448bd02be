"""Logits, losses and greedy tokens of every golden model against transformers, in float32."""

import numpy as np
import pytest

from qlora_jax.checkpoints.load import load_weights
from qlora_jax.checkpoints.shards import Shards
from qlora_jax.evaluation.perplexity import batch_loss
from qlora_jax.models import Decoder, KVCache, ModelConfig
from qlora_jax.models.decoder import forward
from tests.golden_data import GOLDEN, GoldenFile
from tests.tiers import tiered
from tests.tolerances import LOGITS_ATOL, LOSS_ATOL

FOLDERS = sorted(folder.name for folder in (GOLDEN / "models").iterdir() if folder.is_dir())


def decoder(name: str, **changes) -> Decoder:
    source = Shards(GOLDEN / "models" / name)
    config = ModelConfig.from_dict(source.config | changes, name)
    weights = load_weights(source, config, quantization=None, dtype="float32")
    return Decoder.from_weights(config, weights, "float32")


@pytest.mark.parametrize("name", FOLDERS)
def test_golden_model(name):
    model = decoder(name)
    inputs = {"input_ids", "attention_mask", "prompt"}
    with GoldenFile(GOLDEN / "models" / name / "io.npz", inputs=inputs) as golden:
        ids, mask = golden.input("input_ids"), golden.input("attention_mask")
        logits = model(ids.astype(np.int32), attention_mask=mask.astype(np.int32))
        golden.compare("logits", logits, atol=LOGITS_ATOL, where=mask)
        batch = {
            "input_ids": ids.astype(np.int32),
            "labels": np.where(mask, ids, -100).astype(np.int32),
            "segment_ids": mask.astype(np.int32),
        }
        total, count = batch_loss({}, model, batch)
        golden.compare("loss", total / count, atol=LOSS_ATOL)
        greedy = golden.arrays["greedy"]
        golden.compare_exact("greedy", continued(model, golden.input("prompt"), greedy.shape[1]))


def continued(model: Decoder, prompt: np.ndarray, length: int) -> np.ndarray:
    """Greedy decoding with a cache: token by token, those of the prompt too."""
    cache = KVCache.create(model.config, len(prompt), length, "float32")
    tokens = prompt
    for at in range(length - 1):
        logits, cache = model(tokens[:, at : at + 1].astype(np.int32), cache=cache)
        if at + 1 == tokens.shape[1]:
            tokens = np.concatenate([tokens, logits[:, -1:].argmax(-1)], axis=1)
    return tokens


@pytest.mark.fully_compiled
@pytest.mark.parametrize("name", tiered(["mistral", "gemma2", "gemma3"], ["gemma2"]))
def test_a_window_that_hides_nothing_costs_nothing(name):
    """A window as wide as the text is no window; one narrower by a token is one."""
    ids = np.arange(12, dtype=np.int32)[None]
    wide, whole, narrow = (
        decoder(name, sliding_window=w)(ids, attention_mask=np.ones_like(ids)) for w in (12, 99, 11)
    )
    np.testing.assert_array_equal(wide, whole)
    assert np.abs(narrow - wide)[:, -1].max() > LOGITS_ATOL
    np.testing.assert_allclose(narrow[:, :-1], wide[:, :-1], atol=LOGITS_ATOL)


def test_a_call_outside_of_jit_compiles_once_a_shape():
    model, ids = decoder("llama"), np.arange(26, dtype=np.int32)[None]
    first = model(ids)
    before = forward._cache_size()
    assert np.any(model(ids + 1) != first)
    assert forward._cache_size() == before
    model(ids[:, :13])
    assert forward._cache_size() == before + 1


def test_padding_on_the_right_does_not_reach_a_cache():
    model = decoder("llama")
    prompt = np.array([[5, 6, 7], [9, 8, 0]], np.int32)
    mask = np.array([[1, 1, 1], [1, 1, 0]], np.int32)
    cache = KVCache.create(model.config, 2, 8, "float32")
    _, cache = model(prompt, segment_ids=mask, cache=cache)
    assert cache.length.tolist() == [3, 2]
    logits, _ = model(np.array([[1], [1]], np.int32), cache=cache)
    alone = model(np.array([[9, 8, 1]], np.int32))
    np.testing.assert_allclose(logits[1, 0], alone[0, 2], atol=LOGITS_ATOL)
