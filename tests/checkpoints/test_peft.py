"""Adapters go out to PEFT's folders and come back as they were."""

import json
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qlora_jax.adapters.adapter import Adapter
from qlora_jax.checkpoints import peft
from qlora_jax.checkpoints.peft import load_adapter, read_extra, save_adapter
from qlora_jax.errors import InputError, StorageError
from tests.checkpoints.peft_folders import MODEL, Q0, edit_tensors, refused, saved, trained
from tests.checkpoints.torch_writer import torch_bytes

FILES = {"adapter_config.json", "adapter_model.safetensors", "qlora_jax.json"}


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
