"""config.json as published models have it: it is taken, and gives the published parameter count."""

import math

import pytest

from qlora_jax.models.config import ModelConfig
from qlora_jax.models.families import weight_shapes

EVERYWHERE = {
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.02,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.0",
    "use_cache": True,
}


def shape(width, inner, layers, heads, groups, vocabulary, positions, **more) -> dict:
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    fields = dict(zip(names, (width, inner, layers, heads), strict=True))
    fields |= {"num_key_value_heads": groups, "vocab_size": vocabulary}
    return EVERYWHERE | fields | {"max_position_embeddings": positions} | more


LLAMA = {"model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5, "pretraining_tp": 1}
LLAMA3 = LLAMA | {
    "attention_bias": False,
    "mlp_bias": False,
    "eos_token_id": [128001, 128008, 128009],
    "rope_theta": 500000.0,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
}
QWEN2 = {
    "model_type": "qwen2",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "use_mrope": False,
    "use_sliding_window": False,
}
QWEN3 = QWEN2 | {
    "model_type": "qwen3",
    "attention_bias": False,
    "head_dim": 128,
    "rope_scaling": None,
    "sliding_window": None,
}
GEMMA2 = {
    "model_type": "gemma2",
    "attention_bias": False,
    "attn_logit_softcapping": 50.0,
    "cache_implementation": "hybrid",
    "final_logit_softcapping": 30.0,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "pad_token_id": 0,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
}
GEMMA3 = GEMMA2 | {
    "model_type": "gemma3_text",
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "query_pre_attn_scalar": 256,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window_pattern": 6,
}
PHI3 = {
    "model_type": "phi3",
    "attention_bias": False,
    "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"},
    "embd_pdrop": 0.0,
    "hidden_act": "silu",
    "original_max_position_embeddings": 4096,
    "resid_pdrop": 0.0,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
}
LONGROPE = {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [1.5] * 48}

# Parameters as the model cards' safetensors headers count them, tied heads once.
PUBLISHED = {
    "SmolLM2-135M": (
        shape(576, 1536, 30, 9, 3, 49152, 8192, **LLAMA, tie_word_embeddings=True)
        | {"is_llama_config": True, "rope_interleaved": False, "rope_theta": 100000},
        134_515_008,
    ),
    "TinyLlama-1.1B": (
        shape(2048, 5632, 22, 32, 4, 32000, 2048, **LLAMA, tie_word_embeddings=False),
        1_100_048_384,
    ),
    "Llama-3.1-8B": (
        shape(4096, 14336, 32, 32, 8, 128256, 131072, **LLAMA3, tie_word_embeddings=False),
        8_030_261_248,
    ),
    "Llama-3.2-1B": (
        shape(2048, 8192, 16, 32, 8, 128256, 131072, **LLAMA3, tie_word_embeddings=True)
        | {"head_dim": 64},
        1_235_814_400,
    ),
    "Mistral-7B-v0.1": (
        shape(4096, 14336, 32, 32, 8, 32000, 32768, model_type="mistral", hidden_act="silu")
        | {"sliding_window": 4096, "rope_theta": 10000.0, "tie_word_embeddings": False},
        7_241_732_096,
    ),
    "Mistral-Nemo-12B": (
        shape(5120, 14336, 40, 32, 8, 131072, 1024000, model_type="mistral", hidden_act="silu")
        | {"head_dim": 128, "sliding_window": None, "rope_theta": 1000000.0},
        12_247_782_400,
    ),
    "Qwen2.5-0.5B": (
        shape(896, 4864, 24, 14, 2, 151936, 32768, **QWEN2, tie_word_embeddings=True)
        | {"sliding_window": 32768, "max_window_layers": 24},
        494_032_768,
    ),
    "Qwen2.5-7B": (
        shape(3584, 18944, 28, 28, 4, 152064, 131072, **QWEN2, tie_word_embeddings=False)
        | {"sliding_window": 131072, "max_window_layers": 28},
        7_615_616_512,
    ),
    "Qwen3-0.6B": (
        shape(1024, 3072, 28, 16, 8, 151936, 40960, **QWEN3, tie_word_embeddings=True)
        | {"max_window_layers": 28},
        596_049_920,
    ),
    "Qwen3-4B": (
        shape(2560, 9728, 36, 32, 8, 151936, 40960, **QWEN3, tie_word_embeddings=True)
        | {"max_window_layers": 36},
        4_022_468_096,
    ),
    "gemma-2-2b": (
        shape(2304, 9216, 26, 8, 4, 256000, 8192, **GEMMA2)
        | {"head_dim": 256, "query_pre_attn_scalar": 256},
        2_614_341_888,
    ),
    "gemma-2-27b": (
        shape(4608, 36864, 46, 32, 16, 256000, 8192, **GEMMA2)
        | {"head_dim": 128, "query_pre_attn_scalar": 144},
        27_227_128_320,
    ),
    "gemma-3-1b": (
        shape(1152, 6912, 26, 4, 1, 262144, 32768, **GEMMA3)
        | {"head_dim": 256, "sliding_window": 512},
        999_885_952,
    ),
    "Phi-3-mini-4k": (
        shape(3072, 8192, 32, 32, 32, 32064, 4096, **PHI3)
        | {"rope_scaling": None, "sliding_window": 2047, "tie_word_embeddings": False},
        3_821_079_552,
    ),
    "Phi-3-mini-128k": (
        shape(3072, 8192, 32, 32, 32, 32064, 131072, **PHI3)
        | {"rope_scaling": LONGROPE, "sliding_window": 262144, "tie_word_embeddings": False},
        3_821_079_552,
    ),
    "Phi-4-mini": (
        shape(3072, 8192, 32, 24, 8, 200064, 131072, **PHI3)
        | {"rope_scaling": LONGROPE, "sliding_window": 262144, "tie_word_embeddings": True}
        | {"partial_rotary_factor": 0.75, "full_attn_mod": 1, "interpolate_factor": 1}
        | {"lm_head_bias": False, "mlp_bias": False},
        3_836_021_760,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_is_taken_and_counts_right(name):
    fields, count = PUBLISHED[name]
    config = ModelConfig.from_dict(fields, name)
    sizes = {
        key: math.prod(shape) * (config.num_hidden_layers if ".layers." in key else 1)
        for key, shape in weight_shapes(config).items()
    }
    assert sum(sizes.values()) == count


def test_what_families_compute_otherwise():
    configs = {name: ModelConfig.from_dict(fields, name) for name, (fields, _) in PUBLISHED.items()}
    assert configs["gemma-2-27b"].attention_scale == 1 / 12
    assert configs["gemma-3-1b"].windows.count(None) == 4
    assert configs["gemma-3-1b"].local_rope.theta == 10000.0
    assert configs["Phi-4-mini"].rope.rotated(configs["Phi-4-mini"].head_dim) == 96
    assert configs["Phi-3-mini-128k"].rope.attention_factor == pytest.approx(math.sqrt(17 / 12))
    assert set(configs["Mistral-7B-v0.1"].windows) == {4096}
    assert set(configs["Qwen2.5-7B"].windows) == {None}
