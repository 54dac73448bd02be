"""Small whole checkpoints, of which the tests damage one file at a time. None is written by us."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from qlora_jax.checkpoints.names import hugging_face_names
from qlora_jax.models.config import ModelConfig
from qlora_jax.models.families import weight_shapes
from tests.checkpoints.gguf_files import File, array, f32, string, strings, u32
from tests.checkpoints.safetensors_files import entry, safetensors_bytes
from tests.checkpoints.torch_writer import (
    Member,
    members_of,
    pickle_of,
    storage,
    tensor,
    zip_of,
)
from tests.golden_data import golden_folder

LAYERS = 2
SPECIAL = ["<unk>", "<s>", "</s>"]
ADAPTED = {"self_attn.q_proj": (32, 32), "mlp.down_proj": (32, 64)}  # (out, in)
CONFIG = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "vocab_size": 64,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
    "use_cache": True,
}
FAMILIES = {
    "llama": {
        "hidden_act": "silu",
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        "attention_bias": False,
        "mlp_bias": False,
    },
    "mistral": {"hidden_act": "silu", "sliding_window": 16, "rope_theta": 10000.0},
    "qwen2": {"hidden_act": "silu", "use_sliding_window": False, "rope_theta": 10000.0},
    "qwen3": {
        "hidden_act": "silu",
        "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0},
    },
    "gemma2": {
        "hidden_activation": "gelu_pytorch_tanh",
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "query_pre_attn_scalar": 16,
        "sliding_window": 16,
    },
    "gemma3_text": {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 16,
        "sliding_window": 16,
        "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "phi3": {"hidden_act": "silu", "partial_rotary_factor": 1.0, "rope_theta": 10000.0},
}

ADAPTER = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": "somewhere/model",
    "r": 4,
    "lora_alpha": 8,
    "lora_dropout": 0.0,
    "bias": "none",
    "fan_in_fan_out": False,
    "init_lora_weights": True,
    "inference_mode": True,
    "target_modules": ["q_proj", "down_proj"],
    "rank_pattern": {"layers.1.mlp.down_proj": 2},
    "alpha_pattern": {},
    "modules_to_save": None,
    "use_dora": False,
    "use_rslora": False,
}


def model(folder: Path, family: str = "llama") -> Path:
    """config.json and model.safetensors of a family."""
    config = {"model_type": family, **CONFIG, **FAMILIES[family]}
    return write(folder, {"config.json": config, "model.safetensors": packed(arrays_of(config))})


def sharded(folder: Path) -> Path:
    """Two shards and their index."""
    config = {"model_type": "llama", **CONFIG, **FAMILIES["llama"]}
    arrays = arrays_of(config)
    names = [f"model-0000{i + 1}-of-00002.safetensors" for i in range(2)]
    parts = [dict(list(arrays.items())[i::2]) for i in range(2)]
    total = sum(values.nbytes for values in arrays.values())
    weight_map = {key: names[i] for i, part in enumerate(parts) for key in part}
    files = {name: packed(part) for name, part in zip(names, parts, strict=True)}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    return write(folder, {"config.json": config, "model.safetensors.index.json": index, **files})


def torch_model(folder: Path) -> Path:
    """config.json and pytorch_model.bin."""
    config = {"model_type": "llama", **CONFIG, **FAMILIES["llama"]}
    return write(folder, {"config.json": config, "pytorch_model.bin": zip_of(torch_members())})


def torch_members() -> list[Member]:
    """The members of pytorch_model.bin, data.pkl first."""
    arrays = arrays_of({"model_type": "llama", **CONFIG, **FAMILIES["llama"]})
    items, storages = {}, {}
    for key, (name, values) in enumerate(arrays.items()):
        strides = [step // values.itemsize for step in values.strides]
        items[name] = tensor(storage("Float", str(key), values.size), 0, values.shape, strides)
        storages[str(key)] = values.tobytes()
    return members_of(pickle_of(items), storages)


def bitsandbytes(folder: Path) -> Path:
    """What transformers and bitsandbytes wrote."""
    shutil.copytree(golden_folder("bnb_state") / "checkpoint", folder)
    for path in folder.iterdir():  # golden files may be read-only
        path.chmod(0o644)
    return folder


def adapter(folder: Path) -> Path:
    """A PEFT adapter of two linears."""
    shapes = {}
    for name, (out, width) in ADAPTED.items():
        for layer in range(LAYERS):
            rank = 2 if (name, layer) == ("mlp.down_proj", 1) else 4
            path = f"base_model.model.model.layers.{layer}.{name}"
            shapes |= {f"{path}.lora_A.weight": (rank, width), f"{path}.lora_B.weight": (out, rank)}
    tensors = packed(random_arrays(shapes))
    return write(folder, {"adapter_config.json": ADAPTER, "adapter_model.safetensors": tensors})


def tokenizer(folder: Path) -> Path:
    """A tokenizer of a few letters."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "model_max_length": 128,
        "clean_up_tokenization_spaces": False,
        "chat_template": "{{ messages[0].content }}",
        "added_tokens_decoder": {str(index): special(text) for index, text in enumerate(SPECIAL)},
    }
    return write(folder, {"tokenizer.json": tokenizer_json(), "tokenizer_config.json": config})


