"""Numbers of [-1, 1] to codes of a dynamic 8-bit map, with bitsandbytes' rounding on a CPU."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, UInt8

from pallas_kernels.rounding import rounded

STEPS = 65536  # grid on which codes are looked up


def dynamic_code_of(scaled: Float32[Array, "*shape"], table: np.ndarray) -> UInt8[Array, "*shape"]:
    """The code whose value in `table` is nearest to each number, rounded to a grid of STEPS first.

    A step is 3.1e-5, and zero lies between two: near zero, codes are not the nearest ones.

    Args:
      table: DYNAMIC_SIGNED or DYNAMIC_UNSIGNED, 256 rising values.
    """
    # In float32 as there: in float64 one step of the unsigned map falls beyond a boundary.
    grid = np.float32(-1) + np.arange(STEPS, dtype=np.float32) * np.float32(2 / (STEPS - 1))
    nearest = np.searchsorted((table[:-1] + table[1:]) / 2, grid)
    step = rounded((scaled + 1) * np.float32((STEPS - 1) / 2)) + np.float32(0.5)
    return jnp.asarray(nearest.astype(np.uint8))[jnp.clip(step.astype(jnp.int32), 0, STEPS - 1)]
