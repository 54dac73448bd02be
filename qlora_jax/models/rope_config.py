"""config.json's rotary positions: `rope_parameters`, or the older `rope_theta` and `rope_scaling`.

What is missing means what transformers 5 takes it to mean.
"""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from qlora_jax.errors import listed
from qlora_jax.models.families import Family
from qlora_jax.models.rope import Rope

if TYPE_CHECKING:
    from qlora_jax.models.config import Reader

THETA = 10_000.0
GLOBAL_THETA = 1_000_000.0  # of Gemma 3's layers without a window
ORIGINAL = "original_max_position_embeddings"
KINDS = ("full_attention", "sliding_attention")
# Fields: those of every rule, and each rule's own.
COMMON = ("rope_theta", "rope_type", "type", "partial_rotary_factor")
FIELDS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor", ORIGINAL),
    "yarn": (
        *("factor", ORIGINAL, "attention_factor", "beta_fast", "beta_slow"),
        *("mscale", "mscale_all_dim", "truncate"),
    ),
    "llama3": ("factor", ORIGINAL, "low_freq_factor", "high_freq_factor"),
    "longrope": ("factor", ORIGINAL, "attention_factor", "short_factor", "long_factor"),
}


def read_ropes(
    read: "Reader", family: Family, head_dim: int, longest: int
) -> tuple[Rope, Rope | None]:
    """The rule of all layers, or that of those without a window and that of those with one.

    Args:
      read: the whole config.json.
      head_dim: channels of a head.
      longest: `max_position_embeddings`.

    Raises:
      InputError: CFG-MODEL for a rule or a field that is unknown, missing or out of range.
    """
    old, new = read.config.get("rope_scaling"), read.config.get("rope_parameters")
    if old and new and old != new:
        raise read.error("rope_scaling", "differs from rope_parameters", "one of the two")
    given = new or old or {}
    if not isinstance(given, Mapping):
        raise read.error("rope_parameters", f"is {given!r:.80}", "an object")
    old_theta = read.config.get("rope_theta")
    if "rope_local_base_freq" not in family.options:
        theta = THETA if old_theta is None else old_theta
        return read_rope(read, family, {"rope_theta": theta, **given}, head_dim, longest), None
    kinds = given if new or set(given) & set(KINDS) else {"full_attention": given}
    if set(kinds) - set(KINDS):
        raise read.error("rope_parameters", f"has {listed(kinds)}", " and ".join(KINDS))
    if not all(isinstance(own or {}, Mapping) for own in kinds.values()):
        found = f"has {kinds!r:.80}"
        raise read.error("rope_parameters", found, "an object for each kind of layer")
    thetas = (
        GLOBAL_THETA if old_theta is None else old_theta,
        read.config.get("rope_local_base_freq") or THETA,
    )
    ropes = [
        read_rope(read, family, {"rope_theta": theta, **(kinds.get(kind) or {})}, head_dim, longest)
        for kind, theta in zip(KINDS, thetas, strict=True)
    ]
    return ropes[0], ropes[1]


def read_rope(
    read: "Reader", family: Family, given: Mapping[str, Any], head_dim: int, longest: int
) -> Rope:
    """One rule."""
    fields = type(read)(given, f"{read.where}: rope_parameters")
    rule = given.get("rope_type", given.get("type", "default"))
    rule = family.rope_aliases.get(str(rule), rule)
    if not isinstance(rule, str) or rule not in family.rope_rules:
        expected = f"one of {listed(family.rope_rules)}"
        raise read.error("rope_type", f"unknown rule {str(rule)[:80]!r}", expected)
    unknown = [
        key
        for key, value in given.items()
        if key not in (*COMMON, *FIELDS[rule]) and value not in (None, False)
    ]
    if unknown:
        raise fields.error(unknown[0], f"is no field of rule {rule}", listed(FIELDS[rule]))
    partial = given.get("partial_rotary_factor", read.config.get("partial_rotary_factor"))
    partial = 1.0 if partial is None else partial
    if type(partial) not in (int, float) or not 0 < partial <= 1:
        found = f"is {partial!r:.80}"
        raise fields.error("partial_rotary_factor", found, "above 0, at most 1")
    if partial != 1 and "partial_rotary_factor" not in family.options:
        expected = f"1: in {family.model_type} all channels of a head rotate"
        raise fields.error("partial_rotary_factor", f"is {partial}", expected)
    common = {"theta": fields.number("rope_theta"), "rule": rule, "partial": float(partial)}
    dim = int(head_dim * partial)
    if dim < 2 or dim % 2:
        raise read.error("head_dim", f"{dim} of {head_dim} channels rotate", "an even number")
    # Phi 3 has it beside rope_scaling, and there transformers believes it first.
    original = read.config.get(ORIGINAL)
    original = given.get(ORIGINAL) if original is None else original
    fields.config = {**given, ORIGINAL: longest if original is None else original}
    return BUILDERS[rule](fields, common, dim, longest)


