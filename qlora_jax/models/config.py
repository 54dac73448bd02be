"""ModelConfig: a Hugging Face config.json, read and checked."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from qlora_jax.errors import InputError, listed, nearest
from qlora_jax.models import families, rope_config
from qlora_jax.models.families import FAMILIES, Family
from qlora_jax.models.options import check_options
from qlora_jax.models.rope import Rope
from qlora_jax.models.scores import Scores

MAX_LAYERS = 10_000  # each costs memory before a weight is looked for
SLIDING, FULL = "sliding_attention", "full_attention"


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder; names and meanings are Hugging Face's.

    Hashable, so that a module may carry it as static data under jit.

    Args:
      local_rope: rotary positions of the layers with a window, where theirs are not `rope`.
      windows: per layer, how many tokens back one sees, itself included; None for all.
      attention_scale: what q k^T is multiplied by.
      attention_softcap, logit_softcap: c of c * tanh(x / c), for scores and logits; None for none.
      fused: q, k, v are one matrix, and so are gate and up: the family's way, or made so for
        decoding.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: Rope
    local_rope: Rope | None
    windows: tuple[int | None, ...]
    attention_scale: float
    attention_softcap: float | None
    logit_softcap: float | None
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None
    fused: bool = False

    @property
    def family(self) -> Family:
        """What this model's family does differently from others."""
        return FAMILIES[self.model_type]

    @property
    def as_published(self) -> "ModelConfig":
        """The same model with the linears that its checkpoints have."""
        return dataclasses.replace(self, fused=self.family.fused)

    @property
    def embedding_scale(self) -> float:
        """What embeddings are multiplied by."""
        return math.sqrt(self.hidden_size) if self.family.scaled_embedding else 1.0

    def reach(self, room: int) -> tuple[int, ...]:
        """Per layer, how many tokens of a text of at most `room` one sees, itself included."""
        return tuple(room if width is None else min(width, room) for width in self.windows)

    def scores(self, room: int) -> Scores:
        """What all layers do to the attention scores of such texts.

        A window is in it where all layers have the same, and it hides anything.
        """
        narrowest, widest = min(self.reach(room)), max(self.reach(room))
        window = narrowest if narrowest == widest < room else None
        return Scores(self.attention_scale, self.attention_softcap, window)

    @staticmethod
    def from_dict(config: Mapping[str, Any], where: str = "config.json") -> "ModelConfig":
        """Reads a config.json.

        Raises:
          InputError: the architecture is unknown, a field is missing, of the wrong type or out of
            range, or an option is set that changes the mathematics and is not built here.
        """
        return read_config(config, where)


