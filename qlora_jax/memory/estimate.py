"""Bytes by owner, on the device and on the host, of one way to run a step.

    device    weights that live there, adapter, gradients, optimizer state
              + temporaries of one micro batch's gradients: activations, loss, workspace
    host      weights that are streamed, optimizer state that is paged, layer inputs that are kept
              there, the adapter as it began, what files take beyond a step, and the process itself

Shapes say the first exactly; temporaries come from the traced program (liveness.py). The step's
other half, the update, is smaller but for pages of state that pass through: the larger half counts.
"""

import dataclasses
import functools
import math
from collections.abc import Iterable

import jax

from qlora_jax.adapters.spec import LoraSpec
from qlora_jax.memory.choices import Choices
from qlora_jax.memory.liveness import Peak, peak_bytes
from qlora_jax.memory.program import Micro, kept_bytes, operations, traced
from qlora_jax.memory.shapes import adapter_shapes, batch_shapes, nbytes, weights_of
from qlora_jax.models.config import ModelConfig
from qlora_jax.models.families import weight_shapes
from qlora_jax.optim.memory import PAGES_IN_FLIGHT
from qlora_jax.optim.paged import pages_of, state_bytes
from qlora_jax.optim.paged_adamw import ADAMW
from qlora_jax.quantization.tensor import QuantizedTensor
from qlora_jax.train.config import TrainConfig
from qlora_jax.train.loss import LOSS
from qlora_jax.weight_names import is_streamed

DEVICE, HOST = jax.memory.Space.Device, jax.memory.Space.Host
OWNERS = (
    *("base", "scales", "adapter", "gradients", "optimizer", "activations", "loss", "workspace"),
    *("files", "process"),
)
PAGEABLE = ("adapter", "files", "process")

# A run without its arrays and programs, seen on Linux with jax 0.12: Python with jax, flax and this
# package 0.21 GB, transformers and datasets 0.11, tokenizer, rows, orbax, matplotlib 0.07.
# CUDA's driver and libraries, which are mapped and touched, add about 1.3 GB.
PROCESS = 390_000_000
PROCESS_CUDA = PROCESS + 1_300_000_000
# What XLA's compiler keeps for each traced operation: 0.21 to 0.26 MB in programs of 1,100 to 2,300
# operations on a CPU (docs/log.md).
COMPILED_OPERATION = 240_000
IN_FLIGHT = 2  # layers whose weights are on the device: one computing, one coming
OF_EACH_LAYER = 0.9  # of what a layer keeps; the rest, such as positions, is the same for all
LAYERS_READ_AHEAD = 3  # of layers from disk: one coming, one computing, one going
WRITTEN = 3  # copies of an adapter while it is saved and read again
READ_DTYPE_BYTES = 2  # checkpoints hold bfloat16 or float16


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What one way to run a step takes.

    Attributes:
      choices: the way.
      device, host: bytes by owner.
      streamed: bytes of weights that come over in each pass through the layers.
      kept: bytes of layer inputs that go to the host and come back; 0 unless offloaded.
      paged: bytes of optimizer state that come over and go back in each step.
    """

    choices: Choices
    device: dict[str, int]
    host: dict[str, int]
    streamed: int = 0
    kept: int = 0
    paged: int = 0

    @property
    def device_bytes(self) -> int:
        """The most on the device at once."""
        return sum(self.device.values())

    @property
    def host_bytes(self) -> int:
        """The most on the host at once."""
        return sum(self.host.values())

    @property
    def pinned_bytes(self) -> int:
        """Those of the host's that are pinned."""
        return sum(self.host.values()) - sum(self.host[owner] for owner in PAGEABLE)


