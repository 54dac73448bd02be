"""What a plan is held against: a GPU that may not be there, or what this machine has left."""

import dataclasses

import jax

from pallas_kernels import gpu
from qlora_jax import process
from qlora_jax.memory.gpus import Card, card, name_of, of_gpu
from qlora_jax.placement import free_device_bytes


@dataclasses.dataclass(frozen=True)
class Budget:
    """The limits of a run.

    Attributes:
      name: of the device, for people.
      device: bytes that programs may take there; on a CPU those of device and host together.
      host: bytes that may be taken of the host; None where the host is not this one.
      how: in words, where the limits come from.
      card: the GPU; None for a CPU, whose memory is the host's.
    """

    name: str
    device: int
    host: int | None
    how: str
    card: Card | None

    def holds(self, device: int, host: int) -> bool:
        """Whether a plan of so many bytes fits."""
        if self.card is None:
            return device + host <= self.device
        return device <= self.device and (self.host is None or host <= self.host)


def of_absent(text: str) -> Budget:
    """A GPU by name or size, in a machine of which nothing is known.

    Raises:
      InputError: GPU-SIZE, GPU-NAME.
    """
    found = card(text)
    return Budget(found.name, found.memory, None, found.how, found)


def of_here(held: int = 0) -> Budget:
    """The first device here, and what this process may still get of its memory.

    Args:
      held: bytes on the device that are counted in the plan and there already.
    """
    room, why = process.available()
    device = jax.local_devices()[0]
    free = free_device_bytes(device)
    if free is None or (target := gpu.here()) is None:
        # What the process has already is in the plan too.
        return Budget(device.device_kind, room + process.resident(), None, why, None)
    name = name_of(device.device_kind)
    free += held
    known = of_gpu(target.gpu, name) if name else Card(device.device_kind, free, "", target.gpu)
    how = f"what XLA may still allocate on it; host: {why}"
    known = dataclasses.replace(known, memory=free, how=how)
    return Budget(device.device_kind, free, room + process.resident(), how, known)
