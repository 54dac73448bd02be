"""ql.merge: a dense model that answers as base + adapter; the base stays as it was."""

import jax
import numpy as np
import pytest

from qlora_jax.adapters.adapter import Adapter
from qlora_jax.adapters.init import init_lora
from qlora_jax.errors import InputError
from qlora_jax.quantization.policy import QuantizationConfig
from qlora_jax.quantization.tensor import QuantizedTensor
from qlora_jax.workflows.merge import merge
from qlora_jax.workflows.open import load_model, open_source
from tests.golden_data import golden_folder
from tests.tolerances import LOGITS_ATOL


@pytest.fixture(scope="module")
def base():
    with open_source(golden_folder("models/llama")) as source:
        return load_model(source, quantization=QuantizationConfig(), dtype="float32")


@pytest.fixture(scope="module")
def lora(base):
    fresh = init_lora(base, r=4, alpha=8, key=jax.random.key(0))
    params = jax.tree.map(
        lambda a: jax.random.normal(jax.random.key(1), a.shape) / 20, fresh.params
    )
    return Adapter(params, fresh.spec)


def test_merged_answers_as_base_and_adapter(base, lora):
    ids = np.arange(48, dtype=np.int32).reshape(2, 24)
    before = jax.tree.map(np.array, base.weights())
    dense = merge(base, lora)
    assert not any(isinstance(w, QuantizedTensor) for w in dense.weights().values())
    expected = base(ids, adapter=lora)
    np.testing.assert_allclose(dense(ids), expected, atol=LOGITS_ATOL)
    assert np.abs(expected - base(ids)).max() > 100 * LOGITS_ATOL
    same = jax.tree.map(np.array_equal, before, base.weights())
    assert all(jax.tree.leaves(same))


def test_the_original_base_is_read_from_its_source(base, lora):
    with open_source(golden_folder("models/llama")) as source:
        dense = merge(base, lora, base="original", source=source)
        original = load_model(source, quantization=None, dtype="float32")
    ids = np.arange(24, dtype=np.int32)[None]
    np.testing.assert_allclose(dense(ids), original(ids, adapter=lora), atol=LOGITS_ATOL)


def test_the_original_base_needs_its_source(base, lora):
    with pytest.raises(InputError, match="original"):
        merge(base, lora, base="original")
