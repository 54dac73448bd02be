"""bitsandbytes' own files: read and written bit for bit; anything odd in one is refused."""

import json
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from safetensors.numpy import save as packed

from pallas_kernels.quantize.api import DoubleQuantized
from qlora_jax.checkpoints.load import Loader, load_weights
from qlora_jax.checkpoints.quantized import save_quantized
from qlora_jax.checkpoints.shards import INDEX, SINGLE, Shards
from qlora_jax.errors import InputError
from qlora_jax.models.config import ModelConfig
from qlora_jax.quantization.policy import QuantizationConfig
from qlora_jax.quantization.tensor import QuantizedTensor
from tests.checkpoints.bad_quant_states import BAD, NAME, edited, stored_as
from tests.golden_data import GoldenFile, golden_folder

pytestmark = pytest.mark.fully_compiled

STACKED = "model.layers.mlp.up_proj.weight"


def load(folder, *args, **options):
    with Shards(folder) as source:
        return load_weights(source, ModelConfig.from_dict(source.config), *args, **options)


def save(folder, out, how=None, dtype="float32", **options):
    """Writes the model of `folder`, quantized as `how` says or as it is stored."""
    with Shards(folder) as source:
        loader = Loader(source, ModelConfig.from_dict(source.config), how, dtype)
        save_quantized(loader.plan(), loader.weights(), source.config, out, **options)


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def assert_equal_trees(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_golden_is_loaded_as_it_is_stored():
    folder = golden_folder("bnb_state") / "checkpoint"
    weights = load(folder, dtype="float32")
    with GoldenFile(
        folder / SINGLE, part=lambda key: "map" not in key and "state" not in key
    ) as golden:
        for key in golden.outputs():
            stacked = key.replace("layers.0.", "layers.").replace("layers.1.", "layers.")
            name, _, part = stacked.partition(".weight")
            weight = weights[f"{name}.weight"]
            if "layers" in key:
                weight = weight[int(key.split(".")[2])]
            if isinstance(weight, QuantizedTensor):
                leaf = {
                    "": weight.codes.reshape(-1, 1),
                    ".absmax": weight.absmax.codes.reshape(-1),
                    ".nested_absmax": weight.absmax.absmax,
                }[part]
            else:
                leaf = weight
            golden.compare_exact(key, leaf)


@pytest.mark.parametrize("origin", ["source", "checkpoint"])
def test_golden_is_written_bit_for_bit(tmp_path, origin):
    golden = golden_folder("bnb_state")
    how = QuantizationConfig() if origin == "source" else None
    save(golden / origin, tmp_path / "out", how)
    written = load_file(tmp_path / "out" / SINGLE)
    with GoldenFile(golden / "checkpoint" / SINGLE) as tensors:
        assert written.keys() == set(tensors.keys())
        for key in tensors.outputs():
            tensors.compare_exact(key, written[key])
    assert config_of(tmp_path / "out") == config_of(golden / "checkpoint")


def test_a_copy_has_the_bytes_of_the_package(tmp_path):
    folder = golden_folder("bnb_state") / "checkpoint"
    save(folder, tmp_path / "out")
    packed_by_the_package = packed(load_file(folder / SINGLE), {"format": "pt"})
    assert (tmp_path / "out" / SINGLE).read_bytes() == packed_by_the_package


@pytest.mark.parametrize(
    ("kind", "block_size", "double_quant"),
    [
        ("nf4", 32, False),
        ("nf4", 64, True),
        ("fp4", 64, False),
        ("fp4", 4096, True),
        ("int4", 32, True),
        ("int4", 4096, False),
    ],
)
def test_every_kind_goes_round(tmp_path, kind, block_size, double_quant):
    how = QuantizationConfig(
        kind=kind, double_quant=double_quant, block_size=block_size, quantize_lm_head=True
    )
    folder = golden_folder("models/llama")
    weights = load(folder, how)
    assert isinstance(weights["lm_head.weight"], QuantizedTensor)
    save(folder, tmp_path / "out", how, "bfloat16", shard_bytes=20_000)
    assert (tmp_path / "out" / INDEX).exists()
    assert_equal_trees(load(tmp_path / "out", how), weights)
    assert config_of(tmp_path / "out")["quantization_config"]["llm_int8_skip_modules"] == []


def test_an_odd_number_of_weights_goes_round(tmp_path):
    config = config_of(golden_folder("models/llama_tied")) | {"hidden_size": 9, "head_dim": 2}
    config |= {"intermediate_size": 5, "num_attention_heads": 1, "num_key_value_heads": 1}
    config |= {"vocab_size": 7, "num_hidden_layers": 1}
    odd = np.random.default_rng(0)
    shapes = {"model.embed_tokens.weight": (7, 9), "model.norm.weight": (9,)}
    layer = {"self_attn.q_proj": (2, 9), "self_attn.k_proj": (2, 9), "self_attn.v_proj": (2, 9)}
    layer |= {"self_attn.o_proj": (9, 2), "mlp.gate_proj": (5, 9), "mlp.up_proj": (5, 9)}
    layer |= {"mlp.down_proj": (9, 5), "input_layernorm": (9,), "post_attention_layernorm": (9,)}
    shapes |= {f"model.layers.0.{name}.weight": shape for name, shape in layer.items()}
    tensors = {name: odd.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(config))
    save_file(tensors, source / SINGLE)
    save(source, tmp_path / "out", QuantizationConfig(), "bfloat16")
    assert_equal_trees(load(tmp_path / "out"), load(source, QuantizationConfig()))


def test_dense_only_is_no_4bit_model(tmp_path):
    folder = golden_folder("models/llama")
    with pytest.raises(InputError, match="W4-MIXED"):
        save(folder, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("case", BAD)
def test_refuses(tmp_path, case):
    edit, code, words = BAD[case]
    folder = edited(tmp_path, edit)
    with pytest.raises(InputError) as error:
        load(folder)
    assert error.value.code == code, str(error.value)
    assert words in str(error.value)


@pytest.mark.parametrize(
    "asked",
    [
        QuantizationConfig(kind="fp4"),
        QuantizationConfig(block_size=128),
        QuantizationConfig(double_quant=False),
    ],
)
def test_is_never_quantized_again(asked):
    folder = golden_folder("bnb_state") / "checkpoint"
    assert_equal_trees(load(folder, QuantizationConfig()), load(folder))
    with pytest.raises(InputError, match="W4-REQUANTIZE"):
        load(folder, asked)


@pytest.mark.parametrize(
    "storage", [np.int8, np.float16, ml_dtypes.bfloat16, np.float32, np.float64]
)
def test_codes_may_be_stored_as_another_dtype(tmp_path, storage):
    golden = golden_folder("bnb_state") / "checkpoint"
    folder = tmp_path / "model"
    shutil.copytree(golden, folder)
    tensors = load_file(folder / SINGLE)
    for name in [name.partition(".absmax")[0] for name in tensors if name.endswith(".absmax")]:
        tensors[name] = stored_as(tensors[name], storage)
    save_file(tensors, folder / SINGLE)
    assert_equal_trees(load(folder), load(golden))
    save(folder, tmp_path / "out")
    assert (tmp_path / "out" / SINGLE).read_bytes() == (golden / SINGLE).read_bytes()
    said = config_of(tmp_path / "out")["quantization_config"]
    assert said == config_of(golden)["quantization_config"]


def test_unnested_scales_must_be_finite(tmp_path):
    folder = golden_folder("models/llama")
    save(folder, tmp_path / "out", QuantizationConfig(double_quant=False), "bfloat16")
    tensors = load_file_with_bfloat16(tmp_path / "out")
    tensors[f"{NAME}.absmax"][5] = np.inf
    save_file(tensors, tmp_path / "out" / SINGLE)
    with pytest.raises(InputError, match=r"absmax: is not finite: inf at index \(5,\)"):
        load(tmp_path / "out")


def load_file_with_bfloat16(folder):
    with Shards(folder) as source:
        return {name: source.read(name) for name in source.names()}


def test_scales_stay_double_quantized():
    weights = load(golden_folder("bnb_state") / "checkpoint")
    assert isinstance(weights[STACKED].absmax, DoubleQuantized)
    assert weights[STACKED].absmax.offset.shape == (2,)
    assert weights[STACKED].codes.dtype == jnp.uint8
