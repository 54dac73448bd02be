"""A base is known again by its weights, however its codes are ordered."""

import numpy as np
import pytest

from qlora_jax.checkpoints.load import load_weights
from qlora_jax.checkpoints.shards import Shards
from qlora_jax.models import Decoder, ModelConfig
from qlora_jax.models.fingerprint import fingerprint
from qlora_jax.quantization.policy import QuantizationConfig
from qlora_jax.weight_names import LAYERS
from tests.golden_data import golden_folder


def opened(layout: str = "bnb", dtype: str = "float32", **how) -> Decoder:
    with Shards(golden_folder("models/llama")) as source:
        config = ModelConfig.from_dict(source.config)
        policy = QuantizationConfig(**how)
        weights = load_weights(source, config, policy, dtype=dtype, layout=layout)
    return Decoder.from_weights(config, weights, dtype)


@pytest.fixture(scope="module")
def model() -> Decoder:
    return opened()


def test_codes_count_in_bitsandbytes_order(model):
    halves = opened("halves")
    assert halves.weights()[f"{LAYERS}mlp.up_proj.weight"].layout == "halves"
    assert fingerprint(halves) == fingerprint(model)


@pytest.mark.parametrize("how", [{"kind": "fp4"}, {"double_quant": False}, {"dtype": "bfloat16"}])
def test_another_base_has_another(model, how):
    assert fingerprint(opened(**how)) != fingerprint(model)


@pytest.mark.parametrize("at", [(0, 0), (-1, -1)])
def test_one_weight_of_the_first_and_of_the_last_layer_counts(model, at):
    weights, name = model.weights(), f"{LAYERS}input_layernorm.weight"
    changed = np.array(weights[name])
    changed[at] += 1
    other = Decoder.from_weights(model.config, {**weights, name: changed}, "float32")
    assert fingerprint(other) != fingerprint(model)
