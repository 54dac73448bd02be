"""Random arrays of NumPy: jax.random compiles a program for every shape, half a second each."""

import jax
import jax.numpy as jnp
import numpy as np


def normal(seed: int, *shape: int, dtype="float32") -> jax.Array:
    """Standard normal values, the same for the same seed and shape."""
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32), dtype)


def normals_like(tree, seed: int, size: float = 1.0):
    """A tree of the same shapes, every leaf `size` times standard normal values of its own."""
    rng = np.random.default_rng(seed)
    draw = lambda leaf: size * rng.standard_normal(leaf.shape, np.float32)  # noqa: E731
    return jax.tree.map(lambda leaf: jnp.asarray(draw(leaf)), tree)
