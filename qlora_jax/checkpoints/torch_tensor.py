"""Tensors of a PyTorch file as they are stored: which numbers of which storage each one is."""

import math
from typing import NamedTuple

import ml_dtypes
import numpy as np

DTYPES = {
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "FloatStorage": np.dtype(np.float32),
    "DoubleStorage": np.dtype(np.float64),
    "ByteStorage": np.dtype(np.uint8),
    "CharStorage": np.dtype(np.int8),
    "ShortStorage": np.dtype(np.int16),
    "IntStorage": np.dtype(np.int32),
    "LongStorage": np.dtype(np.int64),
    "BoolStorage": np.dtype(np.bool_),
}


class Storage(NamedTuple):
    """`count` numbers in the member `data/KEY`."""

    key: str
    dtype: np.dtype
    count: int


class TorchEntry(NamedTuple):
    """One tensor: which numbers of which storage, `start` and `stride` counted in numbers."""

    dtype: np.dtype
    shape: tuple[int, ...]
    storage: Storage
    start: int
    stride: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Of the tensor as a C-contiguous array."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def span(self) -> int:
        """Numbers from its first to its last one, those between included."""
        return span(self.shape, self.stride)

    @property
    def contiguous(self) -> bool:
        """Whether its numbers lie in the storage as they lie in a C-contiguous array."""
        step = 1
        for size, stride in zip(self.shape[::-1], self.stride[::-1], strict=True):
            if size != 1 and stride != step:
                return 0 in self.shape
            step *= size
        return True


def span(shape: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """Numbers from a tensor's first to its last; 0 when it is empty."""
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
