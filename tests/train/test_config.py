import re

import pytest
import yaml

from qlora_jax.errors import InputError
from qlora_jax.train.config import TrainConfig
from qlora_jax.train.config_checks import ConfigErrors
from qlora_jax.train.config_rules import ALIASES, EVALUATION, UNSUPPORTED, UNUSED
from qlora_jax.train.config_yaml import parse_overrides

REQUIRED = {"model": "m", "dataset": "d", "output_dir": "o"}

# The table of the documentation: every key with its default.
DEFAULTS = """
model=null revision=null adapter=null frozen_adapters=[] dtype=bfloat16
load_in_4bit=true quant_type=nf4 double_quant=true block_size=64 quantize_lm_head=false
stream_weights=auto
lora_r=64 lora_alpha=16 lora_dropout=0.0 target_modules=all-linear exclude_modules=[]
rank_pattern={} alpha_pattern={} use_rslora=false use_dora=false init=default modules_to_save=[]
dataset=null dataset_format=auto split=train eval_dataset=null val_size=0.0 chat_template=auto
train_on=assistant max_seq_length=2048 packing=true overlong=truncate shuffle_seed=42
learning_rate=2e-4 loraplus_lr_ratio=null lr_scheduler=constant warmup_ratio=0.03 batch_size=1
gradient_accumulation_steps=16 num_epochs=1 max_steps=null optim=paged_adamw_32bit adam_beta1=0.9
adam_beta2=0.999 weight_decay=0.0 max_grad_norm=0.3 gradient_checkpointing=auto optim_memory=auto
seed=0
eval_steps=200 save_steps=200 save_total_limit=3 save_best=eval_loss early_stopping_patience=0
logging_steps=10 report_to=[jsonl] run_name=null output_dir=null
"""


def write(tmp_path, text, name="run.yaml"):
    path = tmp_path / name
    path.write_text(text)
    return path


def problems(build):
    """The codes and places of everything that is wrong, and the text."""
    with pytest.raises(InputError) as caught:
        build()
    errors = getattr(caught.value, "errors", [caught.value])
    return {(error.code, error.where) for error in errors}, str(caught.value)


def test_every_default_is_the_table_s():
    assert TrainConfig().model_dump() == parse_overrides(DEFAULTS.split())


def test_the_python_of_the_readme():
    config = TrainConfig(learning_rate=2e-4, max_steps=500, output_dir="out")
    assert (config.learning_rate, config.max_steps, config.output_dir) == (2e-4, 500, "out")
    assert config.notes == ()


def test_paths_and_tuples_of_python_are_taken(tmp_path):
    config = TrainConfig(output_dir=tmp_path, target_modules=("q_proj", "v_proj"))
    assert config.output_dir == str(tmp_path)
    assert config.target_modules == ["q_proj", "v_proj"]


@pytest.mark.parametrize(("alias", "name"), ALIASES.items())
def test_other_tools_names_are_read_with_a_note(alias, name):
    value = {"model": "x", "learning_rate": 0.1, "num_epochs": 2.0, "lr_scheduler": "cosine"}
    value = value.get(name, 7)
    config = TrainConfig(**{alias: value})
    assert getattr(config, name) == value
    assert config.notes == (f"{alias} is read as {name}",)
    assert config.model_dump() == TrainConfig(**{name: value}).model_dump()


