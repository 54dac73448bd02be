"""A run's plan from its configuration: the model is known by its config.json alone."""

from pathlib import Path

from qlora_jax.checkpoints.shards import read_config
from qlora_jax.memory import budget
from qlora_jax.memory.planner import Plan, plan, plan_compiled
from qlora_jax.models.config import ModelConfig
from qlora_jax.train.config import TrainConfig


def planned(config: TrainConfig, gpu: str | None = None, *, compiled: bool = False) -> Plan:
    """What a run would take.

    Args:
      config: with model.
      gpu: a GPU's name or a size with a unit; None for this machine's device.
      compiled: let XLA say what the temporaries take.

    Raises:
      InputError: the model, the GPU, or a setting.
    """
    limits = budget.of_here() if gpu is None else budget.of_absent(gpu)
    run = plan_compiled if compiled else plan
    return run(shape_of(config.model), config, limits)


def shape_of(model: str) -> ModelConfig:
    """The shape of a model: a folder, of which config.json is read, or a .gguf file.

    Raises:
      InputError: there is none, or it is no model that is known here.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return ModelConfig.from_dict(read_config(path), str(path))
    from qlora_jax.workflows.open import open_source  # with the Hub's part, which takes time

    with open_source(path) as source:
        return ModelConfig.from_dict(source.config, str(source.path))
