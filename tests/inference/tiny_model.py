"""A random decoder with the vocabulary of the small byte tokenizer."""

import jax.numpy as jnp
import numpy as np

from qlora_jax.models import Decoder, ModelConfig
from qlora_jax.models.families import weight_shapes

CONFIG = {
    "model_type": "llama",
    "vocab_size": 265,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 600,
}


def tiny_model(seed: int = 0, **changes) -> Decoder:
    """Weights of a size that makes greedy text varied; the same for the same seed."""
    config = ModelConfig.from_dict(CONFIG | changes)
    rng = np.random.default_rng(seed)
    weights = {}
    for name, shape in weight_shapes(config).items():
        lead = (config.num_hidden_layers,) if name.startswith("model.layers.") else ()
        weights[name] = jnp.asarray(rng.normal(0, 0.3, lead + shape), jnp.float32)
    return Decoder.from_weights(config, weights, "float32")
