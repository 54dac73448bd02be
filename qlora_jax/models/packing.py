"""A layer's weights in a few buffers, one a dtype, so that a few copies bring them to the device.

    uint8      q_proj codes | q_proj scales | k_proj codes | ...
    float32    q_proj scales of scales | q_proj offset | ...
    bfloat16   input_layernorm | ...

A layer has about thirty arrays, and the calls that start their copies take longer than small
layers compute (docs/log.md).
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from qlora_jax.models.block import Block
from qlora_jax.models.config import ModelConfig
from qlora_jax.quantization.tensor import QuantizedTensor

Buffers = dict[str, Any]  # by dtype: flat arrays, in NumPy or on a device


@dataclasses.dataclass(frozen=True)
class Packing:
    """Where each array of a layer lies in its buffers; static, and equal for equal layers.

    Attributes:
      config: of the model.
      tree: the layer's weights by their names inside the layer, as a structure.
      leaves: (dtype, shape) of each array in it.
      layout: the order of the codes that the kernels want; as they are packed, they may have
        bitsandbytes'.
    """

    config: ModelConfig
    tree: Any
    leaves: tuple[tuple[str, tuple[int, ...]], ...]
    layout: str

    @staticmethod
    def of(config: ModelConfig, weights: dict[str, Any], layout: str) -> "Packing":
        """The packing of layers that have these weights, each with `shape` and `dtype` alone."""
        leaves, tree = jax.tree.flatten(weights)
        described = tuple((np.dtype(leaf.dtype).name, tuple(leaf.shape)) for leaf in leaves)
        return Packing(config, tree, described, layout)

    def sizes(self) -> dict[str, int]:
        """How many numbers each buffer holds."""
        sizes: dict[str, int] = {}
        for dtype, shape in self.leaves:
            sizes[dtype] = sizes.get(dtype, 0) + math.prod(shape)
        return sizes

    @property
    def nbytes(self) -> int:
        """Bytes of one layer."""
        return sum(np.dtype(dtype).itemsize * size for dtype, size in self.sizes().items())

    def parts(self, buffers: Buffers) -> Iterator[Any]:
        """Each array, as a part of its buffer: in NumPy a view of it."""
        starts = dict.fromkeys(self.sizes(), 0)
        for dtype, shape in self.leaves:
            start = starts[dtype]
            starts[dtype] += math.prod(shape)
            yield buffers[dtype][start : starts[dtype]].reshape(shape)

    def block(self, buffers: Buffers) -> Block:
        """The layer, inside a program: its arrays of their own, their codes in `layout`."""
        weights = jax.tree.unflatten(self.tree, self.parts(buffers))
        ordered = {name: self.ordered(weight) for name, weight in weights.items()}
        # Or XLA makes them anew where they are used.
        return Block(self.config, jax.lax.optimization_barrier(ordered))

    def ordered(self, weight: jax.Array | QuantizedTensor) -> jax.Array | QuantizedTensor:
        if not isinstance(weight, QuantizedTensor) or weight.layout == self.layout:
            return weight
        return weight.prepack(self.layout)
