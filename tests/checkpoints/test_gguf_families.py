"""Every golden model as a GGUF file by hand: llama.cpp's names, keys, order of rows, norms."""

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize, quantize

from qlora_jax.checkpoints.gguf_config import hugging_face_config
from qlora_jax.checkpoints.load import load_weights
from qlora_jax.checkpoints.shards import Shards
from qlora_jax.errors import InputError
from qlora_jax.models import Decoder, ModelConfig
from tests.checkpoints.gguf_files import File, f32, interleave, llama3_factors, string, u32
from tests.golden_data import GOLDEN, GoldenFile
from tests.tolerances import LOGITS_ATOL

F32, Q8_0 = gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.Q8_0
ARCHITECTURES = {
    "gemma2": "gemma2",
    "gemma3": "gemma3",
    "llama": "llama",
    "llama3_rope": "llama",
    "llama_tied": "llama",
    "mistral": "llama",  # llama.cpp has no other, and no window for it
    "phi3": "phi3",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
}
# What config.json says and GGUF does not, since it changes nothing that is computed.
UNSAID = {
    *("attention_dropout", "dtype", "initializer_range", "pretraining_tp", "transformers_version"),
    *("use_cache", "resid_pdrop", "embd_pdrop", "max_window_layers", "_sliding_window_pattern"),
    "use_bidirectional_attention",
}


