"""Everything short of step 1, without the weights: all that is wrong with a run, said at once.

A part that is wrong does not hide the next one: a bad key is left out and the model still looked
at, a missing dataset does not keep the targets from being matched.
"""

import contextlib
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from qlora_jax.adapters.adapter import count_parameters
from qlora_jax.checkpoints.load import Loader, Source
from qlora_jax.checkpoints.peft import read_adapter
from qlora_jax.data.dataset import Dataset
from qlora_jax.data.rows import missing
from qlora_jax.errors import InputError, QloraError
from qlora_jax.models import ModelConfig
from qlora_jax.models.families import module_shapes, weight_shapes
from qlora_jax.train.config import PATHS, TrainConfig, beside
from qlora_jax.train.config_rules import ALIASES
from qlora_jax.train.config_yaml import parse_overrides, read_yaml
from qlora_jax.train.for_model import fitted, quantization_of, spec_of
from qlora_jax.weight_names import LAYERS
from qlora_jax.workflows.closer import refuse_beginning
from qlora_jax.workflows.header import millions
from qlora_jax.workflows.open import open_source
from qlora_jax.workflows.run_folder import refuse_used
from qlora_jax.workflows.training import open_data, open_tokenizer


class Validation:
    """What was found.

    Attributes:
      fine: (part, what is right about it).
      problems: what is not, an error each.
    """

    def __init__(self):
        self.fine: list[tuple[str, str]] = []
        self.problems: list[QloraError] = []

    def ok(self, part: str, text: str) -> None:
        """Notes what is right."""
        self.fine.append((part, text))

    @contextlib.contextmanager
    def part(self) -> Iterator[None]:
        """Errors of the block are noted, and what comes behind it still runs."""
        try:
            yield
        except QloraError as error:
            self.problems += getattr(error, "errors", [error])


def validate(path: str | Path, overrides: Iterable[str] = ()) -> Validation:
    """Checks configuration, output folder, model, tokenizer, template, data and targets.

    Of the model, names, shapes and dtypes of all weights are checked; no weight is read.
    """
    found, config = Validation(), None
    overrides = list(overrides)
    with found.part():
        config = TrainConfig.from_yaml(path, overrides)
        found.ok("config", f"{path}: {len(config.model_fields_set)} keys set")
    if config is None:
        config = remainder(path, overrides, found.problems)
    if config is None:
        return found
    if config.output_dir is not None:
        with found.part():
            refuse_used(config.output_dir, resume=False)
            found.ok("output_dir", f"{config.output_dir} is free")
    if config.model is not None:
        with found.part():
            check_model(config, found)
    elif config.dataset is not None and not Path(config.dataset).exists():
        with found.part():
            raise missing(config.dataset, "a data file")
    return found


def remainder(
    path: str | Path, overrides: list[str], problems: list[QloraError]
) -> TrainConfig | None:
    """The configuration without the keys that are wrong, to look at what they do not touch."""
    bad = {problem.where.rsplit(":", 1)[-1] for problem in problems}
    try:
        values: dict[str, Any] = read_yaml(path)
        values = {k: beside(path, k, v) if k in PATHS else v for k, v in values.items()}
        values |= parse_overrides(overrides)
        kept = {k: v for k, v in values.items() if not {k, ALIASES.get(k, k)} & bad}
        return TrainConfig(**kept)
    except InputError:
        return None


def check_model(config: TrainConfig, found: Validation) -> None:
    """The model's files, and all that needs its shapes or its tokenizer."""
    try:
        source = open_source(config.model)
    except QloraError:
        if config.dataset is not None and not Path(config.dataset).exists():
            found.problems.append(missing(config.dataset, "a data file"))
        raise
    with source:
        shape = ModelConfig.from_dict(source.config, str(source.path))
        layers = shape.num_hidden_layers
        with found.part():
            Loader(source, shape, quantization_of(config), config.dtype)
            count = total(weight_shapes(shape), layers)
            text = f"{shape.model_type}, {layers} layers, {millions(count)} parameters"
            found.ok("model", f"{config.model}: {text}")
        with found.part():
            config, notes = fitted(config, shape)
            for note in notes:
                found.ok("note", note)
            if config.dataset is not None:
                check_data(config, open_tokenizer(config, source, shape), found)
        with found.part():
            check_targets(config, source, shape, found)


def check_data(config: TrainConfig, tokenizer: Any, found: Validation) -> None:
    """Every row is read and encoded; all malformed ones are reported."""
    found.ok("tokenizer", f"{len(tokenizer):,} tokens")
    data, eval_data, read = open_data(config, tokenizer, skip_invalid=True)
    for line in read:
        found.ok("data", line)
    for name, part in (("data", data), ("eval data", eval_data)):
        if part is not None:
            check_rows(name, part, found)


def check_rows(name: str, data: Dataset, found: Validation) -> None:
    """One dataset's rows."""
    found.problems += [Rejected(message) for message in data.statistics.rejected]
    for line in data.statistics.lines():
        found.ok(name, line)


class Rejected(InputError):
    """A malformed row, whose message the dataset has kept as text."""

    def __init__(self, message: str):
        self.message = message
        super().__init__("DATA-ROW", "", message)

    def __str__(self) -> str:
        return self.message


def check_targets(
    config: TrainConfig, source: Source, shape: ModelConfig, found: Validation
) -> None:
    """What the adapter would be."""
    shapes = module_shapes(shape)
    if config.adapter is not None:
        spec = read_adapter(config.adapter, shapes, shape.num_hidden_layers).spec
    else:
        spec = spec_of(config, shape)
        refuse_beginning(config, source, spec)
    for path in config.frozen_adapters:
        read_adapter(path, shapes, shape.num_hidden_layers)
    names = ", ".join((*spec.targets, *spec.modules_to_save))
    found.ok("targets", f"{names}: {millions(count_parameters(spec, shapes))} parameters")


def total(shapes: dict[str, tuple[int, ...]], layers: int) -> int:
    """Parameters of a model."""
    return sum(
        math.prod(shape) * (layers if name.startswith(LAYERS) else 1)
        for name, shape in shapes.items()
    )
