"""Every golden model as a GGUF file by hand: llama.cpp's names, keys, order of rows, norms."""

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize, quantize

from qlora_jax.checkpoints.load import load_weights
from qlora_jax.checkpoints.shards import Shards
from qlora_jax.models import Decoder, ModelConfig
from tests.checkpoints.gguf_files import File, f32, string, u32
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


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of q's and k's rows: row (half, i) of a head goes to row (i, half)."""
    halves = weight.reshape(heads, 2, -1, *weight.shape[1:])
    return np.concatenate(
        [np.stack(list(zip(*head, strict=True))).reshape(-1, *weight.shape[1:]) for head in halves]
    )


def llama3_factors(config: dict) -> np.ndarray:
    """Llama 3's rule, one frequency at a time, as llama.cpp's converter writes it."""
    rule, dim = config["rope_parameters"], config["head_dim"]
    original, factors = rule["original_max_position_embeddings"], []
    low, high, factor = rule["low_freq_factor"], rule["high_freq_factor"], rule["factor"]
    for i in range(dim // 2):
        wavelength = 2 * np.pi * rule["rope_theta"] ** (2 * i / dim)
        smooth = (original / wavelength - low) / (high - low)
        slowed = 1 / ((1 - smooth) / factor + smooth)
        is_fast, is_slow = wavelength < original / high, wavelength > original / low
        factors.append(1.0 if is_fast else factor if is_slow else slowed)
    return np.array(factors, np.float32)


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
            weight = permuted(weight, config["num_attention_heads"])
        if architecture == "llama" and ".k_proj." in weight_name:
            weight = permuted(weight, config["num_key_value_heads"])
        stored = table.get_name(weight_name, try_suffixes=(".weight", ".bias"))
        file.put(stored, weight, kind if weight.ndim == 2 else F32)
    if rope.get("rope_type") == "llama3":
        file.put("rope_freqs.weight", llama3_factors(config), F32)
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
