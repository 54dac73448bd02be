import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qlora_jax.adapters.adapter import Adapter
from qlora_jax.adapters.spec import make_spec
from qlora_jax.checkpoints import peft
from qlora_jax.checkpoints.peft import load_adapter, read_extra, save_adapter
from qlora_jax.errors import InputError, StorageError
from tests.adapters.small_model import SmallModel
from tests.checkpoints.torch_writer import torch_bytes

MODEL = SmallModel()
FILES = {"adapter_config.json", "adapter_model.safetensors", "qlora_jax.json"}
Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


def trained(**settings) -> Adapter:
    """An adapter of random numbers, zero where it is padding."""
    random = np.random.default_rng(0)
    shapes = MODEL.module_shapes()
    spec = make_spec(shapes, MODEL.config.num_hidden_layers, **settings)
    params = {}
    for name in spec.targets:
        out, width = shapes[name]
        ranks = spec.ranks(name)
        real = np.float32(np.arange(max(ranks)) < np.array(ranks)[:, None])  # (L, r)
        A = real[:, :, None] * np.float32(random.normal(size=(*real.shape, width)))
        B = real[:, None, :] * np.float32(random.normal(size=(len(ranks), out, max(ranks))))
        params[name] = {"A": jnp.asarray(A), "B": jnp.asarray(B)}
        if spec.use_dora:
            m = real.any(1)[:, None] * np.float32(random.normal(size=(len(ranks), out)))
            params[name]["m"] = jnp.asarray(m)
    for name in spec.modules_to_save:
        params[name] = {"weight": jnp.asarray(np.float32(random.normal(size=shapes[name])))}
    return Adapter(params, spec)


def saved(folder: Path, **settings) -> Path:
    save_adapter(folder / "adapter", trained(**settings))
    return folder / "adapter"


def edit_config(folder: Path, **changes) -> None:
    """Sets keys of adapter_config.json; `...` removes one."""
    path = folder / "adapter_config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


def edit_tensors(folder: Path, edit) -> None:
    """Applies `edit` to the dict of tensors."""
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


def refused(folder: Path, message: str) -> InputError:
    with pytest.raises(InputError, match=message) as error:
        load_adapter(folder, MODEL)
    assert error.value.exit_code == 2
    assert "\n" not in str(error.value)
    return error.value


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 4},
        {"r": 4, "alpha": 8.5, "use_rslora": True, "dropout": 0.05},
        {"r": 4, "targets": ["q_proj", "layers.1.mlp.down_proj"]},
        {"r": 4, "targets": r"model\.layers\.[02]\..*", "exclude": ["k_proj"]},
        {"r": 4, "rank_pattern": {r"layers\.0\.mlp\..*": 2}, "alpha_pattern": {"q_proj": 3}},
        {"r": 4, "use_dora": True, "targets": ["q_proj", "layers.1.mlp.down_proj"]},
        {"r": 2, "modules_to_save": ["embed_tokens", "lm_head"]},
    ],
)
def test_saved_and_loaded_is_the_same(tmp_path, settings):
    adapter = trained(**settings)
    save_adapter(tmp_path / "a", adapter, base_model_name="some/base", extra={"step": 3})
    loaded = load_adapter(tmp_path / "a", MODEL)
    assert loaded.spec == adapter.spec
    jax.tree.map(np.testing.assert_array_equal, loaded, adapter)
    assert {path.name for path in (tmp_path / "a").iterdir()} == FILES
    assert read_extra(tmp_path / "a") == {"step": 3}
    save_adapter(tmp_path / "b", loaded, base_model_name="some/base", extra={"step": 3})
    for name in FILES:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_an_adapter_that_jax_has_mapped_over_is_saved_too(tmp_path):
    adapter = trained(r=2)
    mapped = jax.tree.map(lambda leaf: leaf * 2, adapter)
    assert list(mapped.params) != list(adapter.spec.targets)  # JAX sorts keys
    save_adapter(tmp_path / "a", mapped)
    jax.tree.map(np.testing.assert_array_equal, load_adapter(tmp_path / "a", MODEL), mapped)


