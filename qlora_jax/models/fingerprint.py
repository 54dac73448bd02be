"""A short digest of a model's weights, so that a run or an adapter knows its base again."""

import hashlib

import jax
import numpy as np

from qlora_jax.models.decoder import Decoder

PIECE = 1 << 16  # bytes hashed at the start, in the middle and at the end of every array


def fingerprint(model: Decoder) -> str:
    """SHA-256 over every weight's name, shape and dtype and three pieces of its bytes, in hex.

    Not all bytes, so that a model of 70B parameters answers at once; a base that was quantized
    another way, or is another model, differs in the pieces too.
    """
    digest = hashlib.sha256()
    for name, weight in sorted(model.weights().items()):
        for leaf in jax.tree.leaves(weight):
            digest.update(f"{name} {leaf.shape} {leaf.dtype}".encode())
            flat = leaf.reshape(-1)
            count = max(1, PIECE // leaf.dtype.itemsize)
            middle = flat.size // 2
            for piece in (flat[:count], flat[middle : middle + count], flat[-count:]):
                digest.update(np.asarray(piece).tobytes())
    return digest.hexdigest()
