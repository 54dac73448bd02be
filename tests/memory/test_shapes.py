"""Shapes are what loading a model makes, leaf by leaf."""

import jax
import jax.numpy as jnp
import pytest

from qlora_jax.adapters.init import init_adapter
from qlora_jax.adapters.spec import make_spec
from qlora_jax.memory.shapes import adapter_shapes, batch_shapes, decoder, nbytes, weights_of
from qlora_jax.models.config import ModelConfig
from qlora_jax.models.decoder import Decoder
from qlora_jax.models.families import module_shapes, weight_shapes
from qlora_jax.quantization.policy import QuantizationConfig
from qlora_jax.quantization.tensor import quantize
from qlora_jax.weight_names import LAYERS

CONFIG = ModelConfig.from_dict(
    {
        "model_type": "qwen3",
        "vocab_size": 100,
        "hidden_size": 64,
        "intermediate_size": 96,  # no multiple of the block: flat codes
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
    }
)


def loaded(how: QuantizationConfig | None, dtype: str) -> Decoder:
    """A decoder out of zeros, as loading makes it."""

    def weight(name, shape):
        lead = (CONFIG.num_hidden_layers,) if name.startswith(LAYERS) else ()
        dense = jnp.zeros((*lead, *shape), dtype)
        if how is None or not how.covers(name):
            return dense

        def one(matrix):
            return quantize(
                matrix,
                kind=how.kind,
                block_size=how.block_size,
                double_quant=how.double_quant,
            )

        return jax.vmap(one)(dense) if lead else one(dense)

    weights = {name: weight(name, shape) for name, shape in weight_shapes(CONFIG).items()}
    return Decoder.from_weights(CONFIG, weights, dtype)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(
    "how",
    [
        None,
        QuantizationConfig(),
        QuantizationConfig("fp4", 128, False, True),
    ],
)
def test_a_model_is_what_loading_makes(how, dtype):
    real = jax.eval_shape(lambda: loaded(how, dtype))
    found = decoder(CONFIG, weights_of(CONFIG, how, dtype), dtype)
    assert jax.tree.structure(found) == jax.tree.structure(real)
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(real), strict=True)
    assert [(a.shape, a.dtype) for a, _ in pairs] == [
        (leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(real)
    ]


def test_an_adapter_is_what_training_begins_with():
    spec = make_spec(module_shapes(CONFIG), 3, r=4, use_dora=True, modules_to_save=["lm_head"])
    model = loaded(QuantizationConfig(), "bfloat16")
    real = init_adapter(model, spec, jax.random.key(0)).params
    found = adapter_shapes(spec, CONFIG)
    assert jax.tree.structure(found) == jax.tree.structure(real)
    assert nbytes(found) == nbytes(real)
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(real), strict=True)
    assert all((a.shape, a.dtype) == (b.shape, b.dtype) for a, b in pairs)


def test_a_batch_has_four_arrays_of_its_size():
    assert nbytes(batch_shapes(2, 8)) == 4 * 2 * 8 * 4
