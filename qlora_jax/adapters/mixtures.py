"""PEFT's mixtures: A of A and B of B, entry by entry, some entries left out, some signs outvoted.

The delta is a product of two sums, so it has the products of one adapter's B and another's A too.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from qlora_jax.adapters.parts import Pair, Part

SIGNS = ("total", "frequency")


class Mixture(NamedTuple):
    """How the A of several adapters become one.

    Attributes:
      prune: leaves out entries of one array, given (array, density, random bits of it); None
        leaves out none.
      elect: an entry's sign is elected, and only the adapters that have it there are averaged.
    """

    prune: Callable[[np.ndarray, float, np.random.SeedSequence], np.ndarray] | None
    elect: bool


def largest(array: np.ndarray, density: float, seed: np.random.SeedSequence) -> np.ndarray:
    """The int(density * size) entries of largest size, the first ones of equals; others zero."""
    size = np.abs(array).reshape(-1)
    count = int(density * size.size)
    if count == 0:
        return np.zeros_like(array)
    least = np.partition(size, size.size - count)[size.size - count]
    kept = size > least
    kept[np.flatnonzero(size == least)[: count - kept.sum()]] = True
    return np.where(kept.reshape(array.shape), array, 0)


def at_random(array: np.ndarray, density: float, seed: np.random.SeedSequence) -> np.ndarray:
    """Each entry kept with probability `density` and divided by it, so that its mean stays."""
    # Of numpy's random numbers only the raw ones are promised to stay the same.
    raw = np.random.Philox(seed).random_raw(array.size).reshape(array.shape)
    kept = (raw >> np.uint64(11)) * 2.0**-53 < density
    return np.where(kept, array / np.float32(density), 0)


MIXTURES = {
    "linear": Mixture(None, elect=False),
    "magnitude_prune": Mixture(largest, elect=False),
    "ties": Mixture(largest, elect=True),
    "dare_linear": Mixture(at_random, elect=False),
    "dare_ties": Mixture(at_random, elect=True),
}


def mixture(
    parts: Sequence[Part], how: Mixture, density: float, sign: str, place: Sequence[int]
) -> Pair:
    """(A, B) of one matrix, float32: sqrt(|factor|) on each side, the factor's sign on A.

    Args:
      parts: of equal rank.
      how: what is done to their entries.
      density: the share of entries that is kept.
      sign: total or frequency.
      place: numbers that tell this matrix from all others, for random bits of its own.
    """
    roots = np.array([abs(part.factor) ** 0.5 for part in parts], np.float32)
    signs = np.array([-1 if part.factor < 0 else 1 for part in parts], np.float32)
    sides = []
    for side, factors in enumerate((roots * signs, roots)):
        arrays = [part[side] for part in parts]
        if how.prune is not None and density < 1:
            seeds = [np.random.SeedSequence((*place, part.number, side)) for part in parts]
            pairs = zip(arrays, seeds, strict=True)
            arrays = [how.prune(array, density, seed) for array, seed in pairs]
        sides.append(summed(np.stack(arrays), factors, sign if how.elect else None))
    return tuple(sides)


def summed(arrays: np.ndarray, factors: np.ndarray, sign: str | None) -> np.ndarray:
    """The weighted sum over the first axis; with `sign`, of the entries of the elected sign alone.

    These are divided by how many there are, as PEFT does, and not by their weights.
    """
    weighted = arrays * factors[:, None, None]
    if sign is None:
        return weighted.sum(0)
    chosen = np.sign(arrays) == elected(arrays, sign)
    return (weighted * chosen).sum(0) / np.maximum(chosen.sum(0), 1).astype(np.float32)


def elected(arrays: np.ndarray, sign: str) -> np.ndarray:
    """1 or -1 for each entry: the sign of the sum of the values, or of their signs; 1 for 0."""
    votes = arrays if sign == "total" else np.sign(arrays)
    return np.where(votes.sum(0) >= 0, 1, -1)