class Reader:
    """Takes fields out of a config.json, with one clear error for each thing that can be wrong."""

    def __init__(self, config: Mapping[str, Any], where: str):
        self.config, self.where = config, where

    def size(self, key: str, default: int | None = None, limit: int = 2**31 - 1) -> int:
        """A whole number above 0; null means the default."""
        value = self.config.get(key)
        value = default if value is None else value
        if type(value) is not int or not 0 < value <= limit:
            raise self.error(key, self.shown(key), f"a whole number from 1 to {limit}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number above 0; null means the default."""
        value = self.config.get(key)
        value = default if value is None else value
        if type(value) not in (int, float) or not 1e-30 <= value <= 1e30:  # not 0 in float32
            raise self.error(key, self.shown(key), "a finite number above 0")
        return float(value)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.config.get(key)
        value = default if value is None else value
        if type(value) is not bool:
            raise self.error(key, self.shown(key), "true or false")
        return value

    def token(self, key: str) -> int | None:
        ids = self.tokens(key)
        return ids[0] if ids else None

    def tokens(self, key: str) -> tuple[int, ...]:
        value = self.config.get(key)
        ids = tuple(value) if isinstance(value, list) else () if value is None else (value,)
        if any(type(i) is not int for i in ids):
            raise self.error(key, self.shown(key), "a token id or a list of them")
        return ids

    def shown(self, key: str) -> str:
        return f"is {str(self.config[key])[:80]!r}" if key in self.config else "is missing"

    def error(self, key: str, found: str, expected: str, hint: str = "") -> InputError:
        return InputError("CFG-MODEL", f"{self.where}: {key}", found, expected, hint)


def read_config(config: Mapping[str, Any], where: str) -> ModelConfig:
    """`ModelConfig.from_dict`."""
    family = family_of(config, where)
    check_options(config, family, where)
    read = Reader({**family.defaults, **config}, where)
    hidden, heads = read.size("hidden_size"), read.size("num_attention_heads")
    groups = read.size("num_key_value_heads", default=heads)
    if heads % groups:
        expected = f"a divisor of num_attention_heads = {heads}"
        raise read.error("num_key_value_heads", f"{groups}", expected)
    if read.config.get("head_dim") is None and hidden % heads:
        raise read.error("num_attention_heads", f"{heads}", f"a divisor of {hidden}")
    head_dim = read.size("head_dim", default=hidden // heads)
    layers = read.size("num_hidden_layers", limit=MAX_LAYERS)
    longest = read.size("max_position_embeddings", default=2048)
    windows = read_windows(read, family, layers)
    rope, local_rope = rope_config.read_ropes(read, family, head_dim, longest)
    if len(set(windows)) == 1:
        rope, local_rope = (rope if windows[0] is None else local_rope or rope), None
    own = family.options
    return ModelConfig(
        model_type=family.model_type,
        vocab_size=read.size("vocab_size"),
        hidden_size=hidden,
        intermediate_size=read.size("intermediate_size"),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=head_dim,
        max_position_embeddings=longest,
        rms_norm_eps=read.number("rms_norm_eps", default=1e-6),
        rope=rope,
        local_rope=local_rope,
        windows=windows,
        attention_scale=read.number("query_pre_attn_scalar", default=head_dim) ** -0.5,
        attention_softcap=softcap(read, "attn_logit_softcapping"),
        logit_softcap=softcap(read, "final_logit_softcapping"),
        tie_word_embeddings=read.flag("tie_word_embeddings"),
        attention_bias="attention_bias" in own and read.flag("attention_bias"),
        mlp_bias="mlp_bias" in own and read.flag("mlp_bias"),
        bos_token_id=read.token("bos_token_id"),
        eos_token_ids=read.tokens("eos_token_id"),
        pad_token_id=read.token("pad_token_id"),
        fused=family.fused,
    )


def family_of(config: Mapping[str, Any], where: str) -> Family:
    """The family that `model_type` names."""
    name = config.get("model_type")
    if isinstance(name, str) and name in FAMILIES:
        return FAMILIES[name]
    if name == "gemma3":
        hint = "its text model alone, whose model_type is gemma3_text"
        found = "model_type 'gemma3' sees images too"
        raise InputError("CFG-ARCH", where, found, f"one of {listed(FAMILIES)}", hint)
    close = nearest(str(name), FAMILIES)
    raise InputError(
        "CFG-ARCH",
        where,
        f"unknown architecture: model_type is {name!r}",
        f"one of {listed(FAMILIES)}",
        f"a model of family {close[0]}" if close else "a model of one of these families",
    )


def read_windows(read: Reader, family: Family, layers: int) -> tuple[int | None, ...]:
    """The window of each layer."""
    kinds = read.config.get("layer_types") if "layer_types" in family.options else None
    window, rule = read.config.get("sliding_window"), family.windows
    if rule == families.LAST and not read.flag("use_sliding_window"):
        window = None
    if rule == families.NONE or (window is None and kinds is None):
        return (None,) * layers
    if kinds is None:
        kinds = [SLIDING if slides(read, family, layer) else FULL for layer in range(layers)]
    elif (
        not isinstance(kinds, list)
        or len(kinds) != layers
        or any(kind not in (SLIDING, FULL) for kind in kinds)
    ):
        expected = f"{layers} times {FULL} or {SLIDING}"
        raise read.error("layer_types", read.shown("layer_types"), expected)
    if SLIDING not in kinds:
        return (None,) * layers
    if window is None:
        found = "has layers with a window, and there is none"
        raise read.error("layer_types", found, "sliding_window, in use")
    width = read.size("sliding_window")
    return tuple(width if kind == SLIDING else None for kind in kinds)


def slides(read: Reader, family: Family, layer: int) -> bool:
    """Whether a layer has the window, where no `layer_types` says so."""
    if family.windows == families.LAST:
        first = read.config["max_window_layers"]
        if type(first) is not int or first < 0:
            raise read.error("max_window_layers", read.shown("max_window_layers"), "a whole number")
        return layer >= first
    if family.windows == families.ALL:
        return True
    own = read.config.get("sliding_window_pattern")
    pattern = family.window_pattern if own is None else own
    if type(pattern) is not int or pattern < 1:
        found = f"is {pattern!r:.80}"
        raise read.error("sliding_window_pattern", found, "a whole number above 0")
    return (layer + 1) % pattern != 0


def softcap(read: Reader, key: str) -> float | None:
    """A cap, or None where there is none."""
    return None if read.config.get(key) is None else read.number(key)
