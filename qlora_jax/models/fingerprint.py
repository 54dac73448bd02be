"""A short digest of a model's weights, so that a run or an adapter knows its base again."""

import hashlib
from collections.abc import Iterator

import jax
import numpy as np

from qlora_jax.models.decoder import Decoder
from qlora_jax.quantization.tensor import QuantizedTensor

PIECE = 1 << 16  # bytes hashed at the start, in the middle and at the end of every array


def fingerprint(model: Decoder) -> str:
    """SHA-256 over every weight's name, shape and dtype and pieces of its bytes, in hex.

    Of stacked layers the first and the last are looked at, and three pieces of each array, so that
    a model of 70B parameters answers at once: another model, or one quantized another way, differs
    there too. 4-bit codes count in bitsandbytes' order, whatever order a backend wants them in.
    """
    digest = hashlib.sha256()
    for name, weight in sorted(model.weights().items()):
        for array in arrays(weight):
            digest.update(f"{name} {array.shape} {array.dtype}".encode())
            flat = array.reshape(-1)
            count = max(1, PIECE // array.dtype.itemsize)
            middle = flat.size // 2
            for piece in (flat[:count], flat[middle : middle + count], flat[-count:]):
                digest.update(np.asarray(piece).tobytes())
    return digest.hexdigest()


def arrays(weight: jax.Array | QuantizedTensor) -> Iterator[jax.Array]:
    """A dense weight itself; of a 4-bit one codes and scales, first and last layer."""
    if not isinstance(weight, QuantizedTensor):
        yield weight
        return
    layers = (weight[0], weight[-1]) if weight.lead else (weight,)
    for layer in layers:
        yield from jax.tree.leaves(layer.unpack())
