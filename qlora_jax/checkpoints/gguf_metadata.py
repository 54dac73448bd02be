"""A model's config as GGUF metadata, as llama.cpp's convert_hf_to_gguf.py writes it.

llama.cpp fixes more about a family than config.json does. What it would compute otherwise than
here is refused; what it only computes otherwise for long texts is kept out of `context_length`, and
is told.
"""

import math

from qlora_jax.checkpoints.gguf_config import LARGE_GEMMA
from qlora_jax.checkpoints.gguf_tensors import architecture_of
from qlora_jax.checkpoints.gguf_write import Value
from qlora_jax.errors import InputError, listed
from qlora_jax.models.config import ModelConfig
from qlora_jax.models.families import has_bias, linear_shapes

FILE_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 7, "bf16": 32}
QUANTIZATION_VERSION = 2  # of the block formats

ROPE_RULES = {
    "llama": ("default", "linear", "dynamic", "yarn", "llama3"),
    "qwen2": ("default", "linear", "dynamic", "yarn"),
    "qwen3": ("default", "linear", "dynamic", "yarn"),
    "gemma2": ("default", "linear", "dynamic"),
    "gemma3": ("default", "linear"),
    "phi3": ("default", "longrope"),
}
BIASED = ("q_proj", "k_proj", "v_proj")
BIASED_IN_LLAMA = (*BIASED, "o_proj", "gate_proj", "up_proj", "down_proj")


def model_metadata(
    config: ModelConfig, name: str, kind: str, where: str
) -> tuple[dict[str, Value], list[str]]:
    """The keys `general.*` and those of the architecture, and what is to be said about them.

    Args:
      name: of the model, for people.
      kind: f32, f16, bf16, q8_0 or q4_0.
      where: the model, for errors.

    Raises:
      InputError: GGOUT-... for what llama.cpp would compute otherwise.
    """
    architecture = architecture_of(config)
    refuse_unsayable(config, architecture, where)
    context, notes = context_length(config, architecture)
    own = {
        "vocab_size": config.vocab_size,
        "context_length": context,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        **rope_keys(config, architecture),
    }
    if config.family.window_pattern and any(config.windows):
        own["attention.sliding_window"] = window(config)
    if architecture == "phi3":  # 0 tells llama.cpp that there is none
        own["attention.sliding_window"] = window(config) or 0
    if config.attention_softcap is not None:
        own["attn_logit_softcapping"] = config.attention_softcap
    if config.logit_softcap is not None:
        own["final_logit_softcapping"] = config.logit_softcap
    general = {
        "general.architecture": architecture,
        "general.type": "model",
        "general.name": name,
        "general.file_type": FILE_TYPES[kind],
        "general.quantization_version": QUANTIZATION_VERSION,
    }
    return general | {f"{architecture}.{key}": value for key, value in own.items()}, notes


def window(config: ModelConfig) -> int | None:
    """The window of the layers that have one."""
    return next((width for width in config.windows if width is not None), None)


def context_length(config: ModelConfig, architecture: str) -> tuple[int, list[str]]:
    """How long a text llama.cpp may take so that it computes what is computed here."""
    longest, notes = config.max_position_embeddings, []
    width = window(config)
    if width is not None and width < longest and not config.family.window_pattern:
        notes.append(
            f"llama.cpp has no sliding window for {architecture}: context_length is the window, "
            f"{width}, instead of {longest}; longer texts would give other results"
        )
        longest = width
    if config.rope.rule == "dynamic":
        notes.append(
            f"llama.cpp has no dynamic RoPE scaling: texts beyond context_length, {longest}, would "
            "give other results"
        )
    if config.rope.rule == "longrope":
        notes.append(
            "llama.cpp takes the long RoPE factors when its context (-c) is above "
            f"{config.rope.original} tokens, transformers when the text is"
        )
    return longest, notes


