"""Rotary positions: the angles of every rule that config.json can name, and the rotation."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class Rope:
    """config.json's `rope_parameters`.

    `rule` is `default` or `llama3`; the other fields are the rule's own, and 0 where it has none.
    """

    theta: float = 10000.0
    rule: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 0.0
    high_freq_factor: float = 0.0
    original_max_position_embeddings: int = 0


def inverse_frequencies(rope: Rope, head_dim: int) -> np.ndarray:
    """The angle per position of each pair of channels: (head_dim / 2,) float32, in radians.

    default: theta^(-2i / head_dim). llama3: wavelengths longer than
    original_max / low_freq_factor are stretched by `factor`, those shorter than
    original_max / high_freq_factor stay, and those between are blended.

    Source: Su and others 2021, arXiv 2104.09864; transformers' `_compute_llama3_parameters`.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    inverse = (1.0 / (np.float32(rope.theta) ** exponents)).astype(np.float32)
    if rope.rule == "llama3":
        wavelength = 2 * math.pi / inverse
        original = rope.original_max_position_embeddings
        low, high = rope.low_freq_factor, rope.high_freq_factor
        smooth = (original / wavelength - low) / (high - low)
        blended = (1 - smooth) * inverse / rope.factor + smooth * inverse
        stretched = np.where(wavelength > original / low, inverse / rope.factor, blended)
        inverse = np.where(wavelength < original / high, inverse, stretched).astype(np.float32)
    return inverse


def rotation(
    rope: Rope, head_dim: int, positions: Int[Array, "B S"]
) -> tuple[Float[Array, "B S half"], Float[Array, "B S half"]]:
    """Cosine and sine of every position's angles, float32."""
    inverse = jnp.asarray(inverse_frequencies(rope, head_dim))
    angles = positions.astype(jnp.float32)[..., None] * inverse
    return jnp.cos(angles), jnp.sin(angles)


def rotate(
    x: Float[Array, "B S heads head_dim"],
    cos: Float[Array, "B S half"],
    sin: Float[Array, "B S half"],
) -> Float[Array, "B S heads head_dim"]:
    """Rotates channel i with channel i + head_dim/2, in float32, back to x's dtype.

    Source: the half-split order of transformers' `apply_rotary_pos_emb`.
    """
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)
