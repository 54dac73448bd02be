"""A whole step's memory on a GPU that may not be there, from the program that XLA makes of it.

    gradients   weights, adapter, batch, gradients, temporaries     one micro batch
                + the sum of the micro batches before it
                + optimizer state that stays on the device
    update      weights, adapter, gradients
                + optimizer state that stays, and the pages that pass through

The larger of the two is the step's peak. Not counted: CUDA's context and the workspaces of its
libraries, which memory/gpus.py takes off a GPU's size, and evaluation, which keeps no gradients.
"""

import dataclasses
from typing import Any, NamedTuple

import jax

from pallas_kernels.gpu import Gpu
from qlora_jax.adapters.spec import LoraSpec
from qlora_jax.memory import aot
from qlora_jax.memory.shapes import adapter_shapes, batch_shapes, model_shapes, nbytes
from qlora_jax.models.config import ModelConfig
from qlora_jax.models.decoder import Decoder
from qlora_jax.quantization.policy import QuantizationConfig
from qlora_jax.train.step import gradients
from qlora_jax.weight_names import is_streamed


@dataclasses.dataclass(frozen=True)
class Step:
    """What decides which program a step is.

    Attributes:
      config: of the model.
      spec: of the adapter.
      quantization: of the base; None for a dense one.
      rows: of one micro batch.
      length: tokens of a row, which is packed.
      dtype: of activations and of dense weights.
      stream_weights: which weights live in host memory, one of weight_names.STREAMED.
      remat: what the backward pass keeps, one of models.layers.REMAT.
      accumulation: micro batches of a step.
    """

    config: ModelConfig
    spec: LoraSpec
    quantization: QuantizationConfig | None
    rows: int
    length: int
    dtype: str = "bfloat16"
    stream_weights: str = "off"
    remat: str = "full"
    accumulation: int = 1


class StepMemory(NamedTuple):
    """Bytes of a step.

    Attributes:
      device: the most on the device at once.
      host: the most in pinned host memory at once.
      gradients: XLA's analysis of the gradients alone.
    """

    device: int
    host: int
    gradients: aot.Sizes


def memory_of_step(target: Gpu, step: Step, **state: int) -> StepMemory:
    """Compiles a step's gradients for a GPU, which takes a minute, and adds what is beside them.

    Args:
      state: optimizer state, as for `step_memory`.

    Raises:
      InputError: AOT-PLUGIN.
    """
    return step_memory(aot.sizes(compiled_gradients(target, step)), step, **state)


def step_memory(
    sizes: aot.Sizes, step: Step, *, resident_state: int = 0, pages: int = 0, host_state: int = 0
) -> StepMemory:
    """A step's peak, from what its gradients take.

    Args:
      sizes: of the gradients of one micro batch.
      resident_state: bytes of optimizer state that are on the device all the time.
      pages: bytes of it that are there only while the update passes through them.
      host_state: bytes of it in host memory.
    """
    params = nbytes(adapter_shapes(step.spec, step.config))
    earlier = params if step.accumulation > 1 else 0
    update = sizes.argument + params + pages
    device = resident_state + max(sizes.device + earlier, update)
    return StepMemory(device, sizes.host + host_state, sizes)


def compiled_gradients(target: Gpu, step: Step) -> jax.stages.Compiled:
    """The gradients of one micro batch (train/step.py), compiled for a GPU."""
    shapes = gradient_shapes(target, step)
    lowered = aot.lower(target, gradients_of(step), *shapes)
    copies = step.stream_weights != "off" or step.remat == "offload"
    return lowered.compile(aot.OVERLAP if copies else None)


def gradients_of(step: Step) -> Any:
    """(params, model, batch, dropout_key or None) -> Sums."""

    def function(params, model, batch, key):
        return gradients(params, model, batch, spec=step.spec, dropout_key=key, remat=step.remat)

    return function


def gradient_shapes(target: Gpu, step: Step) -> tuple[Any, ...]:
    """What the gradients are taken of: adapter, model, batch and dropout's key, as shapes."""
    model = model_shapes(step.config, step.quantization, step.dtype)
    weights = {
        name: aot.in_host(target, weight) if is_streamed(name, step.stream_weights) else weight
        for name, weight in model.weights().items()
    }
    key = jax.eval_shape(lambda: jax.random.key(0)) if step.spec.lora_dropout else None
    return (
        adapter_shapes(step.spec, step.config),
        Decoder.from_weights(step.config, weights, step.dtype),
        batch_shapes(step.rows, step.length),
        key,
    )