def rope_keys(config: ModelConfig, architecture: str) -> dict[str, Value]:
    """Rotary positions, as far as keys tell them; see `gguf_tensors.rope_tensors`."""
    rope = config.rope
    keys: dict[str, Value] = {
        "rope.freq_base": rope.theta,
        "rope.dimension_count": rope.rotated(config.head_dim),
    }
    if config.local_rope is not None:
        keys["rope.freq_base_swa"] = config.local_rope.theta
    if rope.rule in ("linear", "yarn"):
        keys |= {"rope.scaling.type": rope.rule, "rope.scaling.factor": rope.factor}
    if rope.rule == "yarn":
        keys["rope.scaling.original_context_length"] = rope.original
    if architecture == "phi3":
        original = rope.original or config.max_position_embeddings
        keys["rope.scaling.original_context_length"] = original
    if rope.rule == "longrope":
        keys["rope.scaling.attn_factor"] = rope.attention_factor
    return keys


def refuse_unsayable(config: ModelConfig, architecture: str, where: str) -> None:
    """Refuses what no key can say, and llama.cpp takes to be otherwise."""
    refuse_rope(config, architecture, where)
    refuse_windows(config, architecture, where)
    biased = [name for name in linear_shapes(config) if has_bias(config, name)]
    known = BIASED_IN_LLAMA if architecture == "llama" else BIASED
    if strange := [name for name in biased if not name.endswith(known)]:
        found = f"has biases that llama.cpp's {architecture} does not read: {listed(strange)}"
        raise InputError("GGOUT-BIAS", where, found)
    if architecture == "gemma2" and not config.tie_word_embeddings:
        found = "has a head of its own, which llama.cpp's gemma2 does not read"
        raise InputError("GGOUT-HEAD", where, found, "tied embeddings")
    heads = config.num_attention_heads * config.head_dim
    if architecture in ("qwen2", "phi3") and heads != config.hidden_size:
        found = f"heads are {heads} wide together, which llama.cpp's {architecture} does not read"
        raise InputError("GGOUT-HEADS", where, found, f"hidden_size = {config.hidden_size}")
    width = config.head_dim
    if LARGE_GEMMA.get(architecture) == config.num_hidden_layers:
        width = config.hidden_size // config.num_attention_heads
    if not math.isclose(config.attention_scale, width**-0.5, rel_tol=1e-6):
        found = f"scores are scaled by {config.attention_scale:.6g}"
        expected = f"{width**-0.5:.6g}, which llama.cpp's {architecture} has"
        raise InputError("GGOUT-SCALE", where, found, expected)
    caps = (config.attention_softcap is not None, config.logit_softcap is not None)
    if architecture == "gemma2" and not all(caps):
        found = f"soft caps: scores {config.attention_softcap}, logits {config.logit_softcap}"
        raise InputError("GGOUT-CAP", where, found, "both, as llama.cpp has it")


def refuse_rope(config: ModelConfig, architecture: str, where: str) -> None:
    """Rotary positions that llama.cpp would compute otherwise."""
    rope, rules = config.rope, ROPE_RULES[architecture]
    local = "default" if config.local_rope is None else config.local_rope.rule
    if rope.rule not in rules or local != "default":
        found = f"RoPE scaling {rope.rule}, in layers with a window {local}"
        expected = f"what llama.cpp's {architecture} has: {listed(rules)}"
        raise InputError("GGOUT-ROPE", where, found, expected)
    if rope.rule == "yarn":  # keys for these exist, but these architectures do not read them
        usual = 0.1 * math.log(max(rope.factor, 1)) + 1
        others = (rope.beta_fast, rope.beta_slow, rope.truncate)
        if others != (32, 1, True) or not math.isclose(rope.attention_factor, usual, rel_tol=1e-6):
            found = (
                f"yarn with attention_factor {rope.attention_factor:.6g}; beta_fast, beta_slow, "
                f"truncate {others}"
            )
            raise InputError("GGOUT-ROPE", where, found, f"{usual:.6g}; (32, 1, True), as there")


def refuse_windows(config: ModelConfig, architecture: str, where: str) -> None:
    """Gemma's layers with a window must be those that llama.cpp takes for granted."""
    n, width = config.family.window_pattern, window(config)
    if not n or (width is None and architecture == "gemma3"):
        return
    layers = range(config.num_hidden_layers)
    usual = tuple(width if (layer + 1) % n else None for layer in layers)
    if width is None or config.windows != usual:
        found = f"windows of the layers: {listed(map(str, config.windows))}"
        raise InputError("GGOUT-WINDOW", where, found, f"one in all layers but each {n}th")
