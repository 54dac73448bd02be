"""Writes a 4-bit model as a folder that transformers opens: quantized once, opened in seconds."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from qlora_jax.checkpoints.bnb4bit import packed_arrays, packed_specs, states_of
from qlora_jax.checkpoints.names import LAYERS, layer_names
from qlora_jax.checkpoints.write_shards import SHARD_BYTES, model_folder
from qlora_jax.errors import InputError
from qlora_jax.quantization.tensor import QuantizedTensor

EMBEDDINGS = "model.embed_tokens.weight"


def save_quantized(
    weights: Mapping[str, Any],
    config: Mapping[str, Any],
    out: str | Path,
    *,
    extra_files: Mapping[str, bytes | Path] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes weights, 4-bit and dense, in bitsandbytes' serialized format; never overwrites.

    Appears whole or not at all, and is read again and compared before it does. One stacked weight
    is on the host at a time.

    Args:
      weights: stacked name -> array or QuantizedTensor, leading axis L where there are layers;
        dense arrays are written in their own dtype.
      config: config.json of the dense model; quantization_config is added as transformers has it.
      out: a path where nothing is yet.
      extra_files: file name -> bytes, or the path of a file to copy: the tokenizer's, for instance.
      shard_bytes: more than this is split into shards with an index.

    Raises:
      InputError: OUT-EXISTS; W4-MIXED when the weights do not share kind and double quantization.
      StorageError: OUT-FULL, OUT-WRITE, OUT-VERIFY.
    """
    layers = config["num_hidden_layers"]
    specs, states = {}, {}
    for stacked, weight in weights.items():
        names = layer_names(stacked, layers)
        if isinstance(weight, QuantizedTensor):
            states[stacked] = states_of(weight, len(names))
            for name, state in zip(names, states[stacked], strict=True):
                specs |= packed_specs(name, state)
        else:
            shape = weight.shape[1:] if stacked.startswith(LAYERS) else weight.shape
            specs |= dict.fromkeys(names, (np.dtype(weight.dtype), tuple(shape)))
    dense = np.dtype(weights[EMBEDDINGS].dtype).name
    config = {**config, "dtype": dense, "quantization_config": quantization_config(states, dense)}
    config.pop("torch_dtype", None)
    with model_folder(out, config, specs, extra_files or {}, shard_bytes) as writer:
        for stacked, weight in weights.items():
            names = layer_names(stacked, layers)
            layered = stacked.startswith(LAYERS)
            weight = jax.tree.map(np.asarray, weight)
            if isinstance(weight, QuantizedTensor):
                weight = weight.unpack()  # in NumPy: nothing to compile
            for i, name in enumerate(names):
                one = jax.tree.map(lambda leaf, i=i: leaf[i], weight) if layered else weight
                arrays = {name: one}
                if stacked in states:
                    arrays = packed_arrays(name, states[stacked][i], one)
                for key, array in arrays.items():
                    writer.write(key, array)


def quantization_config(states: Mapping[str, list], compute_dtype: str) -> dict[str, Any]:
    """config.json's `quantization_config`, with the keys and defaults of transformers 5."""
    kinds = {(s.kind, s.offset is not None) for of_layers in states.values() for s in of_layers}
    if len(kinds) != 1:
        found = f"{len(kinds)} kinds of 4-bit weights: {sorted(kinds)}"
        raise InputError("W4-MIXED", "weights", found, "one kind", "quantize all in one way")
    ((kind, nested),) = kinds
    return {
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "bnb_4bit_compute_dtype": compute_dtype,
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": kind,
        "bnb_4bit_use_double_quant": nested,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        # transformers keeps lm_head dense unless this list says otherwise
        "llm_int8_skip_modules": [] if "lm_head.weight" in states else None,
        "llm_int8_threshold": 6.0,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "quant_method": "bitsandbytes",
    }
