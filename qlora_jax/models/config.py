"""ModelConfig: a Hugging Face config.json, read and checked."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from qlora_jax.errors import InputError, listed, nearest
from qlora_jax.models.families import FAMILIES, Family
from qlora_jax.models.rope import Rope

ROPE_RULES = ("default", "llama3")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder; names and meanings are Hugging Face's.

    Hashable, so that a module may carry it as static data under jit.
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
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None

    @property
    def family(self) -> Family:
        """What this model's family does differently from others."""
        return FAMILIES[self.model_type]

    @staticmethod
    def from_dict(config: Mapping[str, Any], where: str = "config.json") -> "ModelConfig":
        """Reads a config.json.

        Raises:
          InputError: the architecture is unknown, a field is missing, of the wrong type or out of
            range, or an option is set that changes the mathematics and is not built here.
        """
        return Reader(config, where).model_config()


class Reader:
    """Takes fields out of a config.json, with one clear error for each thing that can be wrong."""

    def __init__(self, config: Mapping[str, Any], where: str):
        self.config, self.where = config, where

    def model_config(self) -> ModelConfig:
        family = self.family()
        hidden, heads = self.size("hidden_size"), self.size("num_attention_heads")
        groups = self.size("num_key_value_heads", default=heads)
        if heads % groups:
            raise self.error(
                "num_key_value_heads", f"{groups}", f"a divisor of num_attention_heads = {heads}"
            )
        if "head_dim" not in self.config and hidden % heads:
            raise self.error("num_attention_heads", f"{heads}", f"a divisor of {hidden}")
        self.refuse_unknown_mathematics(family)
        return ModelConfig(
            model_type=family.model_type,
            vocab_size=self.size("vocab_size"),
            hidden_size=hidden,
            intermediate_size=self.size("intermediate_size"),
            num_hidden_layers=self.size("num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=groups,
            head_dim=self.size("head_dim", default=hidden // heads),
            max_position_embeddings=self.size("max_position_embeddings", default=2048),
            rms_norm_eps=self.number("rms_norm_eps", default=1e-6),
            rope=self.rope(),
            tie_word_embeddings=self.flag("tie_word_embeddings"),
            attention_bias=self.flag("attention_bias"),
            mlp_bias=self.flag("mlp_bias"),
            bos_token_id=self.token("bos_token_id"),
            eos_token_ids=self.tokens("eos_token_id"),
            pad_token_id=self.token("pad_token_id"),
        )

    def family(self) -> Family:
        name = self.config.get("model_type")
        if name in FAMILIES:
            return FAMILIES[name]
        close = nearest(str(name), FAMILIES)
        raise InputError(
            "CFG-ARCH",
            self.where,
            f"unknown architecture: model_type is {name!r}",
            f"one of {listed(FAMILIES)}",
            f"a model of family {close[0]}" if close else "a model of one of these families",
        )

    def refuse_unknown_mathematics(self, family: Family) -> None:
        """An option that changes what the model computes is never passed over."""
        for key, allowed in family.required.items():
            value = self.config.get(key, allowed[0])
            if value not in allowed:
                wanted = " or ".join(repr(a) for a in allowed)
                raise self.error(key, f"{value!r} is not supported for {family.model_type}", wanted)

    def rope(self) -> Rope:
        """`rope_parameters`, or the older pair `rope_theta` and `rope_scaling`."""
        fields = self.config.get("rope_parameters") or self.config.get("rope_scaling") or {}
        if not isinstance(fields, Mapping):
            raise self.error("rope_parameters", f"{fields!r}", "an object")
        inner = Reader({"rope_theta": self.config.get("rope_theta", 10000.0), **fields}, self.where)
        rule = fields.get("rope_type", fields.get("type", "default"))
        if rule not in ROPE_RULES:
            raise self.error("rope_type", f"unknown rule {rule!r}", f"one of {listed(ROPE_RULES)}")
        theta = inner.number("rope_theta")
        if rule == "default":
            return Rope(theta)
        return Rope(
            theta,
            rule,
            inner.number("factor"),
            inner.number("low_freq_factor"),
            inner.number("high_freq_factor"),
            inner.size("original_max_position_embeddings"),
        )

    def size(self, key: str, default: int | None = None) -> int:
        value = self.config.get(key, default)
        if type(value) is not int or not 0 < value < 2**31:
            raise self.error(key, self.shown(key), "a whole number above 0")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.config.get(key, default)
        if type(value) not in (int, float) or not (math.isfinite(value) and value > 0):
            raise self.error(key, self.shown(key), "a finite number above 0")
        return float(value)

    def flag(self, key: str) -> bool:
        value = self.config.get(key, False)
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
        return f"is {self.config[key]!r}" if key in self.config else "is missing"

    def error(self, key: str, found: str, expected: str) -> InputError:
        return InputError("CFG-MODEL", f"{self.where}: {key}", found, expected)