def test_a_name_and_its_alias_together_are_refused():
    with pytest.raises(InputError, match="lora_rank: is lora_r, which is set too"):
        TrainConfig(lora_r=8, lora_rank=8)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("learning_rate", -1e-4, "-0.0001 (expected a number above 0 and at most 1)"),
        ("learning_rate", float("nan"), "nan (expected a number above 0"),
        ("learning_rate", "fast", "'fast' (expected a number"),
        ("lora_r", 0, "0 (expected a whole number from 1 to 4096)"),
        ("lora_r", 4097, "4097 (expected a whole number from 1 to 4096)"),
        ("lora_r", 8.5, "8.5 (expected a whole number"),
        ("lora_r", True, "True (expected a whole number"),
        ("lora_alpha", 0, "0 (expected a number above 0)"),
        ("lora_alpha", float("inf"), "inf (expected a number above 0)"),
        ("lora_dropout", 1.0, "1.0 (expected a number of at least 0 and below 1)"),
        ("adam_beta2", 1, "1 (expected a number of at least 0 and below 1)"),
        ("warmup_ratio", 1.5, "1.5 (expected a number from 0 to 1)"),
        ("max_seq_length", 1, "1 (expected a whole number of at least 2)"),
        ("max_steps", 0, "0 (expected a whole number of at least 1 or null)"),
        ("max_grad_norm", 0.0, "0.0 (expected a number above 0 or null)"),
        ("seed", -1, "-1 (expected a whole number from 0 to 4294967295)"),
        ("block_size", 63, "63 (expected one of 32, 64, 128, 256, 512, 1024, 2048, 4096)"),
        ("quant_type", "nf3", "'nf3' (expected one of nf4, fp4, int4)"),
        ("dtype", "float64", "'float64' (expected one of bfloat16, float32, float16)"),
        ("dataset_format", "xml", "'xml' (expected one of auto, "),
        ("lr_scheduler", "cosin", "'cosin' (expected one of constant, "),
        ("optim", "sgd", "'sgd' (expected one of paged_adamw_32bit, paged_adamw_8bit)"),
        ("packing", "yes", "'yes' (expected true or false)"),
        ("target_modules", 3, "3 (expected text or a list of text)"),
        ("modules_to_save", ["norm"], "'norm' for 0 (expected a list of one of lm_head, embed"),
        ("rank_pattern", {"q": 0}, "0 for 'q' (expected keys, each with a whole number from 1"),
        ("output_dir", 3, "3 (expected text or null)"),
    ],
)
def test_a_value_out_of_range_is_said_with_the_range(key, value, message):
    with pytest.raises(InputError, match=re.escape(f"error[CFG-VALUE]: {key}: {message}")):
        TrainConfig(**{key: value})


@pytest.mark.parametrize(
    ("key", "nearest"),
    [("lr_rate", "learning_rate"), ("lora_alfa", "lora_alpha"), ("batchsize", "batch_size")],
)
def test_an_unknown_key_names_the_nearest(key, nearest):
    with pytest.raises(InputError, match=rf"CFG-KEY\]: {key}: unknown key. .*mean {nearest}"):
        TrainConfig(**{key: 1})


REFUSED = [
    ("revision", "main"),
    ("init", "pissa"),
    ("init", "pissa_niter_16"),
    ("init", "gaussian"),
    ("init", "olora"),
    ("report_to", ["wandb"]),
    ("report_to", ["jsonl", "tensorboard"]),
    ("lr_scheduler", "reduce_lr_on_plateau"),
    ("lr_scheduler", "cosine_with_min_lr"),
    ("lr_scheduler", "cosine_warmup_with_min_lr"),
    ("lr_scheduler", "warmup_stable_decay"),
    ("lr_scheduler", "greedy"),
]


@pytest.mark.parametrize(("key", "value"), REFUSED)
def test_what_is_not_there_yet_is_refused_by_name_and_once(key, value):
    found, text = problems(lambda: TrainConfig(**{key: value}))
    assert found == {("CFG-UNSUPPORTED", key)}
    assert str(value) in text
    assert "Try: " in text


def test_every_row_of_the_unsupported_table_is_met():
    for rule in UNSUPPORTED:
        assert any(rule.key == key and rule.when(value) for key, value in REFUSED)
        assert not rule.when(TrainConfig().model_dump()[rule.key])


def test_what_cannot_be_kept_of_layers_from_disk_is_refused():
    for policy in ("none", "save-attention"):
        found, text = problems(
            lambda policy=policy: TrainConfig(stream_weights="disk", gradient_checkpointing=policy)
        )
        assert found == {("CFG-TOGETHER", "gradient_checkpointing")}
        assert "gradient_checkpointing=offload" in text
    assert TrainConfig(stream_weights="disk", gradient_checkpointing="offload")
    assert TrainConfig(stream_weights="all", gradient_checkpointing="none")


def test_loftq_needs_something_that_was_lost():
    found, text = problems(lambda: TrainConfig(init="loftq", load_in_4bit=False))
    assert found == {("CFG-TOGETHER", "init")}
    assert "load_in_4bit=true" in text
    found, text = problems(lambda: TrainConfig(init="loftq", use_dora=True))
    assert found == {("CFG-TOGETHER", "init")}
    assert "use_dora=false" in text
    assert TrainConfig(init="loftq_niter_16", use_rslora=True)


