"""A GGUF file's rotary positions as config.json's `rope_parameters`.

llama.cpp's converter writes Llama 3's rule as the factors that follow from it, so the rule is taken
back from them.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from qlora_jax.checkpoints.gguf_names import ROPE_FREQUENCIES, ROPE_LONG, ROPE_SHORT
from qlora_jax.errors import InputError, listed
from qlora_jax.models.rope import Rope, inverse_frequencies

if TYPE_CHECKING:
    from qlora_jax.checkpoints.gguf_config import Keys

LOW, HIGH = 1.0, 4.0  # Llama 3's low_freq_factor and high_freq_factor
SMALLEST = 0.999  # of the factors, whose fast ones are 1


def rope_parameters(
    keys: "Keys", head_dim: int, longest: int, factors: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    """Hugging Face's rule of all layers, or of Gemma 3's layers without a window.

    Args:
      head_dim: channels of a head.
      longest: the file's context_length.
      factors: `rope_freqs.weight` or Phi 3's two where they are, float32 (pairs of channels,).

    Raises:
      InputError: GG-ROPE, GG-META.
    """
    theta = keys.positive(".rope.freq_base", 10000.0)
    # llama.cpp takes a factor without a rule to be linear.
    implied = "none" if keys.positive(".rope.scaling.factor", None) is None else "linear"
    rule = keys.get(".rope.scaling.type", str, "longrope" if ROPE_LONG in factors else implied)
    allowed = {"longrope"} if ROPE_LONG in factors else {"none", "linear", "yarn"}
    allowed = {"none"} if ROPE_FREQUENCIES in factors else allowed
    if rule not in allowed or (ROPE_SHORT in factors) != (ROPE_LONG in factors):
        found = f"rope scaling {rule!r:.80} with the tensors {listed(factors) or 'none'}"
        raise InputError("GG-ROPE", keys.where, found, f"{' or '.join(sorted(allowed))} with them")
    if ROPE_FREQUENCIES in factors:
        return llama3(keys, theta, head_dim, factors[ROPE_FREQUENCIES])
    builders = {"none": default, "linear": linear, "yarn": yarn, "longrope": longrope}
    return {"rope_theta": theta, **builders[rule](keys, longest, factors)}


def default(keys: "Keys", longest: int, factors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """No scaling."""
    return {"rope_type": "default"}


def linear(keys: "Keys", longest: int, factors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """All positions closer together."""
    return {"rope_type": "linear", "factor": keys.positive(".rope.scaling.factor")}


def yarn(keys: "Keys", longest: int, factors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """YaRN, with the fields that the file has."""
    if (extrapolation := keys.positive(".rope.scaling.yarn_ext_factor", 1.0)) != 1.0:
        found = f"rope.scaling.yarn_ext_factor is {extrapolation}"
        raise InputError("GG-ROPE", keys.where, found, "1.0")
    original = keys.size(".rope.scaling.original_context_length", longest)
    fields = {
        "attention_factor": keys.positive(".rope.scaling.yarn_attn_factor", None),
        "beta_fast": keys.positive(".rope.scaling.yarn_beta_fast", None),
        "beta_slow": keys.positive(".rope.scaling.yarn_beta_slow", None),
    }
    return {
        "rope_type": "yarn",
        "factor": keys.positive(".rope.scaling.factor"),
        "original_max_position_embeddings": original,
        **{name: value for name, value in fields.items() if value is not None},
    }


def longrope(keys: "Keys", longest: int, factors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Phi 3's rule: its factors are tensors."""
    attention = keys.positive(".rope.scaling.attn_factor", None)
    return {
        "rope_type": "longrope",
        "original_max_position_embeddings": keys.size(".rope.scaling.original_context_length"),
        "short_factor": [shortest(value) for value in factors[ROPE_SHORT]],
        "long_factor": [shortest(value) for value in factors[ROPE_LONG]],
        **({} if attention is None else {"attention_factor": attention}),
    }


def shortest(value: float | np.float32) -> float:
    """The shortest number with the same float32: 1e-05 was meant, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def llama3(keys: "Keys", theta: float, head_dim: int, factors: np.ndarray) -> dict[str, Any]:
    """Llama 3's rule, taken back from its factors.

    Only the ratios of its two bounds to the original length show in them, so the bounds are taken
    to be the usual ones.
    """
    if factors.shape != (head_dim // 2,) or factors.min() < SMALLEST:
        found = f"{ROPE_FREQUENCIES} has {len(factors)} factors from {factors.min():g} on"
        raise InputError("GG-ROPE", keys.where, found, f"{head_dim // 2} from 1 on")
    frequencies = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    factor = shortest(factors.max())
    rope = Rope(theta, "llama3", factor=factor, low_freq_factor=LOW, high_freq_factor=HIGH)
    for original in original_lengths(frequencies, factors):
        rope = dataclasses.replace(rope, original=original)
        if np.allclose(factors, llama3_factors(rope, head_dim), rtol=1e-4, atol=0):
            return {
                "rope_type": "llama3",
                "rope_theta": theta,
                "factor": factor,
                "low_freq_factor": LOW,
                "high_freq_factor": HIGH,
                "original_max_position_embeddings": original,
            }
    found = f"{ROPE_FREQUENCIES} does not follow Llama 3's rule with factor {factor}"
    raise InputError("GG-ROPE", keys.where, found)


def original_lengths(frequencies: np.ndarray, factors: np.ndarray) -> Iterator[int]:
    """Lengths from which such factors may come: usual ones, then what a factor between says."""
    yield from (8192, *(1 << power for power in range(4, 24)))
    between = np.flatnonzero((factors > factors.min()) & (factors < factors.max()))
    if len(between):
        low, high = 1 / factors.max(), 1 / factors.min()
        smooth = (1 / factors[between[0]] - low) / (high - low)
        turns = LOW + smooth * (HIGH - LOW)
        yield max(1, round(turns * 2 * np.pi / frequencies[between[0]]))


def llama3_factors(rope: Rope, head_dim: int) -> np.ndarray:
    """What Llama 3 divides each rotary frequency by: 1 for fast ones, `factor` for slow ones.

    Returns:
      float32 (head_dim / 2,). Source: llama.cpp's convert_hf_to_gguf.py, which stores these.
    """
    plain = inverse_frequencies(dataclasses.replace(rope, rule="default"), head_dim)
    return plain / inverse_frequencies(rope, head_dim)
