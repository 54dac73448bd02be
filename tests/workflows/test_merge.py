"""ql.merge: a dense model that answers as base + adapter; the base stays as it was."""

import json
from itertools import product

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from qlora_jax.errors import InputError
from qlora_jax.quantization.tensor import QuantizedTensor
from qlora_jax.workflows.checked_merge import checked_merge
from qlora_jax.workflows.merge import merge
from qlora_jax.workflows.open import load_model, open_source
from tests.golden_data import golden_folder
from tests.tiers import tiered
from tests.tolerances import LOGITS_ATOL
from tests.trained import opened, trained

ALL = {"use_dora": True, "modules_to_save": ["lm_head", "embed_tokens"]}
TIED = {"lm_head": {"modules_to_save": ["lm_head"]}, "embed": {"modules_to_save": ["embed_tokens"]}}
IDS = np.arange(48, dtype=np.int32).reshape(2, 24)


@pytest.fixture(scope="module")
def base():
    return opened("llama")


@pytest.fixture(scope="module")
def lora(base):
    return trained(base)


@pytest.mark.parametrize(
    ("family", "settings"),
    tiered(
        [("llama", {}), ("llama_tied", {}), ("llama_tied", ALL), ("gemma2", ALL)],
        [("llama_tied", ALL)],
    ),
    ids=lambda value: value if isinstance(value, str) else "all" if value else "plain",
)
def test_merged_answers_as_base_and_adapter(family, settings):
    base = opened(family)
    lora = trained(base, **settings)
    before = jax.tree.map(np.array, base.weights())
    dense = merge(base, lora)
    assert not any(isinstance(w, QuantizedTensor) for w in dense.weights().values())
    expected = base(IDS, adapter=lora)
    np.testing.assert_allclose(dense(IDS), expected, atol=LOGITS_ATOL)
    assert np.abs(expected - base(IDS)).max() > 100 * LOGITS_ATOL
    same = jax.tree.map(np.array_equal, before, base.weights())
    assert all(jax.tree.leaves(same))


@pytest.mark.parametrize(
    ("kind", "which"),
    tiered(
        product(TIED, ["dequantized", "original"]),
        [("lm_head", "original"), ("embed", "dequantized")],
    ),
)
def test_a_saved_module_unties_the_merged_model(tmp_path, kind, which):
    base, folder = opened("llama_tied"), golden_folder("models/llama_tied")
    lora = trained(base, **TIED[kind])
    with open_source(folder) as source:
        assert source.config["tie_word_embeddings"]
        checked_merge(
            base,
            lora,
            tmp_path / "out",
            config=source.config,
            base=which,
            source=source if which == "original" else None,
            dtype="float32",
            tolerance=LOGITS_ATOL,
        )
        embedding = source.read("model.embed_tokens.weight")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert (
        json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    )
    saved = {"lm_head": "lm_head.weight", "embed": "model.embed_tokens.weight"}[kind]
    (left,) = {"lm_head.weight", "model.embed_tokens.weight"} - {saved}
    (name,) = lora.spec.modules_to_save
    np.testing.assert_array_equal(written[saved], lora.params[name]["weight"])
    np.testing.assert_array_equal(written[left], embedding)


def test_the_original_base_is_read_from_its_source(base, lora):
    with open_source(golden_folder("models/llama")) as source:
        dense = merge(base, lora, base="original", source=source)
        original = load_model(source, quantization=None, dtype="float32")
    ids = np.arange(24, dtype=np.int32)[None]
    np.testing.assert_allclose(dense(ids), original(ids, adapter=lora), atol=LOGITS_ATOL)


def test_the_original_base_needs_its_source(base, lora):
    with pytest.raises(InputError, match="original"):
        merge(base, lora, base="original")


def test_a_4bit_folder_is_no_source_of_original_weights(base, lora):
    with (
        open_source(golden_folder("bnb_state") / "checkpoint") as source,
        pytest.raises(InputError, match=r"MERGE-ORIGINAL.*the original weights are not in it"),
    ):
        merge(base, lora, base="original", source=source)
