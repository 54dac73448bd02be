"""A GGUF file's metadata as config.json's content.

Only known keys are read: an unknown one of the architecture may change the mathematics, so it is
refused, not skipped.
"""

import math
from typing import Any

import numpy as np

from qlora_jax.checkpoints.gguf_names import ARCHITECTURES, ROPE_FREQUENCIES
from qlora_jax.errors import InputError, listed

REQUIRED = object()
MAX_SIZE = 1 << 31
LLAMA3_RULE = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

# Metadata keys, without the architecture's prefix, whose meaning is taken over or has been checked.
KNOWN_KEYS = (
    "vocab_size", "context_length", "embedding_length", "block_count", "feed_forward_length",
    "attention.head_count", "attention.head_count_kv", "attention.key_length",
    "attention.value_length", "attention.layer_norm_rms_epsilon", "rope.dimension_count",
    "rope.freq_base", "rope.scaling.type", "rope.scaling.factor", "rope.scaling.finetuned",
    "rope.scaling.original_context_length", "expert_count", "expert_used_count",
    "tensor_data_layout",
)  # fmt: skip


class Keys:
    """A GGUF's metadata, asked by key and declared type."""

    def __init__(self, metadata: dict[str, Any], where: str):
        self.metadata, self.where = metadata, where
        self.architecture = self.get("general.architecture", str)
        if self.architecture not in ARCHITECTURES:
            raise InputError(
                "GG-ARCH",
                where,
                f"unknown architecture {self.architecture!r}",
                f"one of: {listed(ARCHITECTURES)}",
                "a safetensors folder of the same model",
            )

    def get(self, key: str, kind: type, default: Any = REQUIRED) -> Any:
        """The value of `key`, of exactly the Python type `kind`; a leading dot is the family's."""
        key = self.architecture + key if key.startswith(".") else key
        value = self.metadata.get(key, default)
        if value is REQUIRED:
            raise InputError("GG-META", self.where, f"metadata key {key} is missing")
        if value is not default and type(value) is not kind:
            found = f"{key} is {type(value).__name__} {str(value)[:80]}"
            raise InputError("GG-META", self.where, found, kind.__name__)
        return value

    def size(self, key: str, default: Any = REQUIRED) -> int:
        value = self.get(key, int, default)
        if value is not None and not 0 < value < MAX_SIZE:
            raise InputError("GG-META", self.where, f"{key} is {value}", f"1 to {MAX_SIZE - 1}")
        return value

    def positive(self, key: str, default: float | object = REQUIRED) -> float:
        value = self.get(key, float, default)
        if not (math.isfinite(value) and value > 0):
            raise InputError("GG-META", self.where, f"{key} is {value}", "finite and above 0")
        return float(str(np.float32(value)))  # 1e-05 was meant, not 9.999999747378752e-06


