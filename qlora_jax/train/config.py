"""Every knob of a run: flat keys with Hugging Face's names, checked before anything is opened.

    config = TrainConfig(learning_rate=2e-4, max_steps=500, output_dir="out")
    config = TrainConfig.from_yaml("run.yaml", overrides=["lora_r=16"])

All that is wrong is said at once. A key that is unknown is an error, and so is one that was set and
has no effect. The defaults are those of the QLoRA paper's script (arXiv 2305.14314).
"""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, field_validator

from qlora_jax.adapters.spec import SAVED
from qlora_jax.data.formats import FORMATS
from qlora_jax.errors import InputError
from qlora_jax.models.remat import POLICIES
from qlora_jax.optim.schedules import SCHEDULES
from qlora_jax.train.config_checks import (
    contradictory,
    invalid,
    missing,
    raise_all,
    relabelled,
    translated,
    unsupported,
    unused,
)
from qlora_jax.train.config_rules import EVALUATION, REQUIRED, UNUSED, has_eval_data
from qlora_jax.train.config_yaml import parse_overrides, read_yaml, to_yaml

INIT = r"^(default|loftq(_niter_[0-9]{1,3})?)$"

Count = Annotated[int, Field(ge=1)]
Rank = Annotated[int, Field(ge=1, le=4096)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]
Init = Annotated[
    str, Field(pattern=INIT, description="default, loftq, or loftq_niter_N with N iterations")
]
BlockSize = Literal[32, 64, 128, 256, 512, 1024, 2048, 4096]

PATHS = ("model", "adapter", "dataset", "eval_dataset", "chat_template", "output_dir")
FILES = (".gguf", ".jsonl", ".json", ".csv", ".tsv", ".parquet", ".jinja")


