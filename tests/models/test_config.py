"""What config.json may say: each family's options, defaults for what is missing, and refusals."""

import json

import pytest

from qlora_jax.errors import InputError, Note
from qlora_jax.models.config import ModelConfig
from tests.golden_data import GOLDEN

LATE = {"use_sliding_window": True, "sliding_window": 4, "layer_types": ...}
FOLDERS = sorted(folder.name for folder in (GOLDEN / "models").iterdir() if folder.is_dir())


def config(name: str, **changes) -> dict:
    fields = json.loads((GOLDEN / "models" / name / "config.json").read_text()) | changes
    return {key: value for key, value in fields.items() if value is not ...}


def read(name: str, **changes) -> ModelConfig:
    """`...` leaves a field out."""
    return ModelConfig.from_dict(config(name, **changes))


@pytest.mark.parametrize("name", FOLDERS)
def test_older_spellings_mean_the_same(name):
    new = config(name)
    rope = new.pop("rope_parameters")
    if name == "gemma3":
        rope = rope["full_attention"]
        new["rope_local_base_freq"] = 10000.0
    old = {key: value for key, value in new.items() if key not in ("dtype", "layer_types")}
    scaling = {key: value for key, value in rope.items() if key not in ("rope_theta", "rope_type")}
    if rope["rope_type"] != "default":
        scaling |= {"type": rope["rope_type"]}
    old |= {"rope_theta": rope["rope_theta"], "torch_dtype": "float32"}
    old |= {"rope_scaling": scaling or None}
    assert ModelConfig.from_dict(old) == read(name)


def test_windows():
    assert read("llama").windows == (None, None)
    assert read("mistral").windows == (8, 8)
    assert read("mistral", sliding_window=None).windows == (None, None)
    assert read("mistral", sliding_window=...).windows == (4096, 4096)
    assert read("qwen2").windows == (None, None)
    assert read("qwen2", **LATE, max_window_layers=1).windows == (None, 4)
    assert read("qwen2", **LATE).windows == (None, None)
    assert read("gemma2").windows == (8, None)
    assert read("gemma2", layer_types=...).windows == (8, None)
    assert read("gemma3").windows == (8, 8, 8, 8, 8, None, 8)
    two = {"layer_types": ..., "sliding_window_pattern": 2}  # the other one is only a record
    assert read("gemma3", **two).windows == (8, None, 8, None, 8, None, 8)
    assert read("phi3", sliding_window=5).windows == (5, 5)


def test_layers_that_are_alike_share_one_rotation():
    alike = read("gemma3", num_hidden_layers=2, layer_types=["sliding_attention"] * 2)
    assert (alike.rope.theta, alike.local_rope) == (10000.0, None)
    assert (alike.scores(9).window, alike.scores(8).window) == (8, None)
    whole = read("gemma3", num_hidden_layers=2, layer_types=["full_attention"] * 2)
    assert (whole.rope.theta, whole.local_rope, whole.scores(99).window) == (1e6, None, None)


def test_an_original_length_of_null_is_none():
    assert read("llama3_rope", original_max_position_embeddings=None) == read("llama3_rope")


def test_how_far_layers_see():
    """A text no longer than the windows is seen whole by all layers, and none needs a mask."""
    mixed = read("gemma2")
    assert mixed.reach(20) == (8, 20)
    assert mixed.scores(20).window is None
    assert mixed.reach(8) == (8, 8)
    assert read("mistral").scores(9).window == 8


def test_gemma_has_defaults_of_its_own():
    bare = read("gemma2", tie_word_embeddings=..., attn_logit_softcapping=..., head_dim=...)
    assert bare.tie_word_embeddings
    assert (bare.attention_softcap, bare.logit_softcap, bare.head_dim) == (50.0, 30.0, 256)
    assert read("gemma2", attn_logit_softcapping=None).attention_softcap is None
    assert read("gemma2", query_pre_attn_scalar=16).attention_scale == 0.25
    assert read("gemma2").embedding_scale == 8.0


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act: 'gelu' is not supported for llama"),
        ("llama", {"final_logit_softcapping": 30.0}, "final_logit_softcapping: '30.0'"),
        ("llama", {"num_local_experts": 8}, "num_local_experts: unknown option"),
        ("llama", {"use_alibi": True}, "use_alibi: unknown option with the value 'True'"),
        ("llama", {"rope_interleaved": True}, "rope_interleaved: unknown option"),
        ("llama", {"sliding_window": 8}, "sliding_window: unknown option with the value '8'"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor: unknown option"),
        ("llama", {"rms_norm_eps": float("inf")}, "rms_norm_eps: is 'inf'"),
        ("llama", {"vocab_size": True}, "vocab_size: is 'True' (expected a whole number"),
        ("llama", {"num_key_value_heads": 3}, "num_key_value_heads: 3 (expected a divisor"),
        ("mistral", {"layer_types": ["full_attention"] * 2}, "layer_types:"),
        ("mistral", {"attention_bias": True}, "attention_bias: 'True' is not supported"),
        ("qwen2", {"attention_bias": False}, "attention_bias: 'False' is not supported"),
        ("qwen2", {"use_mrope": True}, "use_mrope:"),
        ("gemma2", {"hidden_activation": "gelu"}, "hidden_activation: 'gelu' is not supported"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention:"),
        ("gemma2", {"layer_types": ["full_attention"]}, "layer_types: is"),
        ("gemma2", {"layer_types": ["chunked_attention"] * 2}, "layer_types: is"),
        ("gemma2", {"layer_types": [["full_attention"], {}]}, "layer_types: is"),
        ("qwen2", {**LATE, "max_window_layers": "1"}, "max_window_layers: is '1'"),
        ("qwen2", {**LATE, "max_window_layers": None}, "max_window_layers: is 'None'"),
        ("gemma3", {"rope_parameters": {"full_attention": 5}}, "rope_parameters: has {'full_att"),
        ("gemma2", {"attn_logit_softcapping": 0.0}, "attn_logit_softcapping: is '0.0'"),
        ("gemma3", {"layer_types": ..., "sliding_window_pattern": 0}, "sliding_window_pattern:"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping: '50.0'"),
        ("gemma3", {"rope_parameters": {"rope_type": "default"}}, "rope_parameters: has rope_type"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"rope_type": "yarn"}},
            "rope_scaling: differs from rope_parameters",
        ),
        ("qwen2", {"layer_types": ["sliding_attention"] * 2}, "has layers with a window, and"),
        ("gemma2", {"sliding_window": None}, "has layers with a window, and there is none"),
        ("phi3", {"lm_head_bias": True}, "lm_head_bias:"),
        ("phi3", {"full_attn_mod": 2}, "full_attn_mod:"),
    ],
)
def test_what_changes_the_mathematics_is_refused_by_name(name, changes, message):
    with pytest.raises(InputError) as error:
        read(name, **changes)
    assert message in str(error.value)
    assert error.value.code == "CFG-MODEL"


def test_an_unknown_family_names_the_nearest():
    with pytest.raises(InputError, match="a model of family qwen3"):
        read("qwen3", model_type="qwen33")
    with pytest.raises(InputError, match="gemma3_text"):
        read("gemma3", model_type="gemma3")


def test_an_option_that_is_off_or_harmless_is_passed_over():
    assert read("llama", use_alibi=False, num_experts=0, clip_qkv=None) == read("llama")
    with pytest.warns(Note, match="not known, not read: unsloth_version"):
        assert read("llama", unsloth_version="2026.1") == read("llama")
