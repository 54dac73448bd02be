"""A model's layers in their files: one is read at a time, into memory that is used again.

Nothing is mapped (files.py says why). What was read stays in the system's page cache while there is
room, and is dropped without a write when there is none: a model a little larger than memory is read
from disk in part. Fresh memory takes longer than the reading (docs/log.md), so there is none.
"""

import dataclasses
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from pallas_kernels.nf4_matmul.layout import prepack
from pallas_kernels.quantize.api import DoubleQuantized
from qlora_jax.checkpoints.aligned import aligned_empty
from qlora_jax.checkpoints.bnb4bit import QuantState, check_scales
from qlora_jax.checkpoints.finite import check_finite
from qlora_jax.checkpoints.load import Loader
from qlora_jax.models.layer_stream import SLOTS
from qlora_jax.models.packing import Buffers, Packing
from qlora_jax.models.stored import StoredArray
from qlora_jax.quantization.tensor import QuantizedTensor
from qlora_jax.weight_names import LAYERS

F32, U8 = np.dtype(np.float32), np.dtype(np.uint8)


@dataclasses.dataclass(frozen=True)
class Part:
    """One array of every layer.

    Attributes:
      shape: of one layer's.
      dtype: as it is in memory.
      fill: reads that of a layer into an array.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    fill: Callable[[int, np.ndarray], None]

    def of(self, layer: int) -> np.ndarray:
        """That of one layer, in memory of its own."""
        array = aligned_empty(self.shape, self.dtype)
        self.fill(layer, array)
        return array


class LayerFiles:
    """The layers of a 4-bit or dense folder, as a source for models/layer_stream.py.

    Args:
      loader: of the folder, quantizing nothing; its source is closed when this is dropped.
      layout: the order of codes that the kernels want; the device makes it of bitsandbytes'.

    Attributes:
      packing: how each layer is packed.
    """

    def __init__(self, loader: Loader, layout: str):
        self.loader, self.source, self.layout = loader, loader.source, layout
        self.count = loader.model_config.num_hidden_layers
        stacked = [name for name in loader.table if name.startswith(LAYERS)]
        self.parts = {name.removeprefix(LAYERS): self.weight(name) for name in stacked}
        self.packing = Packing.of(loader.model_config, self.parts, layout)
        self.slots: list[Buffers] = [{} for _ in range(SLOTS)]
        weakref.finalize(self, self.source.close)

    def weight(self, stacked: str) -> Part | QuantizedTensor:
        """One weight of every layer: a Part, or a tensor of Parts."""
        names = self.loader.table[stacked]
        if names[0] not in self.loader.states:
            shape = tuple(self.loader.shapes[stacked])
            return Part(shape, self.loader.dtype, lambda i, out: self.read_dense(names[i], out))
        states = [self.loader.states[name] for name in names]
        first = states[0]
        codes_shape, absmax_shape = first.leaf_shapes()

        def scales(i: int, out: np.ndarray, key: str) -> None:
            self.source.read_into(f"{names[i]}.{key}", out)
            check_scales(out, states[i], self.loader.where, f"{names[i]}.{key}")

        def absmax(i: int, out: np.ndarray) -> None:
            self.source.read_into(f"{names[i]}.absmax", out)

        if first.offset is None:
            absmax_part = Part(absmax_shape, F32, lambda i, out: scales(i, out, "absmax"))
        else:
            absmax_part = DoubleQuantized(
                Part(absmax_shape, U8, absmax),
                Part(nested_shape(first), F32, lambda i, out: scales(i, out, "nested_absmax")),
                Part((), F32, lambda i, out: out.fill(states[i].offset)),
            )
        return QuantizedTensor(
            codes=Part(codes_shape, U8, lambda i, out: self.source.read_into(names[i], out)),
            absmax=absmax_part,
            shape=first.shape,
            dtype=first.dtype,
            block_size=first.block_size,
            kind=first.kind,
        )

    def read_dense(self, name: str, out: np.ndarray) -> None:
        """A dense weight in the loader's dtype, finite."""
        if self.source.dtype(name) == out.dtype.name:
            self.source.read_into(name, out)
            check_finite(out, self.loader.where, name)
        else:
            np.copyto(out, self.loader.read(name))

    def read(self, layer: int, slot: int) -> Buffers:
        """One layer in the memory of `slot`, over what was there.

        Raises:
          InputError: ST-CHANGED, PT-CHANGED, PT-CRC, W-FINITE.
        """
        buffers = self.slots[slot]
        if not buffers:
            sizes = self.packing.sizes().items()
            buffers |= {dtype: aligned_empty((size,), np.dtype(dtype)) for dtype, size in sizes}
        places = self.packing.parts(buffers)
        for part, place in zip(jax.tree.leaves(self.parts), places, strict=True):
            part.fill(layer, place)
        return buffers

    def weights(self) -> dict[str, Any]:
        """Every weight by its stacked name, its arrays `StoredArray`s in the kernels' order."""
        return dict(self.each_stored())

    def each_stored(self) -> Iterator[tuple[str, Any]]:
        for name, weight in self.parts.items():
            stored = jax.tree.map(self.stored, weight)
            if isinstance(weight, QuantizedTensor) and weight.by_rows:
                codes = self.stored(weight.codes, lambda codes: prepack(codes, self.layout))
                stored = dataclasses.replace(stored, codes=codes, layout=self.layout)
            yield LAYERS + name, stored

    def stored(self, part: Part, then: Callable = lambda array: array) -> StoredArray:
        """A part as an array of all layers."""
        shape = (self.count, *part.shape)
        return StoredArray(shape, part.dtype, lambda layer: then(part.of(layer)))


def nested_shape(state: QuantState) -> tuple[int, ...]:
    """Of the scales of scales."""
    return state.specs()["nested_absmax"][1]