def tokenizer_json() -> dict[str, Any]:
    """The object of tokenizer.json."""
    vocabulary = {text: index for index, text in enumerate([*SPECIAL, "a", "b", "ab", "ba"])}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, **special(text)} for i, text in enumerate(SPECIAL)],
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}]},
        "pre_tokenizer": {"type": "Digits", "individual_digits": True},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": "<s>", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
            ],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {"type": "Fuse"},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": [["a", "b"], ["b", "a"]],
        },
    }


def special(text: str) -> dict[str, Any]:
    """An added token's fields, but its id."""
    flags = dict.fromkeys(["single_word", "lstrip", "rstrip", "normalized"], False)
    return {"content": text, "special": True, **flags}


def orbax(folder: Path) -> Path:
    """A tree of ours, the one format that is our own."""
    from qlora_jax.checkpoints.orbax_io import save_orbax

    rng = np.random.default_rng(0)
    tree = {
        "weights": [rng.standard_normal((8, 4)).astype(np.float32), np.arange(6, dtype=np.uint8)],
        "step": 3,
        "none": None,
        "empty": np.zeros((0, 3), np.float16),
    }
    save_orbax(folder, tree, metadata={"loss": 1.5})
    return folder


def gguf_parts() -> File:
    """A GGUF model with four formats, in parts."""
    tokens = ["<s>", "</s>", *"abcdefgh", "ab", *(f"t{i}" for i in range(21))]
    keys = {
        "general.architecture": string("llama"),
        "general.name": string("tiny"),
        "general.alignment": u32(32),
        "llama.context_length": u32(128),
        "llama.embedding_length": u32(32),
        "llama.block_count": u32(1),
        "llama.feed_forward_length": u32(64),
        "llama.attention.head_count": u32(2),
        "llama.attention.head_count_kv": u32(1),
        "llama.attention.layer_norm_rms_epsilon": f32(1e-5),
        "llama.rope.freq_base": f32(10000.0),
        "llama.rope.dimension_count": u32(16),
        "llama.vocab_size": u32(len(tokens)),
        "tokenizer.ggml.model": string("gpt2"),
        "tokenizer.ggml.pre": string("gpt-2"),
        "tokenizer.ggml.tokens": strings(tokens),
        "tokenizer.ggml.token_type": array(5, len(tokens), np.ones(len(tokens), "<i4").tobytes()),
        "tokenizer.ggml.merges": strings(["a b"]),
        "tokenizer.ggml.bos_token_id": u32(0),
        "tokenizer.ggml.eos_token_id": u32(1),
    }
    kinds = gguf.GGMLQuantizationType
    shapes = {
        "token_embd": ((len(tokens), 32), kinds.Q8_0),
        "blk.0.attn_norm": ((32,), kinds.F32),
        "blk.0.attn_q": ((32, 32), kinds.Q4_0),
        "blk.0.attn_k": ((16, 32), kinds.F16),
        "blk.0.attn_v": ((16, 32), kinds.BF16),
        "blk.0.attn_output": ((32, 32), kinds.Q8_0),
        "blk.0.ffn_norm": ((32,), kinds.F32),
        "blk.0.ffn_gate": ((64, 32), kinds.Q4_0),
        "blk.0.ffn_up": ((64, 32), kinds.Q4_1),
        "blk.0.ffn_down": ((32, 64), kinds.F32),
        "output": ((len(tokens), 32), kinds.Q5_0),
        "output_norm": ((32,), kinds.F32),
    }
    file = File(keys=list(keys.items()))
    rng = np.random.default_rng(0)
    for name, (shape, kind) in shapes.items():
        file.put(f"{name}.weight", rng.standard_normal(shape).astype(np.float32), kind)
    return file