def written(name: str, kind: gguf.GGMLQuantizationType) -> File:
    """A golden model as llama.cpp's converter writes it."""
    architecture = ARCHITECTURES[name]
    source = Shards(GOLDEN / "models" / name)
    config = source.config
    numbers = {
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "block_count": config["num_hidden_layers"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "vocab_size": config["vocab_size"],
    }
    if architecture == "phi3":
        numbers |= {"rope.dimension_count": 16, "attention.sliding_window": 0}
        numbers["rope.scaling.original_context_length"] = 4096
    elif "head_dim" in config:
        numbers |= dict.fromkeys(("attention.key_length", "attention.value_length"), 0)
        numbers = {key: value or config["head_dim"] for key, value in numbers.items()}
    if architecture.startswith("gemma"):
        numbers["attention.sliding_window"] = config["sliding_window"]
    rope = config["rope_parameters"]
    reals = {
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "rope.freq_base": rope.get("full_attention", rope)["rope_theta"],
    }
    if architecture == "gemma2":
        reals |= {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    tokens = {f"tokenizer.ggml.{key}_token_id": u32(config[f"{name}_token_id"]) for key, name in
              (("bos", "bos"), ("eos", "eos"), ("padding", "pad"))}  # fmt: skip
    file = File(
        keys=[
            ("general.architecture", string(architecture)),
            *((f"{architecture}.{key}", u32(value)) for key, value in numbers.items()),
            *((f"{architecture}.{key}", f32(value)) for key, value in reals.items()),
            *tokens.items(),
        ]
    )
    kinds = {arch: key for key, arch in gguf.MODEL_ARCH_NAMES.items()}
    table = gguf.get_tensor_name_map(kinds[architecture], config["num_hidden_layers"])
    for weight_name in source.names():
        weight = source.read(weight_name)
        if architecture.startswith("gemma") and weight_name.endswith("norm.weight"):
            weight = weight + np.float32(1)
        if architecture == "llama" and ".q_proj." in weight_name:
            weight = interleave(weight, config["num_attention_heads"])
        if architecture == "llama" and ".k_proj." in weight_name:
            weight = interleave(weight, config["num_key_value_heads"])
        stored = table.get_name(weight_name, try_suffixes=(".weight", ".bias"))
        file.put(stored, weight, kind if weight.ndim == 2 else F32)
    if rope.get("rope_type") == "llama3":
        file.put("rope_freqs.weight", llama3_factors(rope, config["head_dim"]), F32)
    return file


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_config_is_config_jsons(opened, name):
    golden = Shards(GOLDEN / "models" / name).config
    config = opened(written(name, F32)).config
    if name == "mistral":
        golden |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
        del golden["sliding_window"]
    if name.startswith("qwen"):  # no layer has a window, and that is what a missing key means
        assert set(golden.pop("layer_types")) == {"full_attention"}
        assert golden.pop("use_sliding_window") is False
        assert golden.pop("sliding_window") is None
    expected = {key: value for key, value in golden.items() if key not in UNSAID}
    assert {key: config[key] for key in expected} == expected
    beyond = config.keys() - golden.keys()
    assert beyond <= {"head_dim", "attention_bias", "mlp_bias"}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_are_the_golden_models(opened, name):
    source = opened(written(name, F32))
    config = ModelConfig.from_dict(source.config)
    model = Decoder.from_weights(config, load_weights(source, config, dtype="float32"), "float32")
    inputs, path = {"input_ids", "attention_mask"}, GOLDEN / "models" / name / "io.npz"
    with GoldenFile(path, inputs=inputs, part={*inputs, "logits"}) as golden:
        ids, mask = golden.input("input_ids"), golden.input("attention_mask")
        logits = model(ids.astype(np.int32), attention_mask=mask.astype(np.int32))
        if name == "mistral":  # as far as its window reaches, which GGUF does not have
            mask = mask * (np.arange(mask.shape[1]) < 8)
        golden.compare("logits", logits, atol=LOGITS_ATOL, where=mask)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_packed_weights_are_dequantized_in_hugging_faces_order(opened, name):
    source, golden = opened(written(name, Q8_0)), Shards(GOLDEN / "models" / name)
    assert sorted(source.names()) == sorted(golden.names())
    for weight_name in source.names():
        weight = expected = golden.read(weight_name)
        if weight.ndim == 2:
            expected = dequantize(quantize(weight, Q8_0), Q8_0)
        elif name.startswith("gemma"):
            expected = (weight + np.float32(1)) - np.float32(1)
        read = source.read(weight_name)
        np.testing.assert_array_equal(read, expected, err_msg=weight_name)
        assert source.dtype(weight_name) == read.dtype.name == "float32"


def scaled(name: str, keys: dict, factors: dict | None = None) -> File:
    """A golden model with other rotary positions."""
    file = written(name, F32)
    for key, value in keys.items():
        kind = {str: string, int: u32, float: f32}[type(value)]
        file.set(f"{ARCHITECTURES[name]}.rope.{key}", kind(value))
    for stem, values in (factors or {}).items():
        file.put(f"{stem}.weight", np.array(values, np.float32), F32)
    return file


SHORT, LONG = [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7], [1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5]
LONGROPE = {"rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG}
FACTORS = {"rope_factors_short": SHORT, "rope_factors_long": LONG}
PHI3 = {"rope_theta": 10000.0, "partial_rotary_factor": 1.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}


SCALED = "scaling.original_context_length"
RULES = {
    "yarn": (
        "qwen2", {"scaling.type": "yarn", "scaling.factor": 4.0, SCALED: 32}, {},
        {"rope_theta": 10000.0, **YARN},
    ),
    "yarn with every field": (
        "llama",
        {"scaling.type": "yarn", "scaling.factor": 4.0, SCALED: 32,
         "scaling.yarn_ext_factor": 1.0, "scaling.yarn_attn_factor": 1.1,
         "scaling.yarn_beta_fast": 16.0, "scaling.yarn_beta_slow": 2.0},
        {},
        {"rope_theta": 10000.0, **YARN,
         "attention_factor": 1.1, "beta_fast": 16.0, "beta_slow": 2.0},
    ),
    "a factor without a rule is linear in llama.cpp": (
        "qwen3", {"scaling.factor": 4.0}, {},
        {"rope_theta": 10000.0, "rope_type": "linear", "factor": 4.0},
    ),
    "none": (
        "llama", {"scaling.type": "none", "scaling.factor": 4.0}, {},
        {"rope_theta": 10000.0, "rope_type": "default"},
    ),
    "layers without a window alone": (
        "gemma3",
        {"scaling.type": "linear", "scaling.factor": 8.0, "freq_base_swa": 5000.0},
        {},
        {"full_attention": {"rope_theta": 1e6, "rope_type": "linear", "factor": 8.0},
         "sliding_attention": {"rope_theta": 5000.0, "rope_type": "default"}},
    ),
    "half of each head": (
        "phi3", {"dimension_count": 8}, {},
        {**PHI3, "rope_type": "default", "partial_rotary_factor": 0.5},
    ),
    "longrope": (
        "phi3", {SCALED: 32}, FACTORS,
        {**PHI3, **LONGROPE, "original_max_position_embeddings": 32},
    ),
    "longrope by name": (
        "phi3", {SCALED: 32, "scaling.attn_factor": 1.25, "scaling.type": "longrope"}, FACTORS,
        {**PHI3, **LONGROPE, "original_max_position_embeddings": 32, "attention_factor": 1.25},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("name", "keys", "factors", "expected"), RULES.values(), ids=RULES)
def test_rotary_rules(opened, name, keys, factors, expected):
    config = opened(scaled(name, keys, factors)).config
    assert config["rope_parameters"] == expected
    assert ModelConfig.from_dict(config)


def test_phi_3s_attention_factor_is_that_of_its_rule_where_the_file_has_none(opened):
    file = scaled("phi3", {SCALED: 32}, FACTORS)
    rope = ModelConfig.from_dict(opened(file).config).rope
    assert rope.attention_factor == pytest.approx((1 + np.log(128 / 32) / np.log(32)) ** 0.5)


@pytest.mark.parametrize(("name", "layers"), [("gemma2", 46), ("gemma3", 62)])
def test_the_largest_gemmas_scale_their_scores_by_another_width(opened, name, layers):
    metadata = opened(written(name, F32)).metadata | {f"{name}.block_count": layers}
    config = hugging_face_config(metadata, [], {}, "x")
    assert config["query_pre_attn_scalar"] == 64 // 4 != config["head_dim"]
    metadata[f"{name}.block_count"] = layers - 1
    assert hugging_face_config(metadata, [], {}, "x")["query_pre_attn_scalar"] == 32


def test_what_an_old_gemma_2_does_not_say_is_llama_cpps(opened):
    file = written("gemma2", F32)
    for key in ("attention.sliding_window", "attn_logit_softcapping", "final_logit_softcapping"):
        file.set(f"gemma2.{key}", None)
    config = opened(file).config
    assert config["sliding_window"] == 4096
    assert (config["attn_logit_softcapping"], config["final_logit_softcapping"]) == (50.0, 30.0)


def test_a_gemma_3_without_a_window_sees_all(opened):
    config = opened(written("gemma3", F32).set("gemma3.attention.sliding_window", u32(0))).config
    assert set(config["layer_types"]) == {"full_attention"}
    assert config["sliding_window"] is None


def test_phi_3s_window_is_kept(opened):
    file = written("phi3", F32).set("phi3.attention.sliding_window", u32(2047))
    assert opened(file).config["sliding_window"] == 2047


def test_biases_of_a_llama_are_permuted_with_its_rows(opened):
    file, rng = written("llama", F32), np.random.default_rng(0)
    biases = {}
    for layer in range(2):
        for part, width, heads in (("q", 64, 4), ("k", 32, 2), ("v", 32, 0), ("output", 64, 0)):
            bias = rng.standard_normal(width).astype(np.float32)
            stored = interleave(bias, heads) if heads else bias
            file.put(f"blk.{layer}.attn_{part}.bias", stored, F32)
            biases[f"model.layers.{layer}.self_attn.{part[0]}_proj.bias"] = bias
    source = opened(file)
    assert source.config["attention_bias"] is True
    for name, bias in biases.items():
        np.testing.assert_array_equal(source.read(name), bias)


def test_an_end_of_turn_ends_a_text_too(opened):
    file = written("llama", F32).set("tokenizer.ggml.eot_token_id", u32(7))
    assert opened(file).config["eos_token_id"] == [2, 7]
    same = written("llama", F32).set("tokenizer.ggml.eot_token_id", u32(2))
    assert opened(same).config["eos_token_id"] == 2


BAD = {
    "short factors alone": ("GG-ROPE", lambda: scaled("phi3", {}, {"rope_factors_short": SHORT})),
    "linear beside factors": (
        "GG-ROPE", lambda: scaled("phi3", {"scaling.type": "linear"}, FACTORS)
    ),
    "too few factors": (
        "CFG-MODEL", lambda: scaled("phi3", {}, {**FACTORS, "rope_factors_long": LONG[:7]})
    ),
    "factor 0": (
        "CFG-MODEL", lambda: scaled("phi3", {}, {**FACTORS, "rope_factors_long": [0.0] * 8})
    ),
    "linear for phi3": ("CFG-MODEL", lambda: scaled("phi3", {"scaling.factor": 2.0})),
    "phi3 of split projections": (
        "GG-UNKNOWN",
        lambda: written("phi3", F32).put("blk.0.attn_q.weight", np.ones((64, 64)), F32),
    ),
    "qwen2 without biases": ("GG-MISSING", lambda: without(written("qwen2", F32), "attn_q.bias")),
    "qwen3 without head norms": (
        "GG-MISSING", lambda: without(written("qwen3", F32), "attn_k_norm.weight")
    ),
    "gemma2 without norms behind": (
        "GG-MISSING", lambda: without(written("gemma2", F32), "post_ffw_norm.weight")
    ),
    "soft cap NaN": (
        "GG-META", lambda: written("gemma2", F32).set("gemma2.attn_logit_softcapping", f32(np.nan))
    ),
    "a window of qwen2": (
        "GG-META", lambda: written("qwen2", F32).set("qwen2.attention.sliding_window", u32(8))
    ),
    "capped scores of gemma3": (
        "GG-META", lambda: written("gemma3", F32).set("gemma3.attn_logit_softcapping", f32(50.0))
    ),
}  # fmt: skip


def without(file: File, ending: str) -> File:
    file.tensors = {n: tensor for n, tensor in file.tensors.items() if not n.endswith(ending)}
    return file


@pytest.mark.parametrize(("code", "build"), BAD.values(), ids=BAD)
def test_bad_files_are_refused(opened, code, build):
    with pytest.raises(InputError, match=r"model\.gguf") as caught:
        opened(build())
    assert caught.value.code == code
