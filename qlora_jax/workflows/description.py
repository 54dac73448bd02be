"""What `inspect` says of a path: facts, files, and one row a weight."""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Weight:
    """Layers of one weight that have the same shape and are stored alike.

    Attributes:
      name: Hugging Face's name without the layer's number.
      layers: how many there are; 1 for a weight outside the layers.
      shape: of one layer's dense matrix.
      stored: a dtype, a GGUF block type, or the code, block size and scales of a 4-bit weight.
      nbytes: of all layers as stored, scales included.
    """

    name: str
    layers: int
    shape: tuple[int, ...]
    stored: str
    nbytes: int

    @property
    def parameters(self) -> int:
        """Numbers in all layers."""
        return self.layers * math.prod(self.shape)


@dataclass(frozen=True)
class Description:
    """What was found at a path.

    Attributes:
      path: as it was given.
      kind: "model", "4-bit model", "GGUF", "adapter", "Orbax adapter" or "Orbax checkpoint".
      facts: the fields of its configuration that say how large it is and how it computes.
      weights: in the model's order.
      targets: what `target_modules` can name; of an adapter, what it adapts.
      files: those that hold the weights.
      tokenizer: the files of its tokenizer, or where it is made from; empty if there is none.
      made: what qlora_jax.json says about where it comes from; empty if there is none.
    """

    path: str
    kind: str
    facts: dict[str, Any]
    weights: list[Weight]
    targets: list[str]
    files: list[str]
    tokenizer: list[str] = field(default_factory=list)
    made: dict[str, Any] = field(default_factory=dict)

    @property
    def parameters(self) -> int:
        """Numbers in all weights."""
        return sum(weight.parameters for weight in self.weights)

    @property
    def nbytes(self) -> int:
        """Bytes of all weights as stored."""
        return sum(weight.nbytes for weight in self.weights)

    @property
    def bits_per_parameter(self) -> float:
        """Of all weights as stored, scales included."""
        return 8 * self.nbytes / max(1, self.parameters)


def grouped(weights: Iterable[Weight]) -> list[Weight]:
    """Single layers counted together where name, shape and storage agree, in the order seen."""
    layers, nbytes = Counter(), Counter()
    for weight in weights:
        key = (weight.name, weight.shape, weight.stored)
        layers[key] += weight.layers
        nbytes[key] += weight.nbytes
    return [
        Weight(name, count, shape, stored, nbytes[name, shape, stored])
        for (name, shape, stored), count in layers.items()
    ]