class TrainConfig(BaseModel):
    """The settings of a run; frozen, and every value is valid.

    Keys may also be other tools' names (`config_rules.ALIASES`): `notes` says how they were read.

    Raises:
      InputError: CFG-KEY, CFG-VALUE, CFG-UNUSED, CFG-UNSUPPORTED, and from a file CFG-MISSING;
        several come as one `ConfigErrors`, a line each.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    # model
    model: str | None = None
    revision: str | None = None
    adapter: str | None = None
    frozen_adapters: list[str] = []
    dtype: Literal["bfloat16", "float32", "float16"] = "bfloat16"

    # quantization
    load_in_4bit: bool = True
    quant_type: Literal["nf4", "fp4", "int4"] = "nf4"
    double_quant: bool = True
    block_size: BlockSize = 64
    quantize_lm_head: bool = False
    stream_weights: Literal["auto", "off", "on", "all", "disk"] = "auto"

    # lora
    lora_r: Rank = 64
    lora_alpha: Positive = 16
    lora_dropout: BelowOne = 0.0
    target_modules: str | list[str] = "all-linear"
    exclude_modules: str | list[str] = []
    rank_pattern: dict[str, Rank] = {}
    alpha_pattern: dict[str, Positive] = {}
    use_rslora: bool = False
    use_dora: bool = False
    init: Init = "default"
    modules_to_save: list[Literal[*SAVED]] = []

    # data
    dataset: str | None = None
    dataset_format: Literal["auto", *FORMATS] = "auto"
    split: str = "train"
    eval_dataset: str | None = None
    val_size: BelowOne = 0.0
    chat_template: str = "auto"
    train_on: Literal["assistant", "completion", "all"] = "assistant"
    max_seq_length: Annotated[int, Field(ge=2)] = 2048
    packing: bool = True
    overlong: Literal["truncate", "drop", "split", "error"] = "truncate"
    shuffle_seed: Seed = 42

    # training
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 2e-4
    loraplus_lr_ratio: Positive | None = None
    lr_scheduler: Literal[*SCHEDULES] = "constant"
    warmup_ratio: Share = 0.03
    batch_size: Count = 1
    gradient_accumulation_steps: Count = 16
    num_epochs: Positive = 1
    max_steps: Count | None = None
    optim: Literal["paged_adamw_32bit", "paged_adamw_8bit"] = "paged_adamw_32bit"
    adam_beta1: BelowOne = 0.9
    adam_beta2: BelowOne = 0.999
    weight_decay: Share = 0.0
    max_grad_norm: Positive | None = 0.3
    gradient_checkpointing: Literal["auto", *POLICIES] = "auto"
    optim_memory: Literal["auto", "host", "device"] = "auto"
    seed: Seed = 0

    # watching
    eval_steps: Count = 200
    save_steps: Count = 200
    save_total_limit: Count | None = 3
    save_best: Literal["eval_loss"] | None = "eval_loss"
    early_stopping_patience: Annotated[int, Field(ge=0)] = 0
    logging_steps: Count = 10
    report_to: list[Literal["jsonl"]] = ["jsonl"]
    run_name: str | None = None
    output_dir: str | None = None

    _notes: tuple[str, ...] = PrivateAttr(default=())

    def __init__(self, **values: Any):
        values, notes, problems = translated(values, defaults())
        settings = defaults() | values
        problems += unsupported(values)
        problems += unused(values, settings, UNUSED)
        problems += contradictory(settings)
        refused = {problem.where for problem in problems if problem.code == "CFG-UNSUPPORTED"}
        try:
            super().__init__(**{key: values[key] for key in values if key not in refused})
        except ValidationError as error:
            problems += invalid(error, TrainConfig)
        raise_all(problems)
        self._notes = tuple(notes)

    @field_validator("lora_alpha")
    @classmethod
    def whole_stays_whole(cls, value: float) -> float:
        """PEFT's config files hold a whole alpha as 16 and not as 16.0."""
        return int(value) if float(value).is_integer() else value

    @classmethod
    def from_yaml(
        cls,
        path: str | Path,
        overrides: Iterable[str] = (),
        required: Iterable[str] = tuple(REQUIRED),
    ) -> "TrainConfig":
        """Reads a YAML file; `overrides` are `key=value` and win over it.

        Relative paths in the file are meant from the file's folder, those of overrides from the
        current one. A name that is no path, such as a hub id, stays as it is.

        Raises:
          InputError: as of the class, with `file:key`; CFG-FILE, CFG-YAML, CFG-OVERRIDE.
        """
        known = defaults()
        values, notes, problems = translated(read_yaml(path), known)
        problems = relabelled(problems, str(path), ())
        values |= {key: beside(path, key, values[key]) for key in PATHS if key in values}
        if isinstance(below := values.get("frozen_adapters"), list):
            values["frozen_adapters"] = [beside(path, "adapter", one) for one in below]
        over, more_notes, more_problems = translated(parse_overrides(overrides), known)
        problems += relabelled(more_problems, "command line", ())
        values |= over
        found = [*missing(values, required), *unused(values, known | values, EVALUATION)]
        try:
            config = cls(**values)
        except InputError as error:
            found += getattr(error, "errors", [error])
        raise_all([*problems, *relabelled(found, str(path), over)])
        config._notes = (*notes, *more_notes)
        return config

    def to_yaml(self) -> str:
        """The resolved configuration, which can be read again from any folder.

        Paths are absolute. Keys that nobody set and that have no effect are left out.
        """
        values = self.model_dump()
        rules = (*UNUSED, *EVALUATION)
        idle = {key for rule in rules if rule.when(values) for key in rule.keys}
        kept = {k: v for k, v in values.items() if k not in idle - self.model_fields_set}
        for key in PATHS:
            if is_path(key, kept.get(key)) or os.path.exists(kept.get(key) or ""):
                kept[key] = os.path.abspath(kept[key])
        kept["frozen_adapters"] = [os.path.abspath(one) for one in self.frozen_adapters]
        return to_yaml(kept)

    def replace(self, **changes: Any) -> "TrainConfig":
        """A copy with other values, checked like the first; unset keys stay unset."""
        return TrainConfig(**{key: getattr(self, key) for key in self.model_fields_set} | changes)

    def refuse_unused_evaluation(self) -> None:
        """For a run without evaluation data: raises if keys were set that need it.

        Raises:
          InputError: CFG-UNUSED.
        """
        set_by_user = {key: getattr(self, key) for key in self.model_fields_set}
        raise_all(unused(set_by_user, self.model_dump() | {"eval_dataset": None}, EVALUATION))

    @property
    def has_eval_data(self) -> bool:
        """Whether the configuration itself names evaluation data."""
        return has_eval_data(self.model_dump())

    @property
    def notes(self) -> tuple[str, ...]:
        """What was read otherwise than it was written, a line each."""
        return self._notes


def defaults() -> dict[str, Any]:
    """Every key with its default."""
    return {key: field.default for key, field in TrainConfig.model_fields.items()}


def beside(file: str | Path, key: str, value: Any) -> Any:
    """A path as it is meant from the folder of `file`; what is no path is left alone."""
    if not isinstance(value, str):
        return value
    path = os.path.normpath(Path(file).parent / os.path.expanduser(value))
    return path if is_path(key, value) or os.path.exists(path) else value


def is_path(key: str, value: Any) -> bool:
    """Whether a value can only be a path, and no hub id or word."""
    if not isinstance(value, str):
        return False
    return key == "output_dir" or value.startswith((".", "~", os.sep)) or value.endswith(FILES)
