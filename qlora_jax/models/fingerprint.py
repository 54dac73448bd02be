"""A short digest of a model's weights, so that a run or an adapter knows its base again."""

import hashlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from qlora_jax.models.decoder import Decoder
from qlora_jax.models.layerwise import LayerwiseDecoder
from qlora_jax.models.stored import StoredArray
from qlora_jax.quantization.tensor import QuantizedTensor

PIECE = 1 << 16  # bytes hashed at the start, in the middle and at the end of every array


def fingerprint(model: Decoder | LayerwiseDecoder) -> str:
    """SHA-256 over every weight's name, shape and dtype and pieces of its bytes, in hex.

    Of stacked layers the first and the last are looked at, and three pieces of each array, so that
    a model of 70B parameters answers at once: another model, or one quantized another way, differs
    there too. 4-bit codes count in bitsandbytes' order, whatever order a backend wants them in.
    """
    digest = hashlib.sha256()
    for name, weight in sorted(model.weights().items()):
        for array in arrays(weight):
            digest.update(f"{name} {array.shape} {array.dtype}".encode())
            count = max(1, PIECE // array.dtype.itemsize)
            for start in (0, array.size // 2, max(0, array.size - count)):
                digest.update(piece(array, start, min(start + count, array.size)).tobytes())
    return digest.hexdigest()


def piece(array: jax.Array | np.ndarray | StoredArray, start: int, stop: int) -> np.ndarray:
    """The entries [start, stop) of an array that is flattened."""
    if isinstance(array, StoredArray):
        return array.flat(start, stop)
    if isinstance(array, jax.Array) and array.is_fully_addressable and on_cpu(array):
        array = np.asarray(array)  # the memory itself: no program is compiled for its shape
    return np.asarray(array.reshape(-1)[start:stop])


def on_cpu(array: jax.Array) -> bool:
    """Whether an array lives in a CPU's memory, where NumPy reads it without a copy."""
    return all(device.platform == "cpu" for device in array.devices())


def arrays(weight: Any) -> Iterator[Any]:
    """A dense weight itself; of a 4-bit one codes and scales, first and last layer."""
    if not isinstance(weight, QuantizedTensor):
        yield weight
        return
    layers = (weight[0], weight[-1]) if weight.lead else (weight,)
    for layer in layers:
        yield from jax.tree.leaves(layer.unpack())
