"""A decoder whose layers' weights come one layer at a time, for models larger than memory."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

import jax
import numpy as np

from qlora_jax.models.config import ModelConfig
from qlora_jax.models.decoder import Decoder
from qlora_jax.models.families import module_shapes
from qlora_jax.models.layer_stream import LayerSource
from qlora_jax.models.packing import Buffers, Packing
from qlora_jax.placement import to_host
from qlora_jax.quantization.tensor import QuantizedTensor
from qlora_jax.weight_names import LAYERS


class Layers(LayerSource, Protocol):
    """A source of layers that also shows what it holds."""

    def weights(self) -> Mapping[str, Any]:
        """Every weight of the layers by its stacked name; a layer is read when it is indexed."""


@dataclasses.dataclass(frozen=True, eq=False)
class LayerwiseDecoder:
    """What training asks of a model, without its layers in memory; run by train/pipeline.py.

    Attributes:
      ends: the embedding, the last norm and the head, in memory.
      layers: what lies between them.
    """

    ends: Decoder
    layers: Layers

    @property
    def config(self) -> ModelConfig:
        return self.ends.config

    @property
    def dtype(self) -> str:
        """Of the activations and the dense weights."""
        return self.ends.dtype

    def weights(self) -> dict[str, Any]:
        """Every weight by its stacked name; those of layers are read where they are indexed."""
        return self.ends.weights() | dict(self.layers.weights())

    def module_shapes(self) -> dict[str, tuple[int, int]]:
        """As of `Decoder`."""
        return module_shapes(self.config)


class LayersInHost:
    """The layers of a stacked model, each in pinned host memory in buffers of its own."""

    def __init__(self, model: Decoder):
        stacked = model.weights()
        self.stacked = {name: w for name, w in stacked.items() if name.startswith(LAYERS)}
        inner = {name.removeprefix(LAYERS): w for name, w in self.stacked.items()}
        whole = jax.tree.map(np.asarray, inner)
        one = jax.tree.map(lambda leaf: leaf[0], whole)
        packed = [w for w in inner.values() if isinstance(w, QuantizedTensor) and w.by_rows]
        self.packing = Packing.of(model.config, one, packed[0].layout if packed else "bnb")
        leaves = jax.tree.leaves(whole)
        self.each = [
            to_host(self.packed([np.asarray(leaf[layer]) for leaf in leaves]))
            for layer in range(model.config.num_hidden_layers)
        ]

    def packed(self, leaves: list[np.ndarray]) -> Buffers:
        """The arrays of one layer in buffers."""
        sizes = self.packing.sizes().items()
        buffers = {dtype: np.empty(size, dtype) for dtype, size in sizes}
        for part, leaf in zip(self.packing.parts(buffers), leaves, strict=True):
            np.copyto(part, leaf)
        return buffers

    def read(self, layer: int, slot: int) -> Buffers:
        """One layer, where it lies."""
        return self.each[layer]

    def weights(self) -> Mapping[str, Any]:
        """The stacked model's."""
        return self.stacked


def layerwise(model: Decoder) -> LayerwiseDecoder:
    """A model in memory as one whose layers come one by one, from pinned host memory.

    The same numbers by programs of another kind: no loop over layers is compiled.
    """
    ends = {name: w for name, w in model.weights().items() if not name.startswith(LAYERS)}
    return LayerwiseDecoder(Decoder(model.config, ends, model.dtype), LayersInHost(model))
