"""From a configuration to everything of a run, cheap things first, so that mistakes cost seconds.

output folder, headers of the model, tokenizer, data, targets        seconds, little memory
weights, adapter, optimizer                                          what the run needs
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import jax

from qlora_jax.adapters.adapter import Adapter
from qlora_jax.adapters.closer import Closer
from qlora_jax.adapters.init import init_adapter
from qlora_jax.adapters.spec import LoraSpec
from qlora_jax.checkpoints.gguf import GGUF
from qlora_jax.checkpoints.load import Progress, Source
from qlora_jax.data.dataset import Dataset
from qlora_jax.data.load import load_dataset
from qlora_jax.data.tokenizer import load_tokenizer
from qlora_jax.errors import InputError
from qlora_jax.models import Decoder, ModelConfig
from qlora_jax.models.layerwise import LayerwiseDecoder
from qlora_jax.train.config import TrainConfig
from qlora_jax.train.for_model import fitted, quantization_of, spec_of
from qlora_jax.workflows.adapter_folder import load_adapter
from qlora_jax.workflows.below import open_below
from qlora_jax.workflows.closer import loftq, refuse_beginning
from qlora_jax.workflows.from_disk import open_from_disk
from qlora_jax.workflows.open import load_model, open_source
from qlora_jax.workflows.room import laid_out, refuse_too_large
from qlora_jax.workflows.run_folder import refuse_used
from qlora_jax.workflows.trainer import Trainer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MAX_TEMPLATE_BYTES = 64 << 10


def open_run(
    config: TrainConfig,
    *,
    resume: bool = False,
    say: Callable[[str], None] = print,
    progress: Progress | None = None,
) -> Trainer:
    """Opens what `config` names: everything short of step 1.

        run = open_run(TrainConfig.from_yaml("run.yaml")).fit()

    Args:
      config: with model, dataset and output_dir.
      resume: output_dir may hold a run already.
      say: takes each printed line.
      progress: called after each tensor with (bytes done, bytes in all, name).

    Raises:
      InputError: whatever is wrong, before any weight is read if it can be known by then.
    """
    refuse_used(config.output_dir, resume)
    with open_source(config.model) as source:
        shape = ModelConfig.from_dict(source.config, str(source.path))
        config, notes = fitted(config, shape)
        tokenizer = open_tokenizer(config, source, shape)
        data, eval_data, read = open_data(config, tokenizer)
        spec = spec_of(config, shape) if config.adapter is None else None
        if spec is not None:
            refuse_beginning(config, source, spec)
        plan = laid_out(shape, config, max(data.row_lengths))
        refuse_too_large(plan, say)
        model = open_model(config, source, plan.choices.stream_weights, progress)
    below = open_below(config.frozen_adapters, model)
    lora = begin(config, model, spec)
    return Trainer(
        model,
        lora,
        data,
        config,
        tokenizer,
        eval_data=eval_data,
        below=below,
        plan=plan,
        say=say,
        notes=notes + read,
    )


def open_model(
    config: TrainConfig, source: Source, stream_weights: str, progress: Progress | None
) -> Decoder | LayerwiseDecoder:
    """The base, its weights where the plan wants them."""
    quantization = quantization_of(config)
    if stream_weights == "disk":
        return open_from_disk(source, quantization, config.dtype)
    return load_model(
        source,
        quantization=quantization,
        dtype=config.dtype,
        stream_weights=stream_weights,
        progress=progress,
    )


def open_tokenizer(
    config: TrainConfig, source: Source, shape: ModelConfig
) -> "PreTrainedTokenizerFast":
    """The model's tokenizer, with the template of `chat_template` if that names a file."""
    metadata = source.metadata if isinstance(source, GGUF) else None
    tokenizer = load_tokenizer(source.path, metadata, vocab_size=shape.vocab_size)
    if config.chat_template != "auto":
        tokenizer.chat_template = read_template(Path(config.chat_template))
    return tokenizer


def read_template(path: Path) -> str:
    """A chat template from a file.

    Raises:
      InputError: DATA-TEMPLATE, missing, too large, or not text.
    """
    if not path.is_file():
        expected = "auto, or a file such as template.jinja"
        raise InputError("DATA-TEMPLATE", path, "missing: no such file", expected)
    content = path.read_bytes()
    if len(content) > MAX_TEMPLATE_BYTES:
        found, expected = f"{len(content):,} bytes", f"at most {MAX_TEMPLATE_BYTES:,}"
        raise InputError("DATA-TEMPLATE", path, found, expected)
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise InputError("DATA-TEMPLATE", path, f"is not UTF-8 at byte {error.start}") from None


def open_data(
    config: TrainConfig, tokenizer: "PreTrainedTokenizerFast", *, skip_invalid: bool = False
) -> tuple[Dataset, Dataset | None, list[str]]:
    """(data to train on, data to evaluate on or None, what became of rows before they were split).

    Args:
      skip_invalid: go on behind malformed rows, and keep their messages in the statistics.
    """

    def read(path: str, split: str) -> Dataset:
        return load_dataset(
            path,
            tokenizer,
            max_seq_length=config.max_seq_length,
            packing=config.packing,
            train_on=config.train_on,
            dataset_format=config.dataset_format,
            overlong=config.overlong,
            split=split,
            skip_invalid=skip_invalid,
        )

    data = read(config.dataset, config.split)
    if config.eval_dataset is not None:
        return data, read(config.eval_dataset, "train"), []
    if config.val_size:
        parts = data.split(config.val_size, config.shuffle_seed)
        return *parts, [f"before val_size: {line}" for line in data.statistics.lines()]
    return data, None, []


def begin(config: TrainConfig, model: Decoder | LayerwiseDecoder, spec: LoraSpec | None) -> Adapter:
    """A new adapter of this spec; without one, the adapter that the run goes on from."""
    if spec is not None:
        lora = init_adapter(model, spec, jax.random.key(config.seed))
        if config.init == "default":
            return lora
        niter = Closer(config.init).niter
        return loftq(lora, model, config.model, niter=niter, seed=config.seed)
    lora = load_adapter(config.adapter, model, beside=config.frozen_adapters)
    if "lora_dropout" not in config.model_fields_set:
        return lora
    return Adapter(
        lora.params, dataclasses.replace(lora.spec, lora_dropout=float(config.lora_dropout))
    )


def data_of(
    config: TrainConfig,
) -> tuple[Dataset, Dataset | None, list[str], "PreTrainedTokenizerFast"]:
    """As `open_data`, and the tokenizer, for a look at them: no weight is read."""
    with open_source(config.model) as source:
        shape = ModelConfig.from_dict(source.config, str(source.path))
        config, notes = fitted(config, shape)
        tokenizer = open_tokenizer(config, source, shape)
    data, eval_data, read = open_data(config, tokenizer)
    return data, eval_data, notes + read, tokenizer