def test_the_config_of_a_plain_adapter(tmp_path):
    config = json.loads((saved(tmp_path, r=4) / "adapter_config.json").read_text())
    assert config == {
        "alpha_pattern": {},
        "auto_mapping": None,
        "base_model_name_or_path": None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": 16,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": 4,
        "rank_pattern": {},
        "revision": None,
        "target_modules": ["q_proj", "k_proj", "o_proj", "up_proj", "down_proj"],
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_is_widened(tmp_path, dtype):
    folder = saved(tmp_path, r=2, targets=["q_proj"])
    path = folder / "adapter_model.safetensors"
    narrow = {name: array.astype(dtype) for name, array in load_file(path).items()}
    save_file(narrow, path)
    A, B = load_adapter(folder, MODEL).layer("self_attn.q_proj", 0)
    assert A.dtype == B.dtype == np.float32
    np.testing.assert_array_equal(A, narrow[f"{Q0}.lora_A.weight"].astype(np.float32))
    np.testing.assert_array_equal(B, narrow[f"{Q0}.lora_B.weight"].astype(np.float32))


class SmallTokenizer:
    """Writes files, as a transformers tokenizer does."""

    def save_pretrained(self, folder: str) -> None:
        Path(folder, "tokenizer.json").write_text("{}")
        Path(folder, "more").mkdir()
        Path(folder, "more", "template.jinja").write_text("text")


def test_tokenizer_and_further_files_lie_beside_it(tmp_path):
    files = {"chat_template.jinja": b"a template"}
    save_adapter(tmp_path / "a", trained(r=2), tokenizer=SmallTokenizer(), extra_files=files)
    assert (tmp_path / "a" / "chat_template.jinja").read_bytes() == b"a template"
    assert (tmp_path / "a" / "more" / "template.jinja").read_text() == "text"


def test_a_runs_folder_becomes_the_adapter_and_nothing_is_overwritten(tmp_path):
    (tmp_path / "config.yaml").write_text("r: 4")
    adapter = trained(r=4)
    save_adapter(tmp_path, adapter)
    assert {path.name for path in tmp_path.iterdir()} == {*FILES, "config.yaml"}
    jax.tree.map(np.testing.assert_array_equal, load_adapter(tmp_path, MODEL), adapter)
    before = (tmp_path / "adapter_model.safetensors").read_bytes()
    with pytest.raises(InputError, match=r"holds adapter_config.json, .* already") as error:
        save_adapter(tmp_path, trained(r=2))
    assert error.value.code == "OUT-EXISTS"
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == before
    save_adapter(tmp_path, trained(r=2), replace=True)
    assert load_adapter(tmp_path, MODEL).spec.r == 2


def test_an_adapter_that_is_not_finite_is_not_written(tmp_path):
    adapter = trained(r=2, targets=["q_proj"])
    pair = adapter.params["self_attn.q_proj"]
    spoiled = {"self_attn.q_proj": dict(pair, B=pair["B"].at[0, 0, 0].set(np.nan))}
    with pytest.raises(InputError, match="not finite"):
        save_adapter(tmp_path / "a", Adapter(spoiled, adapter.spec))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("into", ["new", "existing"])
def test_what_does_not_read_back_is_an_error(tmp_path, monkeypatch, into):
    def damaged(tensors, metadata):
        name = next(iter(tensors))
        return whole({**tensors, name: tensors[name] + 1}, metadata)

    whole = peft.save
    monkeypatch.setattr(peft, "save", damaged)
    if into == "existing":
        (tmp_path / "a").mkdir()
    with pytest.raises(StorageError, match="does not read back"):
        save_adapter(tmp_path / "a", trained(r=2))
    assert (tmp_path / "a").exists() == (into == "existing")


def test_a_truncated_file_on_the_disk_is_an_error_of_storage(tmp_path, monkeypatch):
    whole = peft.save
    monkeypatch.setattr(peft, "save", lambda *args, **more: whole(*args, **more)[:-4])
    with pytest.raises(StorageError, match="cannot be read back"):
        save_adapter(tmp_path / "a", trained(r=2))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, r"missing tensors: .*k_proj.lora_magnitude_vector.* and 5 more"),
        ({"use_dora": 1}, r"use_dora: 1 \(expected bool\)"),
        ({"bias": "all"}, "bias: 'all' is not supported"),
        ({"modules_to_save": ["lm_head"]}, r"missing tensors: base_model.model.lm_head.weight"),
        ({"modules_to_save": ["norm"]}, "'norm' cannot be trained in full.*lm_head, embed_tokens"),
        ({"modules_to_save": "lm_head"}, r"modules_to_save: 'lm_head' \(expected list\)"),
        ({"target_modules": ["q_proj", "lm_head"]}, r"lm_head has no A and B.*modules_to_save"),
        ({"target_modules": ["embed_tokens"]}, r"embed_tokens has no A and B.*modules_to_save"),
        ({"target_modules": ".*q_proj|lm_head"}, r"lm_head has no A and B.*modules_to_save"),
        ({"ensure_weight_tying": True}, "ensure_weight_tying: True is not supported"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"lora_bias": True}, "lora_bias"),
        ({"target_parameters": ["x"]}, "target_parameters"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"use_qalora": True}, "use_qalora"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights: 'pissa' is not supported"),
        ({"task_type": "SEQ_CLS"}, "task_type: 'SEQ_CLS'"),
        ({"peft_type": "IA3"}, "peft_type: 'IA3'"),
        ({"peft_type": ...}, "peft_type is missing"),
        ({"r": ...}, "r is missing"),
        ({"target_modules": None}, "target_modules is missing"),
        ({"r": 0}, "r: 0"),
        ({"r": 8}, r"shape \(4, 8\) \(expected shape \(8, 8\)"),
        ({"r": 4.0}, r"r: 4.0 \(expected int\)"),
        ({"r": True}, r"r: True \(expected int\)"),
        ({"lora_alpha": -1}, "lora_alpha: -1"),
        ({"lora_alpha": "16"}, "lora_alpha: '16'"),
        ({"lora_dropout": 1.0}, "lora_dropout: 1.0"),
        ({"use_rslora": 1}, r"use_rslora: 1 \(expected bool\)"),
        ({"target_modules": ["q_proj", 3]}, "target_modules: .*each one str"),
        ({"target_modules": ["q_porj"]}, "'q_porj' matches no linear.*did you mean q_proj"),
        ({"target_modules": "(.+)+x" * 3}, "takes too long to match"),
        ({"target_modules": ["q_proj"]}, "unknown tensors: .*down_proj.* and 14 more"),
        ({"rank_pattern": {"q_proj": "4"}}, "rank_pattern: .*each one int"),
        ({"rank_pattern": [4]}, "rank_pattern: .*expected dict"),
        ({"alpha_pattern": {"q_proj": None}}, "alpha_pattern: .*each one int or float"),
        ({"layers_to_transform": [0.5]}, "layers_to_transform"),
        ({"layers_pattern": ["blocks"]}, "layers_pattern"),
        (
            {"use_rslra": True},
            "use_rslra: unknown key with the value True.*did you mean use_rslora",
        ),
    ],
)
def test_configs_that_are_refused(tmp_path, changes, message):
    folder = saved(tmp_path, r=4)
    edit_config(folder, **changes)
    refused(folder, message)


