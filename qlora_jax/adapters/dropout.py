"""What LoRA does to its input in training."""

import jax
import jax.numpy as jnp
from jaxtyping import Array


def dropped(x: Array, rate: float, key: Array | None) -> Array:
    """`x` with each element zeroed with probability `rate` and the rest scaled by 1 / (1 - rate).

    Without a key, or with rate 0, x itself: evaluation drops nothing.
    """
    if key is None or rate == 0.0:
        return x
    kept = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(kept, x / (1.0 - rate), 0).astype(x.dtype)
