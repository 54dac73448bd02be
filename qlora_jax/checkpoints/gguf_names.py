"""GGUF's names for a model's weights and Hugging Face's, and the row orders of both.

A row of ARCHITECTURES is a model family as llama.cpp names it; a tensor that the row does not list
is refused, not skipped.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from qlora_jax.errors import InputError
from qlora_jax.models.families import FAMILIES
from qlora_jax.weight_names import LAYERS

# What each rotary frequency is divided by, written instead of the rule: Llama 3's, Phi 3's two.
ROPE_FREQUENCIES = "rope_freqs.weight"
ROPE_LONG, ROPE_SHORT = "rope_factors_long.weight", "rope_factors_short.weight"


@dataclass(frozen=True)
class Architecture:
    """A model family: its Hugging Face names, and its tensors' names without `.weight` or `.bias`.

    Attributes:
      interleaved: layer weights whose rows llama.cpp reorders for its rotary embedding.
      rope: tensors that are no weights, but say how positions rotate.
    """

    model_type: str
    model_class: str
    layer: dict[str, str]
    top: dict[str, str]
    interleaved: tuple[str, ...] = ()
    rope: tuple[str, ...] = ()

    @property
    def norm_offset(self) -> float:
        """What llama.cpp adds to the family's norm weights when it stores them."""
        return FAMILIES[self.model_type].norm_offset


TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
GEMMA_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}

ARCHITECTURES = {
    "llama": Architecture(
        model_type="llama",
        model_class="LlamaForCausalLM",
        top=TOP,
        layer=LAYER,
        interleaved=("self_attn.q_proj", "self_attn.k_proj"),
        rope=(ROPE_FREQUENCIES,),
    ),
    "qwen2": Architecture(model_type="qwen2", model_class="Qwen2ForCausalLM", top=TOP, layer=LAYER),
    "qwen3": Architecture(
        model_type="qwen3", model_class="Qwen3ForCausalLM", top=TOP, layer=LAYER | HEAD_NORMS
    ),
    "gemma2": Architecture(
        model_type="gemma2", model_class="Gemma2ForCausalLM", top=TOP, layer=LAYER | GEMMA_NORMS
    ),
    "gemma3": Architecture(
        model_type="gemma3_text",
        model_class="Gemma3ForCausalLM",
        top=TOP,
        layer=LAYER | GEMMA_NORMS | HEAD_NORMS,
    ),
    "phi3": Architecture(
        model_type="phi3",
        model_class="Phi3ForCausalLM",
        top=TOP,
        layer={
            "attn_norm": "input_layernorm",
            "attn_qkv": "self_attn.qkv_proj",
            "attn_output": "self_attn.o_proj",
            "ffn_norm": "post_attention_layernorm",
            "ffn_up": "mlp.gate_up_proj",
            "ffn_down": "mlp.down_proj",
        },
        rope=(ROPE_LONG, ROPE_SHORT),
    ),
}


def names_in_file(tensors: Iterable[str], architecture: str, where: str) -> dict[str, str]:
    """Hugging Face name of every weight -> its GGUF name, in file order.

    Raises:
      InputError: GG-UNKNOWN for a tensor that the architecture does not have.
    """
    row = ARCHITECTURES[architecture]
    names = {}
    for name in tensors:
        if name in row.rope:
            continue
        stem, _, suffix = name.rpartition(".")
        if stem.startswith("blk."):
            _, index, part = stem.split(".", 2) if stem.count(".") >= 2 else ("", "", "")
            valid = part in row.layer and index.isdecimal() and str(int(index)) == index
            target = f"{LAYERS}{index}.{row.layer[part]}" if valid else None
        else:
            target = row.top.get(stem)
        if target is None or suffix not in ("weight", "bias"):
            found = f"unknown tensor {name} for architecture {architecture}"
            raise InputError("GG-UNKNOWN", where, found)
        names[f"{target}.{suffix}"] = name
    return names


def split_halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k from GGUF's order to Hugging Face's, per head.

    GGUF keeps a rotary pair side by side, Hugging Face half a head apart:

        GGUF          0 a  0 b  1 a  1 b ...
        Hugging Face  0 a  1 a  ...  0 b  1 b ...

    Args:
      weight: (heads * head_dim, in), or a bias (heads * head_dim,).
    """
    pairs = weight.reshape(heads, -1, 2, *weight.shape[1:])
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def join_halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """`split_halves` undone: the rows of each rotary pair side by side."""
    halves = weight.reshape(heads, 2, -1, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)
