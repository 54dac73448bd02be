"""A model of any shape with random weights, where only memory and time are measured."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from qlora_jax.checkpoints.merged import save_merged
from qlora_jax.checkpoints.names import hugging_face_names
from qlora_jax.models import ModelConfig
from qlora_jax.models.families import weight_shapes

SHARD_BYTES = 1_000_000_000
# What config.json says of models that users know.
SHAPES = {
    "SmolLM2-360M": {
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 960,
        "intermediate_size": 2560,
        "num_hidden_layers": 32,
        "num_attention_heads": 15,
        "num_key_value_heads": 5,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    "Qwen2.5-0.5B": {
        "model_type": "qwen2",
        "vocab_size": 151936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": True,
    },
    "Qwen3-0.6B": {
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": True,
    },
    "Llama-3.2-1B": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": True,
    },
}


def write(
    config: dict[str, Any], folder: Path, extra_files: Mapping[str, bytes | Path] | None = None
) -> None:
    """A bfloat16 folder.

    Args:
      config: as config.json has it.
      folder: where nothing is yet.
      extra_files: a tokenizer's.
    """
    random = np.random.default_rng(0)
    noise = (0.02 * random.standard_normal(1 << 22, np.float32)).astype(ml_dtypes.bfloat16)
    known = ModelConfig.from_dict(config)
    shapes = weight_shapes(known)

    def weights() -> Iterator[tuple[str, Any]]:
        for name, stacked in hugging_face_names(shapes, known.num_hidden_layers).items():
            shape = shapes[stacked]
            begin = int(random.integers(len(noise)))
            yield name, np.resize(np.roll(noise, begin), math.prod(shape)).reshape(shape)

    save_merged(known, weights(), config, folder, shard_bytes=SHARD_BYTES, extra_files=extra_files)
