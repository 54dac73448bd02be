"""Host arrays that JAX's CPU backend takes over without a copy."""

import math

import numpy as np

ALIGNMENT = 64  # bytes; at any other address `jax.device_put` copies (seen with jax 0.12)


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype | type) -> np.ndarray:
    """`np.empty` at an address that is a multiple of 64.

    An array that was handed to `jax.device_put` must not be written to any more.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)
