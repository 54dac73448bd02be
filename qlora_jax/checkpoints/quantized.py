"""Writes a 4-bit model as a folder that transformers opens: quantized once, opened in seconds."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qlora_jax.checkpoints.bnb4bit import QuantState, packed_arrays, packed_specs, state_key
from qlora_jax.checkpoints.safetensors_header import Spec
from qlora_jax.checkpoints.write_shards import SHARD_BYTES, Content, model_folder
from qlora_jax.errors import InputError
from qlora_jax.quantization.tensor import QuantizedTensor
from qlora_jax.weight_names import EMBEDDINGS, HEAD

# Of quantization_config: what the tensors themselves say, whatever a source's config.json does.
WRITTEN = ("bnb_4bit_quant_storage", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant")


def save_quantized(
    plan: Mapping[str, QuantState | Spec],
    weights: Iterable[tuple[str, np.ndarray | QuantizedTensor]],
    config: Mapping[str, Any],
    out: str | Path,
    *,
    extra_files: Mapping[str, Content] | None = None,
    shard_bytes: int = SHARD_BYTES,
    finish: Callable[[Path], None] | None = None,
) -> None:
    """Writes weights, 4-bit and dense, in bitsandbytes' serialized format; never overwrites.

    Appears whole or not at all, and is read again and compared before it does. One weight is in
    memory at a time.

    transformers opens nf4 and fp4 in any block size, since each weight's own JSON names it; but
    where blocks do not fill the rows, bitsandbytes 0.50 on a CPU dequantizes wrongly or fails.
    int4 is a kind of ours, which transformers refuses.

    Args:
      plan: Hugging Face name -> what the weight becomes: `Loader.plan`.
      weights: (name, weight) of each, made one at a time, with NumPy leaves: `Loader.weights`.
      config: config.json of the model; quantization_config is added as transformers has it, or
        kept as the source had it but for WRITTEN.
      out: a path where nothing is yet.
      extra_files: as for `model_folder`: the tokenizer's, for instance.
      shard_bytes: more than this is split into shards with an index.
      finish: called with the verified folder before it appears: what it adds appears with it.

    Raises:
      InputError: OUT-EXISTS; W4-MIXED when the weights do not share kind and double quantization.
      StorageError: OUT-FULL, OUT-WRITE, OUT-VERIFY.
    """
    states = {name: how for name, how in plan.items() if isinstance(how, QuantState)}
    specs: dict[str, Spec] = {}
    for name, how in plan.items():
        specs |= packed_specs(name, how) if name in states else {name: how}
    open_ended = [state_key(name, state) for name, state in states.items() if state.unknown]
    dense = plan[EMBEDDINGS][0].name
    found = quantization_config(states, dense)
    told = {**found, **(config.get("quantization_config") or {})}
    told |= {key: found[key] for key in WRITTEN}
    config = {**config, "dtype": dense, "quantization_config": told}
    config.pop("torch_dtype", None)
    extra = extra_files or {}
    with model_folder(out, config, specs, extra, shard_bytes, open_ended, finish) as writer:
        for name, weight in weights:
            arrays = packed_arrays(name, weight) if name in states else {name: weight}
            for key, array in arrays.items():
                writer.write(key, array)
            del weight, arrays, array  # before the one behind the next is read


def quantization_config(states: Mapping[str, QuantState], compute_dtype: str) -> dict[str, Any]:
    """config.json's `quantization_config`, with the keys and defaults of transformers 5."""
    kinds = {(state.kind, state.offset is not None) for state in states.values()}
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
        "llm_int8_skip_modules": [] if HEAD in states else None,
        "llm_int8_threshold": 6.0,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "quant_method": "bitsandbytes",
    }
