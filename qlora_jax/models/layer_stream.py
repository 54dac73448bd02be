"""Layers' weights on the device in the order asked for: one in use, the next on its way.

thread     read 1   | read 2         | read 3         | ...
copies     copy 0   | copy 1         | copy 2         | ...
device              | compute 0      | compute 1      | ...
"""

from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import jax

from qlora_jax.models.packing import Buffers, Packing
from qlora_jax.placement import to_device

SLOTS = 3  # of host memory: a layer in use, one on its way to the device, one that is read


class LayerSource(Protocol):
    """Where the weights of layers come from.

    Attributes:
      packing: how each layer is packed.
    """

    packing: Packing

    def read(self, layer: int, slot: int) -> Buffers:
        """One layer in host memory: in that of `slot`, or in memory of its own."""


class LayerStream:
    """The layers `order` of a source; a context manager, for it has a thread.

        with LayerStream(source, range(layers)) as weights:
            for _ in range(layers):
                x = layer(x, weights.behind(x))
            jax.block_until_ready(x)        # the memory of its layer is used again

    A copy is started before the layer that it travels beside is queued: on a GPU it waits for what
    was queued before it. It is started when the layer before is done, so that there are two layers'
    buffers on the device, however far the program runs ahead.
    """

    def __init__(self, source: LayerSource, order: Iterable[int]):
        self.source, self.todo, self.turn = source, deque(order), 0
        self.thread = ThreadPoolExecutor(1)
        self.reading: Future[Buffers] | None = None
        self.coming: Buffers | None = None
        self.advance()
        self.advance()

    def behind(self, last: jax.Array) -> Buffers:
        """The next layer, when `last` is there: a result of the computation with the one before."""
        jax.block_until_ready(last)
        buffers = self.coming
        self.advance()
        return buffers

    def advance(self) -> None:
        """Starts the copy of what was read, and reads on into memory that is no longer used."""
        self.coming = None if self.reading is None else to_device(self.reading.result())
        self.reading = None
        if self.todo:
            slot, self.turn = self.turn % SLOTS, self.turn + 1
            self.reading = self.thread.submit(self.source.read, self.todo.popleft(), slot)

    def __enter__(self) -> "LayerStream":
        return self

    def __exit__(self, *error) -> None:
        self.thread.shutdown()
