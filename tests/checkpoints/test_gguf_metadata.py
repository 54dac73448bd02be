"""Models as llama.cpp wants them: names by the gguf package's table, keys written out by hand."""

import dataclasses
import json

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file

from qlora_jax.checkpoints.gguf_metadata import model_metadata
from qlora_jax.checkpoints.gguf_names import join_halves, split_halves
from qlora_jax.checkpoints.gguf_tensors import (
    architecture_of,
    rope_tensors,
    specs_of,
    stored,
    weight_table,
)
from qlora_jax.errors import InputError
from qlora_jax.models.config import ModelConfig
from tests.checkpoints.gguf_files import interleave
from tests.golden_data import golden_folder

FAMILIES = [
    *("gemma2", "gemma3", "llama", "llama3_rope", "llama_tied", "mistral", "phi3", "qwen2"),
    "qwen3",
]


def config_of(name: str, **changes) -> ModelConfig:
    config = json.loads((golden_folder(f"models/{name}") / "config.json").read_text())
    return ModelConfig.from_dict(config | changes)


def keys_of(name: str, **changes) -> tuple[dict, list[str]]:
    config = config_of(name, **changes)
    metadata, notes = model_metadata(config, name, "f16", "m")
    prefix = architecture_of(config) + "."
    assert metadata["general.architecture"] + "." == prefix
    own = {k.removeprefix(prefix): v for k, v in metadata.items() if k.startswith(prefix)}
    assert metadata == {
        "general.architecture": architecture_of(config),
        "general.type": "model",
        "general.name": name,
        "general.file_type": 1,
        "general.quantization_version": 2,
        **{prefix + key: value for key, value in own.items()},
    }
    return own, notes


LLAMA = {
    "vocab_size": 256,
    "context_length": 128,
    "embedding_length": 64,
    "block_count": 2,
    "feed_forward_length": 128,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "attention.key_length": 16,
    "attention.value_length": 16,
    "attention.layer_norm_rms_epsilon": 1e-6,
    "rope.freq_base": 10000.0,
    "rope.dimension_count": 16,
}
WIDE = {"attention.key_length": 32, "attention.value_length": 32, "rope.dimension_count": 32}
WINDOW = {"attention.sliding_window": 8}
EXPECTED = {
    "gemma2": LLAMA
    | WIDE
    | WINDOW
    | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    "gemma3": LLAMA
    | WIDE
    | WINDOW
    | {"block_count": 7, "rope.freq_base": 1e6, "rope.freq_base_swa": 1e4},
    "llama": LLAMA,
    "llama3_rope": LLAMA | {"rope.freq_base": 5e5},
    "llama_tied": LLAMA,
    "mistral": LLAMA | {"context_length": 8},
    "phi3": LLAMA
    | {
        "attention.layer_norm_rms_epsilon": 1e-5,
        "attention.sliding_window": 0,
        "rope.scaling.original_context_length": 128,
    },
    "qwen2": LLAMA,
    "qwen3": LLAMA | WIDE,
}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_keys_of_every_family(name):
    assert keys_of(name)[0] == EXPECTED[name]


@pytest.mark.parametrize("name", FAMILIES)
def test_names_are_those_of_the_gguf_package(name):
    config = config_of(name)
    numbers = {text: number for number, text in gguf.MODEL_ARCH_NAMES.items()}
    arch = numbers[architecture_of(config)]
    table = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    weights = load_file(golden_folder(f"models/{name}") / "model.safetensors")
    found = weight_table(config)
    assert {key: shape for key, (_, shape) in found.items()} == {
        key: array.shape for key, array in weights.items()
    }
    for key, (gguf_name, _) in found.items():
        assert gguf_name == table.get_name(key, try_suffixes=(".weight", ".bias"))


def test_q_and_k_of_a_llama_are_reordered_and_nothing_else_is():
    config = config_of("llama")
    for key, array in load_file(golden_folder("models/llama") / "model.safetensors").items():
        heads = {"q_proj": 4, "k_proj": 2}.get(key.split(".")[-2])
        expected = array if heads is None else interleave(array, heads)
        np.testing.assert_array_equal(stored(key, array, config), expected)


@pytest.mark.parametrize("shape", [(24,), (24, 5)])
def test_join_and_split_are_inverse(shape):
    rows = np.arange(np.prod(shape)).reshape(shape)
    np.testing.assert_array_equal(split_halves(join_halves(rows, 3), 3), rows)
    np.testing.assert_array_equal(join_halves(np.arange(8), 2), [0, 2, 1, 3, 4, 6, 5, 7])


def test_gemmas_norms_get_their_1():
    config = config_of("gemma3")
    for key, array in load_file(golden_folder("models/gemma3") / "model.safetensors").items():
        np.testing.assert_array_equal(stored(key, array, config), array + ("norm" in key))


def test_llama_3s_rule_becomes_factors():
    rule = config_of("llama3_rope").rope
    assert (rule.theta, rule.factor, rule.original) == (5e5, 8, 32)
    config = dataclasses.replace(
        config_of("llama3_rope"), rope=dataclasses.replace(rule, original=64)
    )
    (factors,) = rope_tensors(config).values()
    wavelength = 2 * np.pi * 500000.0 ** (np.arange(0, 16, 2) / 16)
    smooth = (64 / wavelength - 1) / 3  # long ones are above 64 tokens, short ones below 16
    expected = np.where(wavelength < 16, 1, 1 / ((1 - smooth) / 8 + smooth))
    expected[wavelength > 64] = 8
    assert set(expected) > {1, 8}
    np.testing.assert_allclose(factors, expected, rtol=1e-6)
    assert rope_tensors(config_of("llama")) == {}


LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + i / 8 for i in range(6)],
    "long_factor": [2.0 + i for i in range(6)],
    "partial_rotary_factor": 0.75,
}


def test_phi_3s_long_rope():
    changes = {"rope_parameters": LONG, "original_max_position_embeddings": 32}
    keys, notes = keys_of("phi3", **changes)
    factor = np.sqrt(1 + np.log(4) / np.log(32))  # of 128 tokens instead of 32
    assert keys.pop("rope.scaling.attn_factor") == pytest.approx(factor)
    assert keys == EXPECTED["phi3"] | {
        "rope.dimension_count": 12,
        "rope.scaling.original_context_length": 32,
    }
    assert notes == [
        "llama.cpp takes the long RoPE factors when its context (-c) is above 32 tokens, "
        "transformers when the text is"
    ]
    tensors = rope_tensors(config_of("phi3", **changes))
    assert {name: array.tolist() for name, array in tensors.items()} == {
        "rope_factors_long.weight": LONG["long_factor"],
        "rope_factors_short.weight": LONG["short_factor"],
    }


def rope(**fields) -> dict:
    return {"rope_parameters": {"rope_theta": 10000.0, **fields}}


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (
            {"rope_type": "linear", "factor": 4.0},
            {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
        ),
        (
            YARN,
            {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": 4.0,
                "rope.scaling.original_context_length": 32,
            },
        ),
        ({"rope_type": "dynamic", "factor": 4.0}, {}),
    ],
    ids=["linear", "yarn", "dynamic"],
)
def test_rope_scaling(fields, expected):
    assert keys_of("qwen2", **rope(**fields))[0] == LLAMA | expected


def test_what_llama_cpp_does_otherwise_is_told():
    assert keys_of("llama")[1] == []
    (note,) = keys_of("mistral")[1]
    assert note.startswith("llama.cpp has no sliding window for llama: context_length is the wind")
    (note,) = keys_of("llama", **rope(rope_type="dynamic", factor=2.0))[1]
    assert note.startswith("llama.cpp has no dynamic RoPE scaling: texts beyond context_length, 12")
    assert keys_of("mistral", sliding_window=None) == (LLAMA, [])
    windowed = keys_of("phi3", sliding_window=64)[0]
    assert (windowed["context_length"], windowed["attention.sliding_window"]) == (64, 64)


REFUSED = [
    ("GGOUT-ROPE", "qwen2", rope(rope_type="llama3", factor=8.0, low_freq_factor=1.0,
        high_freq_factor=4.0, original_max_position_embeddings=32)),
    ("GGOUT-ROPE", "llama", rope(**YARN, attention_factor=1.5)),
    ("GGOUT-ROPE", "llama", rope(**YARN, truncate=False)),
    ("GGOUT-ROPE", "llama", rope(**YARN, beta_fast=16.0)),
    ("GGOUT-ROPE", "llama", rope(rope_type="longrope", short_factor=[1.0] * 8,
        long_factor=[2.0] * 8, original_max_position_embeddings=32)),
    ("GGOUT-ROPE", "gemma3", {"rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}}),
    ("GGOUT-BIAS", "qwen3", {"attention_bias": True}),
    ("GGOUT-HEAD", "gemma2", {"tie_word_embeddings": False}),
    ("GGOUT-HEADS", "qwen2", {"head_dim": 32}),
    ("GGOUT-SCALE", "gemma2", {"query_pre_attn_scalar": 64}),
    ("GGOUT-CAP", "gemma2", {"attn_logit_softcapping": None}),
    ("GGOUT-WINDOW", "gemma2", {"layer_types": ["full_attention", "sliding_attention"]}),
    ("GGOUT-WINDOW", "gemma2", {"layer_types": ["full_attention"] * 2}),
]  # fmt: skip


@pytest.mark.parametrize(("code", "name", "changes"), REFUSED)
def test_what_llama_cpp_would_compute_otherwise_is_refused(code, name, changes):
    with pytest.raises(InputError, match=rf"error\[{code}\]: m: "):
        keys_of(name, **changes)


def test_gemmas_27b_models_are_scaled_by_their_width():
    config = config_of("gemma2")
    wide = dataclasses.replace(
        config, num_hidden_layers=46, windows=(8, None) * 23, attention_scale=(64 / 4) ** -0.5
    )
    model_metadata(wide, "wide", "f16", "m")
    with pytest.raises(InputError, match="GGOUT-SCALE"):
        model_metadata(dataclasses.replace(wide, attention_scale=32**-0.5), "wide", "f16", "m")


SHAPES = {
    "token_embd.weight": (8, 64),
    "blk.0.attn_norm.weight": (64,),
    "blk.0.attn_q.weight": (8, 64),
    "blk.0.attn_q.bias": (8,),
    "blk.0.ffn_down.weight": (64, 40),
    "output.weight": (8, 64),
}


@pytest.mark.parametrize(
    ("kind", "formats", "notes"),
    [
        ("f32", "F32 F32 F32 F32 F32 F32", []),
        ("bf16", "BF16 F32 BF16 F32 BF16 BF16", []),
        ("q8_0", "Q8_0 F32 Q8_0 F32 F16 Q8_0", ["rows are no multiple of 32"]),
        ("q4_0", "Q8_0 F32 Q4_0 F32 F16 Q8_0", ["rows are no multiple of 32", "embeddings and h"]),
    ],
)
def test_the_format_of_each_tensor(kind, formats, notes):
    specs, found = specs_of(SHAPES, kind)
    assert " ".join(spec[0] for spec in specs.values()) == formats
    assert {name: spec[1] for name, spec in specs.items()} == SHAPES
    assert all(note.startswith(start) for note, start in zip(found, notes, strict=True))
    assert kind in ("f32", "bf16") or found[0].endswith("F16: blk.0.ffn_down.weight")