def test_pissa_names_the_command_that_makes_it():
    _, text = problems(lambda: TrainConfig(init="pissa"))
    assert "Try: qlora-jax quantize MODEL OUT --init pissa, then model=OUT" in text
    with pytest.raises(InputError, match=r"'lofq' .expected default, loftq, or loftq_niter_N"):
        TrainConfig(init="lofq")


@pytest.mark.parametrize("ratio", [0, -1.0, float("inf"), "many"])
def test_a_ratio_of_learning_rates_is_above_0(ratio):
    with pytest.raises(InputError, match=r"loraplus_lr_ratio: .*above 0 or null"):
        TrainConfig(loraplus_lr_ratio=ratio)


IDLE = [
    ({"load_in_4bit": False, "double_quant": True}, "double_quant", "load_in_4bit is false"),
    ({"load_in_4bit": False, "quant_type": "nf4"}, "quant_type", "load_in_4bit is false"),
    ({"load_in_4bit": False, "block_size": 128}, "block_size", "load_in_4bit is false"),
    ({"load_in_4bit": False, "quantize_lm_head": True}, "quantize_lm_head", "load_in_4bit"),
    ({"warmup_ratio": 0.1}, "warmup_ratio", "constant has no warmup"),
    ({"max_steps": 5, "num_epochs": 2.0}, "num_epochs", "max_steps says"),
    ({"eval_dataset": "e", "val_size": 0.1}, "val_size", "eval_dataset is the evaluation data"),
    *(
        ({"adapter": "a", key: value}, key, "continued has its own")
        for key, value in {
            "lora_r": 8,
            "lora_alpha": 8,
            "target_modules": ["q_proj"],
            "exclude_modules": ["q_proj"],
            "rank_pattern": {"q_proj": 4},
            "alpha_pattern": {"q_proj": 4},
            "use_rslora": True,
            "use_dora": True,
            "modules_to_save": ["lm_head"],
            "init": "default",
        }.items()
    ),
    ({"dataset_format": "text", "train_on": "all"}, "train_on", "train on all tokens"),
    ({"dataset_format": "text", "chat_template": "x"}, "chat_template", "have no template"),
]


@pytest.mark.parametrize(("values", "key", "why"), IDLE)
def test_a_key_that_is_set_and_has_no_effect_is_an_error(values, key, why):
    found, text = problems(lambda: TrainConfig(**values))
    assert found == {("CFG-UNUSED", key)}
    assert why in text
    TrainConfig(**{name: value for name, value in values.items() if name != key})


def test_every_key_of_the_unused_table_is_met():
    assert {key for _, key, _ in IDLE} == {key for rule in UNUSED for key in rule.keys}


@pytest.mark.parametrize("key", [key for rule in EVALUATION for key in rule.keys])
def test_evaluation_keys_need_evaluation_data(tmp_path, key):
    values = {**REQUIRED, key: 5}
    path = write(tmp_path, yaml.safe_dump(values))
    found, text = problems(lambda: TrainConfig.from_yaml(path))
    assert found == {("CFG-UNUSED", f"{path}:{key}")}
    assert "there is no evaluation data" in text
    assert getattr(TrainConfig.from_yaml(path, ["val_size=0.1"]), key) == 5
    config = TrainConfig(**{key: 5})  # in Python the data may come from elsewhere
    found, _ = problems(config.refuse_unused_evaluation)
    assert found == {("CFG-UNUSED", key)}
    TrainConfig().refuse_unused_evaluation()


def test_all_errors_come_at_once_and_each_says_where(tmp_path):
    path = write(
        tmp_path,
        "model: m\nlr_rate: 1\nlora_rank: 9999\ninit: pissa\neval_steps: 5\npacking: yes\n",
    )
    build = lambda: TrainConfig.from_yaml(path, ["dtype=f32", "nonsense=1"])  # noqa: E731
    found, text = problems(build)
    assert found == {
        ("CFG-KEY", f"{path}:lr_rate"),
        ("CFG-KEY", "command line:nonsense"),
        ("CFG-MISSING", f"{path}:dataset"),
        ("CFG-MISSING", f"{path}:output_dir"),
        ("CFG-UNUSED", f"{path}:eval_steps"),
        ("CFG-UNSUPPORTED", f"{path}:init"),
        ("CFG-VALUE", f"{path}:lora_r"),
        ("CFG-VALUE", f"{path}:packing"),
        ("CFG-VALUE", "command line:dtype"),
    }
    assert len(text.splitlines()) == len(found)
    assert all(line.startswith("error[CFG-") for line in text.splitlines())
    with pytest.raises(ConfigErrors) as caught:
        build()
    assert caught.value.exit_code == 2