class Estimator:
    """Estimates ways to run a step of one configuration; what they share is computed once.

    Args:
      micro: the micro batch.
      config: the run.
    """

    def __init__(self, micro: Micro, config: TrainConfig):
        self.micro, self.config = micro, config
        shape, spec = micro.shape, micro.spec
        self.on_gpu = micro.target is not None
        self.model = weights_of(shape, micro.quantization, micro.dtype)
        self.params = nbytes(adapter_shapes(spec, shape))
        self.frozen = nbytes(adapter_shapes(micro.frozen, shape)) if micro.frozen else 0
        self.pages, self.state = optimizer(spec, shape, config)
        self.peak = functools.cache(self.simulated)

    def weights(self, where: Iterable[str]) -> tuple[int, int]:
        """(bytes of codes and dense weights, bytes of scales) of the weights of these names."""
        mine = [self.model[name] for name in where]
        scales = sum(nbytes(w.absmax) for w in mine if isinstance(w, QuantizedTensor))
        return nbytes(mine) - scales, scales

    def split(self, choices: Choices) -> tuple[list[str], list[str]]:
        """The names of the weights that live on the device, and of those that are streamed."""
        stream = memory_of(choices)
        there = [name for name in self.model if self.on_gpu and is_streamed(name, stream)]
        return [name for name in self.model if name not in there], there

    def surely_exceeds(self, choices: Choices, limit: int) -> bool:
        """Whether this way takes more on the device than `limit`, whatever its program is.

        No step is traced for it, and no layer where the layers' inputs are too much already.
        """
        policy, layers = choices.gradient_checkpointing, self.micro.shape.num_hidden_layers
        here, there = self.split(choices)
        known = sum(self.weights(here)) + IN_FLIGHT * sum(self.weights(there)) // layers
        known += self.params + self.frozen + self.gradients
        known += 0 if choices.optim_memory == "host" else self.state
        if policy == "offload":
            return known > limit
        if known + layers * self.micro.input_bytes > limit:
            return True
        return known + OF_EACH_LAYER * layers * self.kept(policy) > limit

    def kept(self, policy: str) -> int:
        """What one layer keeps for the backward pass."""
        known = policy in ("full", "offload")
        return self.micro.input_bytes if known else kept_bytes(self.micro)[policy]

    @property
    def gradients(self) -> int:
        """Bytes of a micro batch's gradients, and of the sum of those before it."""
        return self.params * (1 + (self.config.gradient_accumulation_steps > 1))

    def estimate(self, choices: Choices) -> Estimate:
        """Bytes by owner."""
        stream, policy = memory_of(choices), choices.gradient_checkpointing
        here, there = self.split(choices)
        paged = choices.optim_memory == "host" and self.on_gpu
        page = -(-self.state // self.pages)
        resident = min(choices.resident * page, self.state) if paged else self.state
        passing = min(PAGES_IN_FLIGHT * page, self.state - resident)

        peak = self.peak(stream, policy)
        kept = self.micro.shape.num_hidden_layers * self.kept(policy)
        offloaded = policy == "offload" and self.on_gpu
        activations = 0 if offloaded else min(kept, peak.nbytes)
        loss = min(peak.scoped, peak.nbytes - activations)
        base, scales = self.weights(here)
        batch = nbytes(batch_shapes(self.micro.rows, self.micro.length))
        device = {
            "base": base,
            "scales": scales,
            "adapter": self.params + self.frozen,
            "gradients": self.gradients,
            "optimizer": resident + max(0, passing - peak.nbytes),
            "activations": activations,
            "loss": loss,
            "workspace": peak.nbytes - activations - loss + batch,
        }
        base, scales = self.on_host(there, from_disk=choices.stream_weights == "disk")
        host = {
            "base": base,
            "scales": scales,
            "adapter": self.params,  # as the run began; what is trained is a copy
            "optimizer": self.state - resident,
            "activations": kept if offloaded else 0,
            "workspace": 0 if self.on_gpu else self.compiling(stream, policy),
            "process": PROCESS_CUDA if self.on_gpu else PROCESS,
        }
        # The model is read before the first step, the adapter written between two of them: both
        # take memory that a step takes too.
        step, between = sum(host.values()) - host["process"], host["activations"]
        if not self.on_gpu:
            step += sum(device.values())
            between += self.gradients + peak.nbytes
        reading, writing = self.loading(choices), WRITTEN * self.params
        host["files"] = max(0, reading - step, writing - between)
        return Estimate(
            choices,
            {owner: device.get(owner, 0) for owner in OWNERS},
            {owner: host.get(owner, 0) for owner in OWNERS},
            streamed=sum(self.weights(there)),
            kept=kept if offloaded else 0,
            paged=self.state - resident,
        )

    def simulated(self, stream: str, policy: str) -> Peak:
        """The temporaries on the device, all of them and those of the loss."""
        spaces = [DEVICE] if self.on_gpu else [DEVICE, HOST]
        return peak_bytes(traced(self.micro, stream, policy), spaces, LOSS)

    def compiling(self, stream: str, policy: str) -> int:
        """What the compiler keeps, which is this process."""
        return COMPILED_OPERATION * operations(traced(self.micro, stream, policy))

    def on_host(self, names: list[str], *, from_disk: bool) -> tuple[int, int]:
        """`weights` of what is streamed; of layers that come from disk a few at a time."""
        if not from_disk:
            return self.weights(names)
        share = min(1.0, LAYERS_READ_AHEAD / self.micro.shape.num_hidden_layers)
        base, scales = (int(size * share) for size in self.weights(names))
        return base, scales

    def loading(self, choices: Choices) -> int:
        """The most that the host holds while the files are read (checkpoints/load.py).

        The largest weights come first. Beside what is there already: all layers of one weight, once
        more on their way to where they live, and two tensors as they are stored.
        """
        shapes, (_, there) = weight_shapes(self.micro.shape), self.split(choices)
        if choices.stream_weights == "disk":
            there = []
        held = most = 0
        for name in sorted(self.model, key=lambda name: nbytes(self.model[name]), reverse=True):
            size = nbytes(self.model[name])
            read = 2 * READ_DTYPE_BYTES * math.prod(shapes[name])
            stays = not self.on_gpu or name in there
            most = max(most, held + (1 + stays) * size + read)
            held += stays * size
        return most


def memory_of(choices: Choices) -> str:
    """Where weights are as the compiled program sees it: layers from disk come from the host."""
    return "on" if choices.stream_weights == "disk" else choices.stream_weights


def optimizer(spec: LoraSpec, shape: ModelConfig, config: TrainConfig) -> tuple[int, int]:
    """(pages, bytes) of the optimizer's state."""
    params = adapter_shapes(spec, shape)
    transform = ADAMW[8 if config.optim == "paged_adamw_8bit" else 32](config.learning_rate)
    return pages_of(transform, params), state_bytes(transform, params)