def test_keys_that_change_nothing_are_taken(tmp_path):
    folder = saved(tmp_path, r=4)
    before = load_adapter(folder, MODEL)
    edit_config(
        folder,
        auto_mapping={"parent_library": "os", "base_model_class": "system"},
        megatron_core="megatron.core",
        loftq_config={"a": 1},
        runtime_config={},
        not_in_any_peft_yet=None,
        also_switched_off=False,
    )
    after = load_adapter(folder, MODEL)
    assert after.spec == before.spec
    jax.tree.map(np.testing.assert_array_equal, after, before)


def swap(tensors):
    a, b = f"{Q0}.lora_A.weight", f"{Q0}.lora_B.weight"
    tensors[a], tensors[b] = tensors[b], tensors[a]


def poison(tensors):
    tensors[f"{Q0}.lora_A.weight"][1, 2] = np.inf


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop(f"{Q0}.lora_B.weight"), f"missing tensors: {Q0}.lora_B.weight"),
        (lambda t: t.clear(), "missing tensors: .* and 20 more"),
        (lambda t: t.update(extra=np.ones(2)), "unknown tensors: extra"),
        (
            lambda t: t.update({"base_model.model.lm_head.weight": np.ones((9, 8))}),
            r"unknown tensors: .*lm_head.weight.* Try: modules_to_save: \['lm_head'\]",
        ),
        (swap, r"lora_A.weight: has the shape \(16, 4\) \(expected shape \(4, 8\), .*swapped"),
        (poison, r"q_proj.lora_A.weight: is not finite: inf at index \(1, 2\)"),
        (lambda t: t.update({f"{Q0}.lora_A.weight": np.ones((4, 8))}), "is float64"),
        (
            lambda t: t.update({f"{Q0}.lora_A.weight": np.ones((4, 9), np.float32)}),
            r"shape \(4, 9\) \(expected shape \(4, 8\), \(r, in\)\)",
        ),
    ],
)
def test_tensors_that_are_refused(tmp_path, edit, message):
    folder = saved(tmp_path, r=4)
    edit_tensors(folder, edit)
    refused(folder, message)