def default(fields: "Reader", common: dict, dim: int, longest: int) -> Rope:
    """No scaling."""
    return Rope(**common)


def linear(fields: "Reader", common: dict, dim: int, longest: int) -> Rope:
    """All positions closer together."""
    return Rope(**common, factor=fields.number("factor"))


def dynamic(fields: "Reader", common: dict, dim: int, longest: int) -> Rope:
    """A base that grows with the text; transformers counts from max_position_embeddings."""
    if dim < 4:
        raise fields.error("rope_type", f"dynamic with {dim} channels", "4 or more")
    return Rope(**common, factor=fields.number("factor"), original=longest)


def yarn(fields: "Reader", common: dict, dim: int, longest: int) -> Rope:
    """YaRN; the attention factor follows from the factor unless it is given."""
    original = fields.size(ORIGINAL)
    factor = fields.number("factor", default=longest / original)
    if fields.config.get("attention_factor") is not None:
        attention = fields.number("attention_factor")
    elif fields.config.get("mscale") and fields.config.get("mscale_all_dim"):
        scales = (fields.number("mscale"), fields.number("mscale_all_dim"))
        over, under = (mscale(factor, scale) for scale in scales)
        attention = over / under
    else:
        attention = mscale(factor, 1.0)
    if common["theta"] <= 1:
        raise fields.error("rope_theta", f"is {common['theta']}", "above 1")
    return Rope(
        **common,
        factor=factor,
        attention_factor=attention,
        original=original,
        beta_fast=fields.number("beta_fast", default=32.0),
        beta_slow=fields.number("beta_slow", default=1.0),
        truncate=fields.flag("truncate", default=True),
    )


def mscale(factor: float, scale: float) -> float:
    """YaRN's temperature for a factor."""
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def llama3(fields: "Reader", common: dict, dim: int, longest: int) -> Rope:
    """Llama 3.1's rule."""
    low, high = fields.number("low_freq_factor"), fields.number("high_freq_factor")
    if high <= low:
        raise fields.error("high_freq_factor", f"is {high}", f"above low_freq_factor = {low}")
    return Rope(
        **common,
        factor=fields.number("factor"),
        original=fields.size(ORIGINAL),
        low_freq_factor=low,
        high_freq_factor=high,
    )


def longrope(fields: "Reader", common: dict, dim: int, longest: int) -> Rope:
    """Phi 3's rule: a factor for each pair of channels, one list for short texts, one for long."""
    original = fields.size(ORIGINAL)
    factor = fields.number("factor", default=longest / original)
    attention = 1.0
    if fields.config.get("attention_factor") is not None:
        attention = fields.number("attention_factor")
    elif factor > 1 and original > 1:
        attention = math.sqrt(1 + math.log(factor) / math.log(original))
    short, long = (numbers(fields, key, dim // 2) for key in ("short_factor", "long_factor"))
    return Rope(
        **common,
        factor=factor,
        attention_factor=attention,
        original=original,
        short_factor=short,
        long_factor=long,
    )


def numbers(fields: "Reader", key: str, count: int) -> tuple[float, ...]:
    """A list of `count` finite numbers above 0."""
    values = fields.config.get(key)
    good = isinstance(values, list) and len(values) == count
    if not good or any(type(v) not in (int, float) or not 0 < v <= 1e30 for v in values):
        raise fields.error(key, fields.shown(key), f"a list of {count} numbers above 0")
    return tuple(float(value) for value in values)


BUILDERS = {
    "default": default,
    "linear": linear,
    "dynamic": dynamic,
    "yarn": yarn,
    "llama3": llama3,
    "longrope": longrope,
}
