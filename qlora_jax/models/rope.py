"""Rotary positions: the angles of every rule that config.json can name, and the rotation."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class Rope:
    """config.json's `rope_parameters`; the fields of other rules than `rule` are at rest.

    Args:
      theta: the base: the longest wavelength is near 2 pi theta positions.
      rule: `default`, `linear`, `dynamic`, `yarn`, `llama3` or `longrope`.
      partial: the share of a head's channels, from the first on, that is rotated.
      factor: how many times longer than in training a text may become.
      attention_factor: what cosine and sine are multiplied by.
      original: the longest text in training, in tokens; for `dynamic` what config.json calls
        `max_position_embeddings`.
      low_freq_factor, high_freq_factor: of llama3.
      beta_fast, beta_slow, truncate: of yarn.
      short_factor, long_factor: of longrope, a number for each pair of channels.
    """

    theta: float = 10000.0
    rule: str = "default"
    partial: float = 1.0
    factor: float = 1.0
    attention_factor: float = 1.0
    original: int = 0
    low_freq_factor: float = 0.0
    high_freq_factor: float = 0.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()

    def rotated(self, head_dim: int) -> int:
        """How many channels of a head are rotated."""
        return int(head_dim * self.partial)


def inverse_frequencies(
    rope: Rope, head_dim: int, length: Int[Array, ""] | int = 0
) -> np.ndarray | Float[Array, " half"]:
    """The angle per position of each pair of channels, float32, in radians.

        default    theta^(-2i / dim)
        linear     divided by `factor`
        dynamic    theta grows with `length` once that is above `original`, others as default
        yarn       long wavelengths divided by `factor`, short ones not, a ramp between
        llama3     the same, with other bounds and another ramp
        longrope   divided by `short_factor`, or by `long_factor` once `length` is above `original`

    Args:
      length: the largest position of the call plus 1; dynamic and longrope alone look at it.

    Sources: Su and others 2021, arXiv 2104.09864; Peng and others 2023, arXiv 2309.00071 (yarn);
    Ding and others 2024, arXiv 2402.13753 (longrope); transformers' modeling_rope_utils.
    """
    dim = rope.rotated(head_dim)
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    if rope.rule == "dynamic":
        longest = jnp.maximum(length, rope.original).astype(jnp.float32)
        growth = rope.factor * longest / rope.original - (rope.factor - 1)
        return 1.0 / (rope.theta * growth ** (dim / (dim - 2))) ** exponents
    plain = (1.0 / (np.float32(rope.theta) ** exponents)).astype(np.float32)
    if rope.rule == "linear":
        return plain / np.float32(rope.factor)
    if rope.rule == "yarn":
        kept = 1 - yarn_ramp(rope, dim)
        return plain / np.float32(rope.factor) * (1 - kept) + plain * kept
    if rope.rule == "llama3":
        return llama3(rope, plain)
    if rope.rule == "longrope":
        factors = (rope.short_factor, rope.long_factor)
        short, long = (plain / np.array(f, np.float32) for f in factors)
        return jnp.where(length > rope.original, long, short)
    return plain


def yarn_ramp(rope: Rope, dim: int) -> Float[np.ndarray, " half"]:
    """0 where a pair of channels keeps its frequency, 1 where it is divided by the factor."""

    def pair_that_turns(times: float) -> float:
        """The pair that turns so often over a text of the original length."""
        turns = rope.original / (times * 2 * math.pi)
        return dim * math.log(turns) / (2 * math.log(rope.theta))

    low, high = pair_that_turns(rope.beta_fast), pair_that_turns(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = high - low or 0.001
    return np.clip((np.arange(dim // 2, dtype=np.float32) - low) / width, 0, 1).astype(np.float32)


def llama3(rope: Rope, plain: Float[np.ndarray, " half"]) -> Float[np.ndarray, " half"]:
    """Wavelengths over original / low_freq_factor are stretched, under original / high not."""
    wavelength = 2 * math.pi / plain
    low, high = rope.low_freq_factor, rope.high_freq_factor
    smooth = (rope.original / wavelength - low) / (high - low)
    blended = (1 - smooth) * plain / rope.factor + smooth * plain
    stretched = np.where(wavelength > rope.original / low, plain / rope.factor, blended)
    return np.where(wavelength < rope.original / high, plain, stretched).astype(np.float32)


def rotation(
    rope: Rope, head_dim: int, positions: Int[Array, "B S"]
) -> tuple[Float[Array, "B S half"], Float[Array, "B S half"]]:
    """Cosine and sine of every position's angles, float32, times the attention factor."""
    inverse = jnp.asarray(inverse_frequencies(rope, head_dim, positions.max() + 1))
    angles = positions.astype(jnp.float32)[..., None] * inverse
    return jnp.cos(angles) * rope.attention_factor, jnp.sin(angles) * rope.attention_factor


def rotate(
    x: Float[Array, "B S heads head_dim"],
    cos: Float[Array, "B S half"],
    sin: Float[Array, "B S half"],
) -> Float[Array, "B S heads head_dim"]:
    """Rotates channel i with channel i + half, in float32, back to x's dtype.

    Channels from 2 * half on, where there are any, stay as they are.

    Source: the half-split order of transformers' `apply_rotary_pos_emb`.
    """
    half = cos.shape[-1]
    first, second, rest = jnp.split(x.astype(jnp.float32), (half, 2 * half), axis=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    turned = [first * cos - second * sin, second * cos + first * sin, rest]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)
