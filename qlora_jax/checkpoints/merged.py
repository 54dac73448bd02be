"""Writes a dense model as a Hugging Face folder, one matrix in memory at a time."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from qlora_jax.checkpoints.finite import check_finite
from qlora_jax.checkpoints.names import hugging_face_names
from qlora_jax.checkpoints.write_shards import SHARD_BYTES, model_folder
from qlora_jax.errors import InputError, listed, nearest
from qlora_jax.models.config import ModelConfig
from qlora_jax.models.families import weight_shapes


def save_merged(
    model_config: ModelConfig,
    weights: Mapping[str, Any] | Iterable[tuple[str, Any]],
    config: Mapping[str, Any],
    out: str | Path,
    *,
    dtype: str = "bfloat16",
    shard_bytes: int = SHARD_BYTES,
    extra_files: Mapping[str, bytes | Path] | None = None,
) -> None:
    """Writes config.json, safetensors (with an index when large) and `extra_files`.

    Appears whole or not at all, and is read again and compared before it does; never overwrites.

    Args:
      model_config: gives the names and shapes that `weights` must have.
      weights: Hugging Face name -> array (out, in), or pairs of them made one at a time.
      config: config.json of the base model. Its quantization_config is left out; the dtype and
        tie_word_embeddings are those of what is written.
      out: a path where nothing is yet.
      dtype: what the weights are cast to.
      shard_bytes: more than this is split into shards with an index.
      extra_files: file name -> bytes, or the path of a file to copy: generation_config.json and
        the tokenizer's files.

    Raises:
      InputError: OUT-EXISTS, W-UNKNOWN, W-MISSING, W-DOUBLE, W-SHAPE, W-FINITE.
      StorageError: OUT-FULL, OUT-WRITE, OUT-VERIFY.
    """
    shapes = weight_shapes(model_config)
    names = hugging_face_names(shapes, model_config.num_hidden_layers)
    target = jnp.dtype(dtype)
    specs = {name: (target, tuple(shapes[stacked])) for name, stacked in names.items()}
    pairs = weights.items() if isinstance(weights, Mapping) else weights
    where, seen = str(out), set()
    config = dense_config(config, model_config, dtype)
    with model_folder(out, config, specs, extra_files or {}, shard_bytes) as writer:
        for name, array in pairs:
            check_name(name, specs, seen, where)
            if tuple(array.shape) != specs[name][1]:
                found = f"has the shape {tuple(array.shape)}"
                raise InputError("W-SHAPE", f"{where}: {name}", found, f"shape {specs[name][1]}")
            with np.errstate(over="ignore"):  # float16's range: reported as not finite
                array = np.asarray(array).astype(target, copy=False)
            check_finite(array, where, name)
            writer.write(name, array)
            seen.add(name)
            del array  # before the one behind the next is made
        if missing := specs.keys() - seen:
            raise InputError("W-MISSING", where, f"missing weights: {listed(sorted(missing))}")


def check_name(name: str, expected: Mapping[str, Any], seen: set[str], where: str) -> None:
    """Every weight of the model, once."""
    if name not in expected:
        close = nearest(name, expected)
        hint = f"the name {close[0]}" if close else ""
        raise InputError(
            "W-UNKNOWN", where, f"unknown weight {name}", "a weight of the model", hint
        )
    if name in seen:
        raise InputError("W-DOUBLE", where, f"doubled weight {name}", "each weight once")


def dense_config(
    config: Mapping[str, Any], model_config: ModelConfig, dtype: str
) -> dict[str, Any]:
    """config.json of the dense model; the dtype under transformers 5's key, and no older one."""
    left_out = ("quantization_config", "torch_dtype")
    config = {key: value for key, value in config.items() if key not in left_out}
    return {**config, "dtype": dtype, "tie_word_embeddings": model_config.tie_word_embeddings}
