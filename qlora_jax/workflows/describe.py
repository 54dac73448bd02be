"""What is in a folder or a file of weights, from its headers: no weight is read."""

from pathlib import Path

from qlora_jax.checkpoints import manifest, peft
from qlora_jax.workflows.describe_adapter import describe_adapter
from qlora_jax.workflows.describe_model import describe_model
from qlora_jax.workflows.describe_orbax import describe_orbax
from qlora_jax.workflows.description import Description


def describe(path: str | Path) -> Description:
    """Describes a model's folder, a GGUF file, a Hub id, an adapter, or an Orbax checkpoint.

    Raises:
      InputError: nothing is there, or it cannot be used: names and shapes are checked as when it
        is loaded.
      StorageError: an Orbax checkpoint's manifest is damaged.
    """
    if Path(path, peft.CONFIG).exists():
        return describe_adapter(Path(path))
    if Path(path, manifest.NAME).is_file():
        return describe_orbax(Path(path))
    return describe_model(path)
