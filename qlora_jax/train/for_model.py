"""What a configuration means for a model of a given shape: quantization, adapter, row length."""

from qlora_jax.adapters.spec import LoraSpec, make_spec
from qlora_jax.errors import InputError
from qlora_jax.models.config import ModelConfig
from qlora_jax.models.families import module_shapes
from qlora_jax.quantization.policy import QuantizationConfig
from qlora_jax.train.config import TrainConfig


def fitted(config: TrainConfig, shape: ModelConfig) -> tuple[TrainConfig, list[str]]:
    """The configuration with a max_seq_length that the model has positions for, and a note on it.

    Raises:
      InputError: RUN-LENGTH, a larger one was asked for.
    """
    most = shape.max_position_embeddings
    if config.max_seq_length <= most:
        return config, []
    if "max_seq_length" in config.model_fields_set:
        found = f"{config.max_seq_length:,}"
        expected = f"at most {most:,}, the model's max_position_embeddings"
        raise InputError("RUN-LENGTH", "max_seq_length", found, expected, f"max_seq_length={most}")
    note = f"max_seq_length is {most:,}, the model's max_position_embeddings"
    return config.replace(max_seq_length=most), [note]


def quantization_of(config: TrainConfig) -> QuantizationConfig | None:
    """How the base is quantized; None keeps it dense."""
    if not config.load_in_4bit:
        return None
    return QuantizationConfig(
        config.quant_type, config.block_size, config.double_quant, config.quantize_lm_head
    )


def spec_of(config: TrainConfig, shape: ModelConfig) -> LoraSpec:
    """Targets, ranks and alphas of a new adapter.

    Raises:
      InputError: LORA-TARGETS, a target that matches nothing, with the nearest names.
    """
    return make_spec(
        module_shapes(shape),
        shape.num_hidden_layers,
        r=config.lora_r,
        alpha=config.lora_alpha,
        targets=config.target_modules,
        exclude=config.exclude_modules,
        rank_pattern=config.rank_pattern,
        alpha_pattern=config.alpha_pattern,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        modules_to_save=config.modules_to_save,
        dropout=config.lora_dropout,
    )
