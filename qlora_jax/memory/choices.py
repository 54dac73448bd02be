"""What `auto` may become: the ways to run a step, the quickest first."""

import dataclasses
from collections.abc import Iterator

from qlora_jax.models.remat import POLICIES
from qlora_jax.train.config import TrainConfig

# How much longer a step takes grows along each; layers from disk keep no more than their inputs.
STREAMING = ("off", "on", "all", "disk")
FROM_DISK = ("full", "offload")


@dataclasses.dataclass(frozen=True)
class Choices:
    """How a run is laid out in memory; every value is a key's, and none is `auto`.

    Attributes:
      stream_weights: off, on, all or disk.
      gradient_checkpointing: none, save-attention, full or offload.
      optim_memory: device or host.
      resident: with optim_memory host, pages of the state that stay on the device.
    """

    stream_weights: str
    gradient_checkpointing: str
    optim_memory: str
    resident: int = 0


def candidates(config: TrainConfig, *, on_gpu: bool) -> Iterator[Choices]:
    """Every way that the configuration leaves open, in order of the time that a step takes.

    Moving the optimizer's pages costs a fraction of computing layers again, and that less than
    moving all weights twice. On a CPU, where both memories are one, moving saves nothing: `auto`
    is off, device, and what is kept.
    """
    streaming = asked(config.stream_weights, STREAMING if on_gpu else STREAMING[:1])
    policies = asked(config.gradient_checkpointing, POLICIES if on_gpu else POLICIES[:3])
    optimizer = asked(config.optim_memory, ("device", "host") if on_gpu else ("device",))
    for stream in streaming:
        for policy in policies:
            if stream == "disk" and policy not in FROM_DISK:
                continue
            for memory in optimizer:
                yield Choices(stream, policy, memory)


def asked(value: str, otherwise: tuple[str, ...]) -> tuple[str, ...]:
    """The value that was asked for, or what `auto` may become."""
    return otherwise if value == "auto" else (value,)
