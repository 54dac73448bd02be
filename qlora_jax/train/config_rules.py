"""The tables of the configuration: other tools' names, what has no effect, what is not there yet.

A rule looks at all settings as a plain dict, set or default, valid or not.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from qlora_jax.optim.schedules import ELSEWHERE

Settings = Mapping[str, Any]

ALIASES = {
    "base_model": "model",
    "cutoff_len": "max_seq_length",
    "lora_rank": "lora_r",
    "lr": "learning_rate",
    "lr_scheduler_type": "lr_scheduler",
    "max_length": "max_seq_length",
    "micro_batch_size": "batch_size",
    "model_name_or_path": "model",
    "num_train_epochs": "num_epochs",
    "per_device_train_batch_size": "batch_size",
    "r": "lora_r",
    "rank": "lora_r",
    "sequence_len": "max_seq_length",
}

REQUIRED = {  # what is expected, and an example
    "model": ("a folder, a .gguf file or a hub id", "model=PATH"),
    "dataset": ("a file of rows", "dataset=train.jsonl"),
    "output_dir": ("a new folder", "output_dir=out/run"),
}


class Unused(NamedTuple):
    """Keys that have no effect when `when` holds of the settings."""

    keys: tuple[str, ...]
    when: Callable[[Settings], bool]
    why: str
    hint: str


def has_eval_data(settings: Settings) -> bool:
    """Whether the settings themselves name evaluation data."""
    return settings["eval_dataset"] is not None or bool(settings["val_size"])


UNUSED = (
    Unused(
        ("quant_type", "double_quant", "block_size", "quantize_lm_head"),
        lambda s: s["load_in_4bit"] is False,
        "load_in_4bit is false",
        "load_in_4bit=true",
    ),
    Unused(
        ("warmup_ratio",),
        lambda s: s["lr_scheduler"] == "constant",
        "lr_scheduler constant has no warmup",
        "lr_scheduler=constant_with_warmup",
    ),
    Unused(
        ("num_epochs",),
        lambda s: s["max_steps"] is not None,
        "max_steps says when the run ends",
        "one of the two",
    ),
    Unused(
        ("val_size",),
        lambda s: s["eval_dataset"] is not None,
        "eval_dataset is the evaluation data",
        "one of the two",
    ),
    Unused(
        (
            *("lora_r", "lora_alpha", "target_modules", "exclude_modules"),
            *("rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "init"),
            "modules_to_save",
        ),
        lambda s: s["adapter"] is not None,
        "the adapter that is continued has its own",
        "one of the two",
    ),
    Unused(
        ("train_on", "chat_template"),
        lambda s: s["dataset_format"] == "text",
        "text rows have no template and train on all tokens",
        "dataset_format=messages",
    ),
)

EVALUATION = (
    Unused(
        ("eval_steps", "early_stopping_patience"),
        lambda s: not has_eval_data(s),
        "there is no evaluation data",
        "eval_dataset=FILE or val_size=0.05",
    ),
)


class Contradiction(NamedTuple):
    """Values of two keys that cannot both hold.

    Attributes:
      key: the one that is told.
    """

    key: str
    when: Callable[[Settings], bool]
    why: str
    expected: str
    hint: str


def is_word(*words: str) -> Callable[[Any], bool]:
    """Whether a value is one of these words."""
    return lambda value: isinstance(value, str) and value in words


def is_named(*words: str) -> Callable[[Any], bool]:
    """Whether a value is one of these words, or one of them with more behind it."""
    return lambda value: isinstance(value, str) and value.startswith(words)


CONTRADICTIONS = (
    Contradiction(
        "gradient_checkpointing",
        lambda s: (
            s["stream_weights"] == "disk"
            and s["gradient_checkpointing"] in ("none", "save-attention")
        ),
        "keeps more than a layer's input, and of layers that come from disk no more can be kept",
        "full or offload with stream_weights disk",
        "gradient_checkpointing=offload",
    ),
    Contradiction(
        "init",
        lambda s: is_named("loftq")(s["init"]) and s["load_in_4bit"] is False,
        "makes up for what 4 bits lost, and load_in_4bit is false",
        "default where nothing is lost",
        "load_in_4bit=true",
    ),
    Contradiction(
        "init",
        lambda s: is_named("loftq")(s["init"]) and s["use_dora"] is True,
        "with DoRA, whose lengths of rows are those of the base alone",
        "default with use_dora",
        "use_dora=false",
    ),
    *(
        Contradiction(
            key,
            lambda s, key=key, wrong=wrong: bool(s["frozen_adapters"]) and wrong(s[key]),
            why,
            f"{key}={instead} with frozen_adapters",
            f"{key}={instead}, or compose the adapters first and go on from the result",
        )
        for key, wrong, why, instead in (
            ("lora_dropout", bool, "would drop inputs of the frozen adapters too", "0"),
            ("use_dora", bool, "has no sum with the frozen adapters", "false"),
            ("modules_to_save", bool, "has no sum with the frozen adapters", "[]"),
            ("stream_weights", "disk".__eq__, "computes no frozen adapters", "on"),
        )
    ),
)


class Unsupported(NamedTuple):
    """Values of a key that are known and refused, since what they ask for is not there yet."""

    key: str
    when: Callable[[Any], bool]
    why: str
    hint: str


UNSUPPORTED = (
    Unsupported(
        "revision",
        lambda v: v is not None,
        "a revision is part of the model's name",
        "model=ORG/NAME@REVISION, or the path of a folder that holds it",
    ),
    Unsupported(
        "init",
        is_named("pissa"),
        "it changes the base, which a run leaves as it is",
        "qlora-jax quantize MODEL OUT --init pissa, then model=OUT and adapter=OUT/adapter",
    ),
    Unsupported(
        "init",
        is_named("gaussian", "eva", "olora", "orthogonal", "corda", "lora_ga", "mica"),
        "A and B begin as PEFT's default or as LoftQ's",
        "init=default or init=loftq",
    ),
    Unsupported(
        "report_to",
        lambda v: isinstance(v, list) and not {"jsonl"}.issuperset(map(str, v)),
        "figures go to metrics.jsonl only",
        "report_to=[jsonl]",
    ),
    *(
        Unsupported("lr_scheduler", is_word(name), why, "lr_scheduler=cosine")
        for name, why in ELSEWHERE.items()
    ),
)