def hugging_face_config(
    metadata: dict[str, Any], tied: bool, rope_factors: np.ndarray | None, where: str
) -> dict[str, Any]:
    """config.json's content for a GGUF file.

    Args:
      metadata: the file's metadata.
      tied: whether the file has no `output.weight`.
      rope_factors: `rope_freqs.weight`, float32 (head_dim / 2,), or None.

    Raises:
      InputError: GG-ARCH, GG-META (missing, of another type or out of range), GG-VOCAB, GG-ROPE.
    """
    keys = Keys(metadata, where)
    row = ARCHITECTURES[keys.architecture]
    prefix = keys.architecture + "."
    strange = [k for k in metadata if k.startswith(prefix) and k[len(prefix) :] not in KNOWN_KEYS]
    if strange or keys.get(".expert_count", int, 0):
        found = f"needs what is not read: {listed(strange) or 'mixture of experts'}"
        raise InputError("GG-META", where, found, f"a plain {keys.architecture} model")

    hidden, heads = keys.size(".embedding_length"), keys.size(".attention.head_count")
    kv_heads = keys.size(".attention.head_count_kv", heads)
    head_dim = keys.size(".attention.key_length", hidden // heads or None)
    for key in (".attention.value_length", ".rope.dimension_count"):
        if keys.size(key, head_dim) != head_dim:
            found = f"{keys.architecture}{key} is {keys.size(key)}"
            raise InputError("GG-META", where, found, f"the head size {head_dim}")
    if head_dim is None or head_dim % 2 or heads % kv_heads:
        found = f"{hidden} wide, {heads} heads, {kv_heads} key/value heads of {head_dim}"
        raise InputError("GG-META", where, found, "an even head size, heads that share evenly")

    vocabulary = vocabulary_size(keys)
    config = {
        "architectures": [row.model_class],
        "attention_bias": False,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": keys.size(".feed_forward_length"),
        "max_position_embeddings": keys.size(".context_length"),
        "mlp_bias": False,
        "model_type": row.model_type,
        "num_attention_heads": heads,
        "num_hidden_layers": keys.size(".block_count"),
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": keys.positive(".attention.layer_norm_rms_epsilon"),
        "rope_parameters": rope_parameters(keys, head_dim, rope_factors),
        "tie_word_embeddings": tied,
        "vocab_size": vocabulary,
    }
    for field, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        token = keys.get(f"tokenizer.ggml.{key}_token_id", int, None)
        if token is not None and not 0 <= token < vocabulary:
            found = f"{field} token id {token}"
            raise InputError("GG-VOCAB", where, found, f"0 to {vocabulary - 1}")
        if token is not None:
            config[f"{field}_token_id"] = token
    return config


def vocabulary_size(keys: Keys) -> int:
    """Tokens in the vocabulary; the shape of the embedding is checked against it later."""
    tokens = keys.get("tokenizer.ggml.tokens", list, None)
    size = keys.size(".vocab_size", len(tokens) if tokens else REQUIRED)
    if tokens is not None and len(tokens) != size:
        found = f"has {len(tokens)} tokens, {keys.architecture}.vocab_size is {size}"
        raise InputError("GG-VOCAB", keys.where, found, "the same number")
    return size


def rope_parameters(keys: Keys, head_dim: int, factors: np.ndarray | None) -> dict[str, Any]:
    """Hugging Face's rotary rule, taken back from Llama 3's frequency factors if need be."""
    theta = keys.positive(".rope.freq_base", 10000.0)
    scaling = keys.get(".rope.scaling.type", str, "none")
    if scaling not in ("none", "linear") or (factors is not None and scaling != "none"):
        raise InputError(
            "GG-ROPE", keys.where, f"rope scaling {scaling!r} is not read", "none or linear"
        )
    if scaling == "linear":
        factor = keys.positive(".rope.scaling.factor")
        return {"rope_type": "linear", "rope_theta": theta, "factor": factor}
    if factors is None:
        return {"rope_type": "default", "rope_theta": theta}
    rule = {"factor": float(factors.max()), **LLAMA3_RULE}
    expected = llama3_factors(theta, head_dim, **rule)
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-4, atol=0):
        found = f"{ROPE_FREQUENCIES} does not follow Llama 3's rule with {rule}"
        raise InputError("GG-ROPE", keys.where, found)
    return {"rope_type": "llama3", "rope_theta": theta, **rule}


def llama3_factors(
    theta: float,
    head_dim: int,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_max_position_embeddings: int,
) -> np.ndarray:
    """What Llama 3 divides each rotary frequency by: 1 for fast ones, `factor` for slow ones.

    Returns:
      float64 (head_dim / 2,). Source: llama.cpp's convert_hf_to_gguf.py, which stores these.
    """
    frequencies = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    turns = original_max_position_embeddings * frequencies / (2 * np.pi)
    smooth = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor)
    return 1 / np.interp(smooth, [0, 1], [1 / factor, 1])
