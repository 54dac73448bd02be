"""What differs between model families, as data: one row a family.

Everything else about a model is in its config.json. A new family is a row here and a golden folder
in the tests.
"""

import dataclasses
from typing import TYPE_CHECKING, Any

from qlora_jax.adapters.spec import SAVED
from qlora_jax.weight_names import EMBEDDINGS, HEAD, LAYERS, NORM

if TYPE_CHECKING:
    from qlora_jax.models.config import ModelConfig

Shape = tuple[int, ...]

NONE, ALL, LAST, PATTERN = "none", "all", "last", "pattern"


@dataclasses.dataclass(frozen=True)
class Family:
    """One row.

    Args:
      model_type: config.json's `model_type`.
      defaults: what a key that is missing from config.json means; null is a value of its own.
      required: options of config.json that change the mathematics, each with the values for
        which this decoder is right.
      options: options that are this family's own, and are read.
      activation: of the gated feed-forward: a name of mlp.ACTIVATIONS.
      fused: q, k, v are one matrix, and so are gate and up.
      qkv_bias: q, k and v have a bias, whatever config.json says.
      head_norms: each head of q and k is normalized before it is rotated.
      post_norms: attention and feed-forward are normalized behind too, before they are added.
      norm_offset: what is added to a stored norm weight.
      scaled_embedding: embeddings are multiplied by sqrt(hidden_size).
      windows: which layers see no farther than `sliding_window`: none; all; the last, from
        `max_window_layers` on, with `use_sliding_window`; or all but each n-th (a pattern).
        `layer_types` wins where the family has it.
      window_pattern: that n.
      rope_rules: the scaling rules that the family takes, by the name in config.json.
      rope_aliases: older names of these rules.
    """

    model_type: str
    defaults: dict[str, Any] = dataclasses.field(default_factory=dict)
    required: dict[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    options: tuple[str, ...] = ()
    activation: str = "silu"
    fused: bool = False
    qkv_bias: bool = False
    head_norms: bool = False
    post_norms: bool = False
    norm_offset: float = 0.0
    scaled_embedding: bool = False
    windows: str = NONE
    window_pattern: int = 0
    rope_rules: tuple[str, ...] = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")
    rope_aliases: dict[str, str] = dataclasses.field(default_factory=dict)


# Options that are on elsewhere and off here.
NO_BIAS = {"attention_bias": (None, False), "mlp_bias": (None, False)}
NO_CAPS = {"attn_logit_softcapping": (None,), "final_logit_softcapping": (None,)}
SILU = {"hidden_act": (None, "silu")}
QWEN = {**SILU, **NO_CAPS, "mlp_bias": (None, False), "use_mrope": (None, False)}
QWEN_DEFAULTS = {
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
GEMMA = Family(
    "",
    defaults={
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
        "sliding_window": 4096,
        "query_pre_attn_scalar": 256,
    },
    required={
        "hidden_activation": ("gelu_pytorch_tanh",),
        "use_bidirectional_attention": (None, False),
        "mlp_bias": (None, False),
    },
    options=(
        *("attention_bias", "query_pre_attn_scalar", "sliding_window", "layer_types"),
        *("final_logit_softcapping", "hidden_act"),
    ),
    activation="gelu_tanh",
    post_norms=True,
    norm_offset=1.0,
    scaled_embedding=True,
    windows=PATTERN,
)

FAMILIES = {
    family.model_type: family
    for family in (
        Family(
            "llama",
            required={**SILU, **NO_CAPS, "pretraining_tp": (None, 1)},
            options=("attention_bias", "mlp_bias"),
        ),
        Family(
            "mistral",
            defaults={
                "num_key_value_heads": 8,
                "max_position_embeddings": 131072,
                "sliding_window": 4096,
            },
            required={**SILU, **NO_CAPS, **NO_BIAS, "layer_types": (None,)},
            options=("sliding_window",),
            windows=ALL,
        ),
        Family(
            "qwen2",
            defaults=QWEN_DEFAULTS,
            required={**QWEN, "attention_bias": (None, True)},
            options=("use_sliding_window", "sliding_window", "max_window_layers", "layer_types"),
            qkv_bias=True,
            windows=LAST,
        ),
        Family(
            "qwen3",
            defaults={**QWEN_DEFAULTS, "head_dim": 128},
            required=QWEN,
            options=(
                *("use_sliding_window", "sliding_window", "max_window_layers", "layer_types"),
                "attention_bias",
            ),
            head_norms=True,
            windows=LAST,
        ),
        dataclasses.replace(
            GEMMA,
            model_type="gemma2",
            defaults=GEMMA.defaults
            | {
                "max_position_embeddings": 8192,
                "attn_logit_softcapping": 50.0,
                "final_logit_softcapping": 30.0,
            },
            options=(*GEMMA.options, "attn_logit_softcapping"),
            window_pattern=2,
        ),
        dataclasses.replace(
            GEMMA,
            model_type="gemma3_text",
            defaults=GEMMA.defaults | {"max_position_embeddings": 131072},
            required=GEMMA.required | {"attn_logit_softcapping": (None,)},
            options=(
                *GEMMA.options,
                *("sliding_window_pattern", "_sliding_window_pattern", "rope_local_base_freq"),
            ),
            head_norms=True,
            window_pattern=6,
        ),
        Family(
            "phi3",
            defaults={
                "rms_norm_eps": 1e-5,
                "max_position_embeddings": 4096,
                "original_max_position_embeddings": 4096,
            },
            required={
                **SILU,
                **NO_CAPS,
                **NO_BIAS,
                "lm_head_bias": (None, False),
                "full_attn_mod": (None, 1),
                "interpolate_factor": (None, 1),
                "layer_types": (None,),
            },
            options=("sliding_window", "partial_rotary_factor", "original_max_position_embeddings"),
            fused=True,
            windows=ALL,
            rope_rules=("default", "longrope"),
            rope_aliases={"su": "longrope", "yarn": "longrope"},
        ),
    )
}


FUSED = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}


def linear_parts(config: "ModelConfig") -> dict[str, tuple[tuple[str, int], ...]]:
    """(name, out) of what each linear of one layer was joined from; of itself where it was not."""
    shapes, whole = linear_shapes(config), linear_shapes(config.as_published)
    parts = {name: (name,) if name in whole else FUSED[name] for name in shapes}
    return {name: tuple((part, whole[part][0]) for part in own) for name, own in parts.items()}


def linear_shapes(config: "ModelConfig") -> dict[str, tuple[int, int]]:
    """(out, in) of every linear of one layer, by its name inside the layer."""
    width, inner = config.hidden_size, config.intermediate_size
    heads = config.num_attention_heads * config.head_dim
    groups = config.num_key_value_heads * config.head_dim
    if config.fused:
        return {
            "self_attn.qkv_proj": (heads + 2 * groups, width),
            "self_attn.o_proj": (width, heads),
            "mlp.gate_up_proj": (2 * inner, width),
            "mlp.down_proj": (width, inner),
        }
    return {
        "self_attn.q_proj": (heads, width),
        "self_attn.k_proj": (groups, width),
        "self_attn.v_proj": (groups, width),
        "self_attn.o_proj": (width, heads),
        "mlp.gate_proj": (inner, width),
        "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner),
    }


def module_shapes(config: "ModelConfig") -> dict[str, tuple[int, int]]:
    """(out, in) of what an adapter is for: the linears of a layer, and what it can hold in full."""
    whole = dict.fromkeys(SAVED, (config.vocab_size, config.hidden_size))
    return linear_shapes(config) | whole


def has_bias(config: "ModelConfig", linear: str) -> bool:
    """Whether a linear of a layer has a bias."""
    if linear.startswith("mlp"):
        return config.mlp_bias
    return config.attention_bias or (config.family.qkv_bias and not linear.endswith("o_proj"))


def norm_sizes(config: "ModelConfig") -> dict[str, int]:
    """The width of every norm of one layer, by its name inside the layer."""
    names = ["input_layernorm", "post_attention_layernorm"]
    if config.family.post_norms:
        names += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    sizes = dict.fromkeys(names, config.hidden_size)
    if config.family.head_norms:
        sizes |= dict.fromkeys(("self_attn.q_norm", "self_attn.k_norm"), config.head_dim)
    return sizes


def weight_shapes(config: "ModelConfig") -> dict[str, Shape]:
    """The shape of every weight by its stacked name, without the axis of layers.

    A stacked name is Hugging Face's with the layer's number left out: all layers of
    `model.layers.3.self_attn.q_proj.weight` are `model.layers.self_attn.q_proj.weight`.
    """
    width = config.hidden_size
    shapes: dict[str, Shape] = {EMBEDDINGS: (config.vocab_size, width)}
    for name, shape in linear_shapes(config).items():
        shapes[f"{LAYERS}{name}.weight"] = shape
        if has_bias(config, name):
            shapes[f"{LAYERS}{name}.bias"] = shape[:1]
    for name, size in norm_sizes(config).items():
        shapes[f"{LAYERS}{name}.weight"] = (size,)
    shapes[NORM] = (width,)
    if not config.tie_word_embeddings:
        shapes[HEAD] = (config.vocab_size, width)
    return shapes
