"""Which programs a run's step is made of: its gradients', and its optimizer's update."""

from collections.abc import Callable

import optax

from qlora_jax.adapters.adapter import Adapter
from qlora_jax.memory.planner import Plan
from qlora_jax.models import Decoder
from qlora_jax.models.layerwise import LayerwiseDecoder
from qlora_jax.optim.paged import Paged, choose_paged
from qlora_jax.optim.paged_adamw import ADAMW
from qlora_jax.train import pipeline
from qlora_jax.train.config import TrainConfig
from qlora_jax.train.step import Sums, gradients, streamed_gradients
from qlora_jax.workflows.room import streaming_of


def gradients_for(model: Decoder | LayerwiseDecoder, remat: str) -> Callable[..., Sums]:
    """What computes a micro batch's gradients: one program, or one a layer."""
    if isinstance(model, LayerwiseDecoder):
        return pipeline.gradients
    copies = streaming_of(model) != "off" or remat == "offload"
    return streamed_gradients if copies else gradients


def optimizer_for(
    lora: Adapter,
    config: TrainConfig,
    plan: Plan,
    learning_rate: optax.Schedule,
    transform: optax.GradientTransformation | None,
    elementwise: bool,
) -> tuple[Paged, str]:
    """AdamW in 32 or 8 bits, or the user's own transform, and why its state is where it is."""
    if transform is not None:
        return choose_paged(
            transform, lora.params, config.optim_memory, elementwise=elementwise, contracts=True
        )
    adamw = ADAMW[8 if config.optim == "paged_adamw_8bit" else 32](
        learning_rate,
        b1=config.adam_beta1,
        b2=config.adam_beta2,
        weight_decay=config.weight_decay,
        loraplus_lr_ratio=config.loraplus_lr_ratio,
    )
    memory = plan.choices.optim_memory
    optimizer, _ = choose_paged(adamw, lora.params, memory, elementwise=True, contracts=False)
    ratio = config.loraplus_lr_ratio
    told = "" if ratio is None else f"; LoRA+, B at {ratio:g} times the learning rate"
    return optimizer, f"state on the {memory} ({plan.reasons['optim_memory']}){told}"
