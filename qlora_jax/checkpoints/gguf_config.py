"""A GGUF file's metadata as config.json's content.

Only known keys are read: an unknown one of the architecture may change the mathematics, so it is
refused, not skipped.
"""

import math
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from qlora_jax.checkpoints.gguf_names import ARCHITECTURES
from qlora_jax.checkpoints.gguf_rope import rope_parameters, shortest
from qlora_jax.errors import InputError, listed
from qlora_jax.models.families import FAMILIES
from qlora_jax.weight_names import HEAD

REQUIRED = object()
MAX_SIZE = 1 << 31

# Metadata keys, without the architecture's prefix, whose meaning is taken over or has been checked.
KNOWN_KEYS = (
    "vocab_size", "context_length", "embedding_length", "block_count", "feed_forward_length",
    "attention.head_count", "attention.head_count_kv", "attention.key_length",
    "attention.value_length", "attention.layer_norm_rms_epsilon", "attention.causal",
    "rope.dimension_count", "rope.freq_base", "rope.scaling.type", "rope.scaling.factor",
    "rope.scaling.finetuned", "rope.scaling.original_context_length",
    "rope.scaling.yarn_ext_factor", "rope.scaling.yarn_attn_factor",
    "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow", "expert_count",
    "expert_used_count", "tensor_data_layout",
)  # fmt: skip
OWN_KEYS = {
    "gemma2": ("attention.sliding_window", "attn_logit_softcapping", "final_logit_softcapping"),
    "gemma3": ("attention.sliding_window", "final_logit_softcapping", "rope.freq_base_swa"),
    "phi3": ("attention.sliding_window", "rope.scaling.attn_factor"),
}
# What llama.cpp takes for Gemma 2 where an old file does not say.
GEMMA2_WINDOW, GEMMA2_SCORES_CAP, GEMMA2_LOGITS_CAP = 4096, 50.0, 30.0
# Layers of the 27B models: llama.cpp scales scores by hidden_size / heads there, not by head_dim.
LARGE_GEMMA = {"gemma2": 46, "gemma3": 62}
QUERY, GATE = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.gate_proj"


