"""PEFT folders that are refused: configs, tensors and files, each by a line that says why."""

import os

import jax
import numpy as np
import pytest

from qlora_jax.checkpoints.peft import load_adapter
from tests.checkpoints.peft_folders import MODEL, Q0, edit_config, edit_tensors, refused, saved


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