def test_a_folder_that_is_no_adapter(tmp_path):
    refused(tmp_path / "none", "missing adapter: there is no such folder")
    refused(tmp_path, "missing adapter_config.json")
    folder = saved(tmp_path, r=4)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.pt")
    refused(folder, "missing adapter_model.safetensors")


def test_reads_tensors_that_pytorch_wrote(tmp_path):
    """adapter_model.bin of PEFT before 0.8."""
    folder = saved(tmp_path, r=4)
    expected = load_adapter(folder, MODEL)
    tensors = load_file(folder / "adapter_model.safetensors")
    (folder / "adapter_model.bin").write_bytes(torch_bytes(tensors))
    edit_tensors(folder, lambda tensors: tensors.update(extra=np.ones(1)))
    refused(folder, "adapter_model.safetensors.*unknown tensors: extra")  # which wins
    (folder / "adapter_model.safetensors").unlink()
    jax.tree.map(np.testing.assert_array_equal, load_adapter(folder, MODEL).params, expected.params)
    (folder / "adapter_model.bin").write_bytes(torch_bytes(tensors)[:-1])
    refused(folder, "PT-TRUNCATED.*adapter_model.bin")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("adapter_config.json", b"{", "adapter_config.json"),
        ("adapter_config.json", b'{"r": NaN}', "NaN"),
        ("adapter_config.json", b'{"r": 1, "r": 2}', "doubled"),
        ("adapter_config.json", b" " * (1 << 20) + b"{}", "at most"),
        ("adapter_model.safetensors", b"version https://git-lfs.github.com/spec/v1\n", "Git-LFS"),
        ("adapter_model.safetensors", b"", "is empty"),
    ],
)
def test_damaged_files(tmp_path, name, content, message):
    folder = saved(tmp_path, r=4)
    (folder / name).write_bytes(content)
    refused(folder, message)


def test_truncated_tensors(tmp_path):
    folder = saved(tmp_path, r=4)
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    refused(folder, "adapter_model.safetensors")


def test_a_link_out_of_the_folder_is_not_followed(tmp_path):
    folder = saved(tmp_path, r=4)
    path = folder / "adapter_model.safetensors"
    path.rename(tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", path)
    refused(folder, "outside the folder")
