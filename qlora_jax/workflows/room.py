"""The memory of a run: laid out before it, refused if too little, explained if it runs out."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator

import jax

from pallas_kernels import gpu
from pallas_kernels.quantize.api import DoubleQuantized
from qlora_jax import process
from qlora_jax.adapters.adapter import Adapter
from qlora_jax.errors import DoesNotFit, first_line
from qlora_jax.memory import budget
from qlora_jax.memory.changes import changes
from qlora_jax.memory.estimate import Estimator
from qlora_jax.memory.planner import Plan, plan, plan_of
from qlora_jax.memory.program import Micro
from qlora_jax.models import Decoder, ModelConfig
from qlora_jax.models.layerwise import LayerwiseDecoder
from qlora_jax.placement import in_host
from qlora_jax.quantization.policy import QuantizationConfig
from qlora_jax.quantization.tensor import QuantizedTensor
from qlora_jax.train.config import TrainConfig
from qlora_jax.weight_names import HEAD, LAYERS

ADVICE = 3  # changes that an error names; the plan has all


def laid_out(shape: ModelConfig, config: TrainConfig, row_length: int) -> Plan:
    """The plan of a run on this machine's device, before its model is loaded.

    Args:
      row_length: tokens of the longest row.
    """
    return plan(shape, config.replace(max_seq_length=row_length), budget.of_here())


def laid_out_for(
    model: Decoder | LayerwiseDecoder,
    lora: Adapter,
    config: TrainConfig,
    row_length: int,
    frozen: Adapter | None = None,
) -> Plan:
    """The plan of a run on a model that is loaded, and lives where it does.

    Args:
      row_length: 0 where the longest row is not known: then it is max_seq_length.
      frozen: what `lora` is trained on top of.
    """
    target = gpu.here()
    micro = Micro(
        model.config,
        lora.spec,
        quantization_of(model),
        model.dtype,
        config.batch_size,
        row_length or config.max_seq_length,
        target and target.gpu,
        frozen and frozen.spec,
    )
    config = config.replace(stream_weights=streaming_of(model))
    return plan_of(micro, config, budget.of_here(held_bytes(model, frozen)))


def refuse_too_large(found: Plan, say: Callable[[str], object]) -> None:
    """Prints the table of a plan that does not fit, and raises.

    Raises:
      DoesNotFit: RUN-MEMORY, with what would help.
    """
    if not found.fits:
        needs = f"the run needs {gb(found.device_bytes)} on the device"
        needs += f", {gb(found.host_bytes)} of the host"
        limit = f"at most {gb(found.budget.device)}: {found.budget.how}"
        raise too_large("RUN-MEMORY", found, needs, limit, say)


@contextlib.contextmanager
def explained(config: TrainConfig, found: Plan, say: Callable[[str], object]) -> Iterator[None]:
    """Within it an allocation that fails is answered with the plan and what would help.

    Raises:
      DoesNotFit: RUN-OOM.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not process.ran_out(error):
            raise
        less = changes(Estimator(found.micro, config), config, found.estimate, found.budget)
        found = dataclasses.replace(found, fits=False, changes=less)
        ran_out = f"memory ran out: {first_line(error)}"
        planned = f"the {gb(found.device_bytes)} of the plan"
        raise too_large("RUN-OOM", found, ran_out, planned, say) from error


def too_large(
    code: str, found: Plan, what: str, limit: str, say: Callable[[str], object]
) -> DoesNotFit:
    """The error of a plan that does not hold, its table printed, with the cheapest changes."""
    for line in found.table():
        say(line)
    advice = ", or ".join(change.change for change in found.changes[:ADVICE])
    return DoesNotFit(code, found.budget.name, what, limit, advice)


def streaming_of(model: Decoder | LayerwiseDecoder) -> str:
    """Where a model's weights live, as `stream_weights` has it."""
    if isinstance(model, LayerwiseDecoder):
        return "disk"
    streamed = {name for name, weight in model.weights().items() if in_host(weight)}
    if not streamed:
        return "off"
    return "on" if all(name.startswith(LAYERS) for name in streamed) else "all"


def quantization_of(model: Decoder | LayerwiseDecoder) -> QuantizationConfig | None:
    """How a loaded model is quantized; None for a dense one."""
    packed = {n: w for n, w in model.weights().items() if isinstance(w, QuantizedTensor)}
    if not packed:
        return None
    one = next(iter(packed.values()))
    double = isinstance(one.absmax, DoubleQuantized)
    return QuantizationConfig(one.kind, one.block_size, double, quantize_lm_head=HEAD in packed)


def held_bytes(model: Decoder | LayerwiseDecoder, frozen: Adapter | None) -> int:
    """Bytes of a model, and of an adapter, on the device."""
    ends = model.ends if isinstance(model, LayerwiseDecoder) else model
    leaves = jax.tree.leaves((ends.weights(), frozen))
    return sum(leaf.nbytes for leaf in leaves if not in_host(leaf))


def gb(size: int) -> str:
    """12.3 GB."""
    return f"{size / 1e9:.2f} GB"
