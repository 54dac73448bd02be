"""What each adapter brings to one matrix of a composition, and the layers of the result stacked."""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from qlora_jax.adapters.adapter import Adapter, Shapes
from qlora_jax.adapters.composed_spec import union_of_targets

Pair = tuple[np.ndarray, np.ndarray]  # A (r, in) and B (out, r)


class Part(NamedTuple):
    """One adapter's A and B of one matrix: it adds factor * B A.

    Attributes:
      factor: the adapter's weight times its scale here.
      name: the adapter's.
      number: its place among the adapters.
    """

    A: Float[np.ndarray, "r in"]
    B: Float[np.ndarray, "out r"]
    factor: float
    name: str
    number: int


def parts_of(
    adapters: Mapping[str, Adapter], weights: Mapping[str, np.ndarray], target: str
) -> Iterator[list[Part]]:
    """Layer by layer, the parts of the adapters that have `target` there; `weights` are (L,)."""
    held = {
        name: tuple(np.asarray(adapter.params[target][kind], np.float32) for kind in "AB")
        for name, adapter in adapters.items()
        if target in adapter.spec.targets
    }
    numbers = {name: number for number, name in enumerate(adapters)}
    scales = {name: adapters[name].spec.scales(target) for name in held}
    for layer in range(num_layers(adapters)):
        ranks = {name: adapters[name].spec.ranks(target)[layer] for name in held}
        yield [
            Part(
                A[layer, : ranks[name]],
                B[layer, :, : ranks[name]],
                float(weights[name][layer]) * float(scales[name][layer]),
                name,
                numbers[name],
            )
            for name, (A, B) in held.items()
            if ranks[name]
        ]


def concatenated(parts: Sequence[Part], dtype: type = np.float32) -> Pair:
    """All rows of A, each times its factor, and all columns of B: their product is the sum."""
    A = np.concatenate([part.A.astype(dtype) * dtype(part.factor) for part in parts])
    return A, np.concatenate([part.B.astype(dtype) for part in parts], axis=1)


def stacked(pairs: Sequence[Pair | None], shape: tuple[int, int]) -> dict[str, jnp.ndarray]:
    """Layers of unequal rank padded with zeros to the largest: A (L, r, in), B (L, out, r)."""
    (out, width), layers = shape, len(pairs)
    rank = max(len(pair[0]) for pair in pairs if pair is not None)
    A = np.zeros((layers, rank, width), np.float32)
    B = np.zeros((layers, out, rank), np.float32)
    for layer, pair in enumerate(pairs):
        if pair is not None:
            A[layer, : len(pair[0])], B[layer, :, : len(pair[0])] = pair
    return {"A": jnp.asarray(A), "B": jnp.asarray(B)}


def row_owners(adapters: Mapping[str, Adapter]) -> dict[str, np.ndarray]:
    """Which adapter, by number, each row of A comes from in their concatenation: int32 (L, r).

    ranks of a 2 2, of b 1 3        0 0 1 0 0
                                    0 0 1 1 1        padding says 0
    """
    owners = {}
    for target in union_of_targets(adapter.spec for adapter in adapters.values()):
        rows = [
            [
                number
                for number, adapter in enumerate(adapters.values())
                if target in adapter.spec.targets
                for _ in range(adapter.spec.ranks(target)[layer])
            ]
            for layer in range(num_layers(adapters))
        ]
        owners[target] = np.zeros((len(rows), max(map(len, rows))), np.int32)
        for layer, row in enumerate(rows):
            owners[target][layer, : len(row)] = row
    return owners


def num_layers(adapters: Mapping[str, Adapter]) -> int:
    """Of the model that all are for."""
    return next(iter(adapters.values())).spec.num_layers


def shapes_of(adapters: Mapping[str, Adapter]) -> Shapes:
    """(out, in) of every linear that one of them adapts."""
    return {name: shape for one in adapters.values() for name, shape in one.shapes.items()}
