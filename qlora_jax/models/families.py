"""What differs between model families, as data: one row a family.

Everything else about a model is in its config.json. A new family is a row here and a golden folder
in the tests.
"""

import dataclasses
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qlora_jax.models.config import ModelConfig

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Family:
    """One row.

    Args:
      model_type: config.json's `model_type`.
      required: options of config.json that change the mathematics, each with the values for
        which this decoder is right; the first is what a missing key means.
    """

    model_type: str
    required: dict[str, tuple[Any, ...]]


FAMILIES = {
    family.model_type: family
    for family in (
        Family(
            "llama",
            required={
                "hidden_act": ("silu",),
                "pretraining_tp": (1, None),
                "attention_dropout": (0.0, 0, None),
            },
        ),
    )
}


def linear_shapes(config: "ModelConfig") -> dict[str, tuple[int, int]]:
    """(out, in) of every linear of one layer, by its name inside the layer."""
    width, inner = config.hidden_size, config.intermediate_size
    heads = config.num_attention_heads * config.head_dim
    groups = config.num_key_value_heads * config.head_dim
    return {
        "self_attn.q_proj": (heads, width),
        "self_attn.k_proj": (groups, width),
        "self_attn.v_proj": (groups, width),
        "self_attn.o_proj": (width, heads),
        "mlp.gate_proj": (inner, width),
        "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner),
    }


def weight_shapes(config: "ModelConfig") -> dict[str, Shape]:
    """The shape of every weight by its stacked name, without the axis of layers.

    A stacked name is Hugging Face's with the layer's number left out: all layers of
    `model.layers.3.self_attn.q_proj.weight` are `model.layers.self_attn.q_proj.weight`.
    """
    width = config.hidden_size
    shapes: dict[str, Shape] = {"model.embed_tokens.weight": (config.vocab_size, width)}
    for name, shape in linear_shapes(config).items():
        shapes[f"model.layers.{name}.weight"] = shape
        biased = config.attention_bias if name.startswith("self_attn") else config.mlp_bias
        if biased:
            shapes[f"model.layers.{name}.bias"] = shape[:1]
    for norm in ("input_layernorm", "post_attention_layernorm"):
        shapes[f"model.layers.{norm}.weight"] = (width,)
    shapes["model.norm.weight"] = (width,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, width)
    return shapes