def gguf_k_parts() -> File:
    """A GGUF model with the formats of 256 numbers a block, where rows are long enough."""
    file, rng = gguf_parts(), np.random.default_rng(0)
    changed = {"block_count": 3, "feed_forward_length": 256, "rope.dimension_count": 128}
    changed |= {"attention.key_length": 128, "attention.value_length": 128}
    for key, value in changed.items():
        file.set(f"llama.{key}", u32(value))
    kinds = gguf.GGMLQuantizationType
    pairs = [(kinds.Q4_K, kinds.Q6_K), (kinds.Q2_K, kinds.Q5_K), (kinds.Q3_K, kinds.IQ4_XS)]
    layer = {
        **{"attn_norm": (32,), "attn_q": (256, 32), "attn_k": (128, 32), "attn_v": (128, 32)},
        **{"ffn_norm": (32,), "ffn_gate": (256, 32), "ffn_up": (256, 32)},
    }
    last = {name: file.tensors[f"{name}.weight"] for name in ("output", "output_norm")}
    file.tensors = {"token_embd.weight": file.tensors["token_embd.weight"]}
    for index, pair in enumerate(pairs):
        for name, shape in layer.items():
            values = rng.standard_normal(shape).astype(np.float32)
            kind = kinds.F32 if name.endswith("norm") else kinds.Q8_0
            file.put(f"blk.{index}.{name}.weight", values, kind)
        for name, kind in zip(("attn_output", "ffn_down"), pair, strict=True):
            nbytes = 32 * gguf.GGML_QUANT_SIZES[kind][1]
            # No byte has the bit without which a float16 is neither infinite nor NaN.
            payload = (rng.integers(0, 256, nbytes) & 0xBF).astype(np.uint8).tobytes()
            file.tensors[f"blk.{index}.{name}.weight"] = (256, 32), int(kind), payload
    file.tensors |= {f"{name}.weight": tensor for name, tensor in last.items()}
    return file


def gguf_model(folder: Path, parts: Callable[[], File] = gguf_parts) -> Path:
    """A GGUF model in a folder."""
    return write(folder, {"model.gguf": parts().tobytes()})


def arrays_of(config: dict[str, Any]) -> dict[str, np.ndarray]:
    """Random weights of a model by Hugging Face name."""
    read = ModelConfig.from_dict(config)
    shapes = weight_shapes(read)
    names = hugging_face_names(shapes, read.num_hidden_layers)
    return random_arrays({name: shapes[stacked] for name, stacked in names.items()})


def random_arrays(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """float32 arrays by name."""
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def packed(arrays: dict[str, np.ndarray]) -> bytes:
    """A safetensors file of float32 arrays."""
    header, end = {}, 0
    for name, values in arrays.items():
        header[name] = entry("F32", values.shape, (end, end + values.nbytes))
        end += values.nbytes
    return safetensors_bytes(header, b"".join(values.tobytes() for values in arrays.values()))


def write(folder: Path, files: dict[str, Any]) -> Path:
    """A new folder of files, each bytes or an object for JSON."""
    folder.mkdir(parents=True)
    for name, content in files.items():
        content = content if isinstance(content, bytes) else json.dumps(content, indent=1).encode()
        (folder / name).write_bytes(content)
    return folder