def test_overrides_win_and_aliases_meet(tmp_path):
    path = write(tmp_path, "model: m\ndataset: d\noutput_dir: o\nlora_r: 8\nlr: 2e-5\n")
    config = TrainConfig.from_yaml(
        path, ["rank=16", "exclude_modules=[lm_head, k_proj]", "rank_pattern={q_proj: 4}", "seed=3"]
    )
    assert config.lora_r == 16
    assert config.learning_rate == 2e-5
    assert config.exclude_modules == ["lm_head", "k_proj"]
    assert config.rank_pattern == {"q_proj": 4}
    assert config.notes == ("lr is read as learning_rate", "rank is read as lora_r")


def test_paths_are_meant_from_the_file_and_names_stay(tmp_path):
    folder = tmp_path / "configs"
    (folder / "local-model").mkdir(parents=True)
    path = write(
        folder,
        "model: Qwen/Qwen3-4B\nadapter: local-model\ndataset: ../data/train.jsonl\n"
        "eval_dataset: hub/name\noutput_dir: out\nfrozen_adapters: [local-model, hub/below]\n",
    )
    config = TrainConfig.from_yaml(path)
    assert config.model == "Qwen/Qwen3-4B"
    assert config.adapter == str(folder / "local-model")
    assert config.dataset == str(tmp_path / "data" / "train.jsonl")
    assert config.eval_dataset == "hub/name"
    assert config.frozen_adapters == [str(folder / "local-model"), "hub/below"]
    assert config.output_dir == str(folder / "out")
    assert TrainConfig.from_yaml(path, ["output_dir=here"]).output_dir == "here"


@pytest.mark.parametrize(
    "values",
    [
        {"learning_rate": 1e-5, "max_steps": 5, "lr_scheduler": "cosine", "warmup_ratio": 0.1},
        {"load_in_4bit": False, "eval_dataset": "e.jsonl", "eval_steps": 3},
        {"dataset_format": "text", "lora_alpha": 1.5, "rank_pattern": {"a.*": 3}, "run_name": "on"},
    ],
)
def test_the_resolved_config_reads_back_from_any_folder(tmp_path, monkeypatch, values):
    monkeypatch.chdir(tmp_path)
    config = TrainConfig(**REQUIRED, **values)
    elsewhere = tmp_path / "out"
    elsewhere.mkdir()
    again = TrainConfig.from_yaml(write(elsewhere, config.to_yaml()))
    paths = {"output_dir": str(tmp_path / "o")}
    if "eval_dataset" in values:
        paths["eval_dataset"] = str(tmp_path / "e.jsonl")
    assert again.model_dump() == {**config.model_dump(), **paths}


def test_replace_checks_and_keeps_what_was_set():
    config = TrainConfig(max_steps=5).replace(lora_r=8)
    assert (config.max_steps, config.lora_r) == (5, 8)
    with pytest.raises(InputError, match="lora_r: 0"):
        config.replace(lora_r=0)


def test_a_whole_alpha_stays_whole():
    assert repr(TrainConfig(lora_alpha=32).lora_alpha) == "32"
    assert repr(TrainConfig(lora_alpha=1.5).lora_alpha) == "1.5"


def test_an_empty_file_misses_what_is_required(tmp_path):
    path = write(tmp_path, "dataset: null\n")
    found, text = problems(lambda: TrainConfig.from_yaml(path))
    assert found == {("CFG-MISSING", f"{path}:{key}") for key in REQUIRED}
    assert "dataset: missing (expected a file of rows). Try: dataset=train.jsonl" in text
    assert TrainConfig.from_yaml(path, required=()) == TrainConfig()


def test_a_config_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        TrainConfig().lora_r = 3
