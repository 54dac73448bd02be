"""An array of all layers that is in files: each layer's part is read when it is asked for."""

import math
from collections.abc import Callable

import numpy as np


class StoredArray:
    """As much of an array (L, ...) as can be had without all of it in memory.

    Args:
      shape: with L in front.
      dtype: of what `read` gives.
      read: gives one layer's part.
    """

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype, read: Callable[[int], np.ndarray]):
        self.shape, self.dtype, self.read = shape, np.dtype(dtype), read

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    def __getitem__(self, layer: int) -> np.ndarray:
        """One layer's part; negative numbers count from the last."""
        return self.read(range(self.shape[0])[layer])

    def flat(self, start: int, stop: int) -> np.ndarray:
        """The entries [start, stop) of the flattened array; only their layers are read."""
        each = math.prod(self.shape[1:])
        first, last = start // each, -(-stop // each)
        layers = np.concatenate([self[layer].reshape(-1) for layer in range(first, last)])
        return layers[start - first * each : stop - first * each]