class Keys:
    """A GGUF's metadata, asked by key and declared type."""

    def __init__(self, metadata: dict[str, Any], where: str):
        self.metadata, self.where = metadata, where
        self.architecture = self.get("general.architecture", str)
        if self.architecture not in ARCHITECTURES:
            raise InputError(
                "GG-ARCH",
                where,
                f"unknown architecture {self.architecture!r:.80}",
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

    def count(self, key: str) -> int | None:
        """A number that 0, or no key at all, says is none."""
        return None if self.get(key, int, 0) == 0 else self.size(key)

    def positive(self, key: str, default: Any = REQUIRED) -> Any:
        value = self.get(key, float, default)
        if value is None:
            return None
        if not (math.isfinite(value) and value > 0):
            raise InputError("GG-META", self.where, f"{key} is {value}", "finite and above 0")
        return shortest(value)


def refuse_what_is_no_model(keys: Keys) -> None:
    """An adapter, or one file of several, has a model's architecture too.

    Raises:
      InputError: GG-KIND, GG-SPLIT.
    """
    kind = keys.get("general.type", str, "model")
    if kind != "model":
        raise InputError("GG-KIND", keys.where, f"is of the kind {kind!r:.80}", "a model")
    parts = keys.get("split.count", int, 1)
    if parts > 1:
        found = f"is one of {parts} files of a split model"
        hint = "llama.cpp's llama-gguf-split --merge FIRST_FILE ONE_FILE"
        raise InputError("GG-SPLIT", keys.where, found, "a model in one file", hint)


def hugging_face_config(
    metadata: dict[str, Any],
    weights: Collection[str],
    rope_factors: Mapping[str, np.ndarray],
    where: str,
) -> dict[str, Any]:
    """config.json's content for a GGUF file.

    Args:
      metadata: the file's metadata.
      weights: Hugging Face's names of all weights, which tell biases and a head of its own.
      rope_factors: the file's tensors of rotary factors by GGUF name, float32 (pairs,).

    Raises:
      InputError: GG-ARCH, GG-META (missing, of another type or out of range), GG-VOCAB, GG-ROPE.
    """
    keys = Keys(metadata, where)
    refuse_unknown_keys(keys)
    row = ARCHITECTURES[keys.architecture]
    hidden, heads = keys.size(".embedding_length"), keys.size(".attention.head_count")
    kv_heads = keys.size(".attention.head_count_kv", heads)
    head_dim = head_size(keys, hidden, heads, kv_heads)
    longest = keys.size(".context_length")
    config = {
        "architectures": [row.model_class],
        "head_dim": head_dim,
        "hidden_size": hidden,
        "intermediate_size": keys.size(".feed_forward_length"),
        "max_position_embeddings": longest,
        "model_type": row.model_type,
        "num_attention_heads": heads,
        "num_hidden_layers": keys.size(".block_count"),
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": keys.positive(".attention.layer_norm_rms_epsilon"),
        "rope_parameters": rope_parameters(keys, head_dim, longest, rope_factors),
        "tie_word_embeddings": HEAD not in weights,
        "vocab_size": vocabulary_size(keys),
    }
    options = FAMILIES[row.model_type].options
    if "attention_bias" in options:
        config["attention_bias"] = f"{QUERY}.bias" in weights
    if "mlp_bias" in options:
        config["mlp_bias"] = f"{GATE}.bias" in weights
    own = {"phi3": phi3, "gemma2": gemma, "gemma3": gemma}.get(keys.architecture)
    own_fields = {"hidden_act": "silu"} if own is None else own(keys, config)
    return config | own_fields | special_tokens(keys, config["vocab_size"])


def refuse_unknown_keys(keys: Keys) -> None:
    """Refuses keys of the architecture that may change the mathematics."""
    prefix = keys.architecture + "."
    known = {*KNOWN_KEYS, *OWN_KEYS.get(keys.architecture, ())}
    own = [key for key in keys.metadata if key.startswith(prefix)]
    strange = [key for key in own if key.removeprefix(prefix) not in known]
    if keys.get(".expert_count", int, 0):
        strange.append("mixture of experts")
    if not keys.get(".attention.causal", bool, True):
        strange.append("attention to later tokens")
    if strange:
        found = f"needs what is not read: {listed(strange)}"
        raise InputError("GG-META", keys.where, found, f"a plain {keys.architecture} model")


def head_size(keys: Keys, hidden: int, heads: int, kv_heads: int) -> int:
    """Channels of a head, of which all rotate but in Phi 3."""
    head_dim = keys.size(".attention.key_length", hidden // heads or None)
    equal = [".attention.value_length"]
    if keys.architecture != "phi3":
        equal.append(".rope.dimension_count")
    for key in equal:
        if keys.size(key, head_dim) != head_dim:
            found = f"{keys.architecture}{key} is {keys.size(key)}"
            raise InputError("GG-META", keys.where, found, f"the head size {head_dim}")
    if head_dim is None or head_dim % 2 or heads % kv_heads:
        found = f"{hidden} wide, {heads} heads, {kv_heads} key/value heads of {head_dim}"
        expected = "an even head size, heads that share evenly"
        raise InputError("GG-META", keys.where, found, expected)
    return head_dim


def phi3(keys: Keys, config: dict[str, Any]) -> dict[str, Any]:
    """A window that llama.cpp passes over, and heads of which a part rotates."""
    head_dim, longest = config["head_dim"], config["max_position_embeddings"]
    rotated = keys.size(".rope.dimension_count", head_dim)
    return {
        "hidden_act": "silu",
        "original_max_position_embeddings": keys.size(
            ".rope.scaling.original_context_length", longest
        ),
        "rope_parameters": config["rope_parameters"]
        | {"partial_rotary_factor": rotated / head_dim},
        "sliding_window": keys.count(".attention.sliding_window"),
    }


def gemma(keys: Keys, config: dict[str, Any]) -> dict[str, Any]:
    """Windows in all layers but each n-th, soft caps, and what GGUF leaves to llama.cpp."""
    layers, width = config["num_hidden_layers"], config["head_dim"]
    if layers == LARGE_GEMMA[keys.architecture]:
        width = config["hidden_size"] // config["num_attention_heads"]
    fields: dict[str, Any] = {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": width,
    }
    if keys.architecture == "gemma2":
        window = keys.size(".attention.sliding_window", GEMMA2_WINDOW)
        scores_cap = keys.positive(".attn_logit_softcapping", GEMMA2_SCORES_CAP)
        logits_cap = keys.positive(".final_logit_softcapping", GEMMA2_LOGITS_CAP)
    else:
        window, scores_cap = keys.count(".attention.sliding_window"), None
        logits_cap = keys.positive(".final_logit_softcapping", None)
        local = keys.positive(".rope.freq_base_swa", 10000.0)
        fields["rope_parameters"] = {
            "full_attention": config["rope_parameters"],
            "sliding_attention": {"rope_type": "default", "rope_theta": local},
        }
    pattern = FAMILIES[config["model_type"]].window_pattern
    kinds = [
        "sliding_attention" if window and (layer + 1) % pattern else "full_attention"
        for layer in range(layers)
    ]
    return fields | {
        "attn_logit_softcapping": scores_cap,
        "final_logit_softcapping": logits_cap,
        "layer_types": kinds,
        "sliding_window": window,
    }


def special_tokens(keys: Keys, vocabulary: int) -> dict[str, int | list[int]]:
    """The ids of BOS, EOS and padding that the file names; an end of turn ends a text too."""
    ids = {}
    for field, key in (("bos", "bos"), ("eos", "eos"), ("eot", "eot"), ("pad", "padding")):
        token = keys.get(f"tokenizer.ggml.{key}_token_id", int, None)
        if token is not None and not 0 <= token < vocabulary:
            found = f"{field} token id {token}"
            raise InputError("GG-VOCAB", keys.where, found, f"0 to {vocabulary - 1}")
        if token is not None:
            ids[f"{field}_token_id"] = token
    turn = ids.pop("eot_token_id", None)
    if turn is not None and "eos_token_id" in ids and turn != ids["eos_token_id"]:
        ids["eos_token_id"] = [ids["eos_token_id"], turn]
    return ids


def vocabulary_size(keys: Keys) -> int:
    """Tokens in the vocabulary; the shape of the embedding is checked against it later."""
    tokens = keys.get("tokenizer.ggml.tokens", list, None)
    size = keys.size(".vocab_size", len(tokens) if tokens else REQUIRED)
    if tokens is not None and len(tokens) != size:
        found = f"has {len(tokens)} tokens, {keys.architecture}.vocab_size is {size}"
        raise InputError("GG-VOCAB", keys.where, found, "the same number")
    return size
