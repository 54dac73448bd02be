"""The next token from its logits: greedy, or drawn after temperature, top-k, top-p and min-p.

Every rule is a pure function of float32 logits (..., V): what it takes away becomes -inf.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from qlora_jax.errors import InputError

LARGEST = 3.4e38  # about that of float32


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a token is chosen; hashable, so static under jit: rules that are off cost nothing.

    The rules that are on apply in this order, which is transformers'.

    Args:
      repetition_penalty: over 1 makes tokens that were seen less likely; 1 is off.
      temperature: over 1 flattens, below 1 sharpens; 0 is greedy, and the rest has no effect.
      top_k: keep the k likeliest tokens; 0 is off.
      top_p: keep the likeliest tokens until their probabilities add up to this; 1 is off.
      min_p: keep tokens of at least this part of the likeliest one's probability; 0 is off.

    Raises:
      InputError: GEN-SAMPLING, a value out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self):
        ranges = {
            "temperature": (0 <= self.temperature <= LARGEST, "0 or more, finite in float32"),
            "top_k": (
                self.top_k >= 0 and self.top_k == int(self.top_k),
                "a whole number, 0 is off",
            ),
            "top_p": (0 < self.top_p <= 1, "over 0, at most 1"),
            "min_p": (0 <= self.min_p <= 1, "0 to 1"),
            "repetition_penalty": (
                0 < self.repetition_penalty <= LARGEST,
                "over 0, finite in float32",
            ),
        }
        for name, (fits, expected) in ranges.items():
            if not fits:
                raise InputError("GEN-SAMPLING", name, f"{getattr(self, name)}", expected)


GREEDY = Sampling()


def sample(
    logits: Float[Array, "B V"],
    keys: Array,
    sampling: Sampling,
    seen: Bool[Array, "B V"] | None = None,
) -> Int[Array, " B"]:
    """One token id (int32) a row.

    Args:
      logits: float32.
      keys: one a row, so that no row depends on another, or one for all; unused when greedy.
      sampling: static under jit.
      seen: tokens so far, for the repetition penalty.
    """
    logits = logits.astype(jnp.float32)
    if sampling.repetition_penalty != 1 and seen is not None:
        logits = penalize_repetition(logits, seen, sampling.repetition_penalty)
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    # The largest is 0 first: at a temperature near 0 all others become -inf, and never all of them.
    logits = (logits - logits.max(-1, keepdims=True)) / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        logits = keep_top_k(logits, sampling.top_k)
    if sampling.top_p < 1:
        logits = keep_top_p(logits, sampling.top_p)
    if sampling.min_p > 0:
        logits = keep_min_p(logits, sampling.min_p)
    if keys.ndim:
        return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
    return jax.random.categorical(keys, logits, axis=-1).astype(jnp.int32)


def penalize_repetition(
    logits: Float[Array, "*rows V"], seen: Bool[Array, "*rows V"], penalty: float
) -> Float[Array, "*rows V"]:
    """Logits of seen tokens divided by `penalty` where positive, multiplied where negative.

    Source: Keskar and others 2019, arXiv 1909.05858, as transformers has it.
    """
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def keep_top_k(logits: Float[Array, "*rows V"], k: int) -> Float[Array, "*rows V"]:
    """The k largest, and what equals the smallest of them."""
    smallest = jax.lax.top_k(logits, k)[0][..., -1:]
    return jnp.where(logits >= smallest, logits, -jnp.inf)


def keep_top_p(logits: Float[Array, "*rows V"], p: float) -> Float[Array, "*rows V"]:
    """The fewest likeliest tokens whose probabilities reach `p`, and what equals the last of them.

    Source: Holtzman and others 2019, arXiv 1904.09751.
    """
    ordered = jnp.sort(logits, axis=-1, descending=True)
    probabilities = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    kept = jnp.sum(before < p, axis=-1, keepdims=True)
    smallest = jnp.take_along_axis(ordered, jnp.maximum(kept, 1) - 1, axis=-1)
    return jnp.where(logits >= smallest, logits, -jnp.inf)


def keep_min_p(logits: Float[Array, "*rows V"], p: float) -> Float[Array, "*rows V"]:
    """Tokens whose probability is at least `p` times the largest.

    Source: Nguyen and others 2024, arXiv 2407.01082.
    """
    smallest = jnp.max(logits, axis=-1, keepdims=True) + math.log(p)
    return jnp.where(logits >= smallest, logits, -jnp.inf)
