"""QLoRA for JAX: a frozen 4-bit base model, LoRA adapters as a pytree of their own.

    import qlora_jax as ql

Public names are imported when they are first used (PEP 562), so that `qlora-jax --help` does not
wait for JAX.
"""

import importlib
from typing import Any

HOMES = {
    "Adapter": "qlora_jax.adapters",
    "AdapterStack": "qlora_jax.adapters",
    "Dataset": "qlora_jax.data",
    "Decoder": "qlora_jax.models",
    "InputError": "qlora_jax.errors",
    "Into4Bits": "qlora_jax.workflows.merge_4bit",
    "Loader": "qlora_jax.data",
    "LoraSpec": "qlora_jax.adapters",
    "ModelConfig": "qlora_jax.models",
    "Paged": "qlora_jax.optim",
    "QloraError": "qlora_jax.errors",
    "QuantizationConfig": "qlora_jax.quantization",
    "QuantizedTensor": "qlora_jax.quantization",
    "Report": "qlora_jax.quantization.report",
    "Run": "qlora_jax.workflows.trainer",
    "Text": "qlora_jax.workflows.texts",
    "TrainConfig": "qlora_jax.train.config",
    "Trainer": "qlora_jax.workflows.trainer",
    "compose": "qlora_jax.adapters",
    "fit_weights": "qlora_jax.workflows.fit_weights",
    "for_decoding": "qlora_jax.inference",
    "generate": "qlora_jax.inference",
    "init_lora": "qlora_jax.adapters",
    "load": "qlora_jax.workflows.open",
    "load_adapter": "qlora_jax.workflows.adapter_folder",
    "load_dataset": "qlora_jax.data",
    "load_orbax": "qlora_jax.checkpoints.orbax_io",
    "loftq": "qlora_jax.workflows.closer",
    "loss_fn": "qlora_jax.train",
    "measure": "qlora_jax.quantization.report",
    "merge": "qlora_jax.workflows.merge",
    "open_below": "qlora_jax.workflows.below",
    "open_run": "qlora_jax.workflows.training",
    "perplexity": "qlora_jax.evaluation",
    "quantize": "qlora_jax.quantization",
    "save_adapter": "qlora_jax.workflows.adapter_folder",
    "save_orbax": "qlora_jax.checkpoints.orbax_io",
    "save_quantized": "qlora_jax.checkpoints",
    "schedule": "qlora_jax.optim",
    "stack_adapters": "qlora_jax.adapters",
    "text_windows": "qlora_jax.workflows.texts",
    "windows": "qlora_jax.evaluation",
}
__all__ = sorted(HOMES)


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *HOMES])
