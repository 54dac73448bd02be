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
from tests.golden_data import GoldenFile, golden_folder

NAME = "model.layers.1.mlp.up_proj.weight"
STACKED = "model.layers.mlp.up_proj.weight"
STATE = f"{NAME}.quant_state.bitsandbytes__nf4"


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


def as_bytes(fields):
    return np.frombuffer(json.dumps(fields).encode(), np.uint8).copy()


def state(tensors, **changes):
    """Changes fields of the JSON; None takes one out."""
    fields = json.loads(tensors[STATE].tobytes()) | changes
    tensors[STATE] = as_bytes({k: v for k, v in fields.items() if v is not None})


def replace(key, change):
    return lambda t: t.update({key: change(t[key])})


def take_out(key):
    return lambda t: t.pop(key)


def rename(old, new):
    return lambda t: t.update({new: t.pop(old)})


def with_state(**changes):
    return lambda t: state(t, **changes)


def stored_as(codes, dtype):
    return codes.reshape(-1).view(dtype).reshape(-1, 1)


def packed_embeddings(tensors):
    """Gives the embeddings (256, 64) what a 4-bit weight of another shape has, fitted."""
    name = "model.embed_tokens.weight"
    n = tensors[name].size
    fields = json.loads(tensors[STATE].tobytes()) | {"shape": [256, 64]}
    tensors[name] = np.zeros((n // 2, 1), np.uint8)
    tensors[f"{name}.absmax"] = np.zeros(n // 64, np.uint8)
    tensors[f"{name}.nested_absmax"] = np.ones(1, np.float32)
    tensors[STATE.replace(NAME, name)] = as_bytes(fields)
    for table in ("quant_map", "nested_quant_map"):
        tensors[f"{name}.{table}"] = tensors[f"{NAME}.{table}"].copy()


BAD = {
    "embeddings": (packed_embeddings, "W4-MIXED", "embed_tokens.weight: is 4-bit"),
    "weight missing": (take_out(NAME), "W4-KEYS", "missing weight beside absmax"),
    "absmax missing": (take_out(f"{NAME}.absmax"), "W4-KEYS", "missing absmax"),
    "map missing": (take_out(f"{NAME}.quant_map"), "W4-KEYS", "missing quant_map"),
    "nested missing": (take_out(f"{NAME}.nested_absmax"), "W4-KEYS", "missing nested_absmax"),
    "nested map missing": (
        take_out(f"{NAME}.nested_quant_map"),
        "W4-KEYS",
        "missing nested_quant_map",
    ),
    "state missing": (take_out(STATE), "W4-KEYS", "missing quant_state"),
    "state doubled": (
        lambda t: t.update({STATE.replace("nf4", "fp4"): t[STATE].copy()}),
        "W4-KEYS",
        "doubled quant_state",
    ),
    "key unknown": (
        lambda t: t.update({f"{NAME}.scb": np.zeros(1, np.float32)}),
        "W-UNKNOWN",
        f"{NAME}.scb",
    ),
    "kind unknown": (rename(STATE, STATE.replace("nf4", "nf5")), "W4-KIND", "bitsandbytes__nf5"),
    "kind other": (with_state(quant_type="fp4"), "W4-STATE", "quant_type is 'fp4'"),
    "kind no text": (with_state(quant_type=[4]), "W4-STATE", "quant_type is [4]"),
    "block missing": (with_state(blocksize=None), "W4-STATE", "blocksize is 'missing'"),
    "block odd": (with_state(blocksize=48), "W4-STATE", "blocksize is 48"),
    "block float": (with_state(blocksize=64.0), "W4-STATE", "blocksize is 64.0"),
    "block other": (with_state(blocksize=128), "W4-SHAPE", "absmax is uint8 of shape (128,)"),
    "dtype": (with_state(dtype="float8"), "W4-STATE", "dtype is 'float8'"),
    "shape missing": (with_state(shape=None), "W4-STATE", "shape is 'missing'"),
    "shape rank": (with_state(shape=[8192]), "W4-STATE", "shape is [8192]"),
    "shape zero": (with_state(shape=[0, 64]), "W4-STATE", "shape is [0, 64]"),
    "shape huge": (with_state(shape=[10**400, 64]), "W4-STATE", "shape is [1000"),
    "shape other": (with_state(shape=[64, 64]), "W4-SHAPE", "weight is uint8 of shape (4096, 1)"),
    "shape turned": (with_state(shape=[64, 128]), "W-SHAPE", "has the shape (64, 128)"),
    "offset missing": (with_state(nested_offset=None), "W4-STATE", "nested_offset is 'missing'"),
    "offset text": (with_state(nested_offset="1"), "W4-STATE", "nested_offset is '1'"),
    "offset large": (with_state(nested_offset=1e300), "W4-STATE", "nested_offset is 1e+300"),
    "nested block": (with_state(nested_blocksize=64), "W4-STATE", "nested_blocksize is 64"),
    "nested dtype": (with_state(nested_dtype="float16"), "W4-STATE", "nested_dtype is 'float16'"),
    "field unknown": (with_state(axis=1), "W4-STATE", "unknown axis"),
    "state NaN": (with_state(nested_offset=float("nan")), "JSON-NUMBER", "NaN"),
    "state no JSON": (replace(STATE, lambda s: s[:-1].copy()), "JSON-SYNTAX", NAME),
    "state floats": (replace(STATE, lambda s: s.astype(np.float32)), "W4-SHAPE", "is float32"),
    "not nested": (
        with_state(nested_blocksize=None, nested_dtype=None, nested_offset=None),
        "W4-KEYS",
        "unknown nested_absmax, nested_quant_map",
    ),
    "absmax floats": (
        replace(f"{NAME}.absmax", lambda a: a.astype(np.float32)),
        "W4-SHAPE",
        "absmax is float32",
    ),
    "codes cut": (replace(NAME, lambda c: c[:-1].copy()), "W4-SHAPE", "of shape (4095, 1)"),
    "codes of 16 bits": (
        replace(NAME, lambda c: stored_as(c, np.int16)),
        "W4-SHAPE",
        "weight is int16 of shape (2048, 1) (expected uint8 of shape (4096, 1), or its bytes as",
    ),
    "codes cut in another storage": (
        replace(NAME, lambda c: stored_as(c, np.float32)[:-1].copy()),
        "W4-SHAPE",
        "weight is float32 of shape (1023, 1)",
    ),
    "absmax cut": (
        replace(f"{NAME}.absmax", lambda a: a[:-1].copy()),
        "W4-SHAPE",
        "absmax is uint8 of shape (127,)",
    ),
    "absmax turned": (
        replace(f"{NAME}.absmax", lambda a: a.reshape(1, -1)),
        "W4-SHAPE",
        "absmax is uint8 of shape (1, 128)",
    ),
    "nested cut": (
        replace(f"{NAME}.nested_absmax", lambda a: a[:-1].copy()),
        "W4-SHAPE",
        "nested_absmax is float32 of shape (0,)",
    ),
    "nested halves": (
        replace(f"{NAME}.nested_absmax", lambda a: a.astype(np.float16)),
        "W4-SHAPE",
        "nested_absmax is float16",
    ),
    "map cut": (
        replace(f"{NAME}.quant_map", lambda m: m[:-1].copy()),
        "W4-SHAPE",
        "quant_map is float32 of shape (15,)",
    ),
    "map doubles": (
        replace(f"{NAME}.quant_map", lambda m: m.astype(np.float64)),
        "W4-SHAPE",
        "quant_map is float64",
    ),
    "nested map cut": (
        replace(f"{NAME}.nested_quant_map", lambda m: m[:-1].copy()),
        "W4-SHAPE",
        "nested_quant_map is float32 of shape (255,)",
    ),
    "state empty": (replace(STATE, lambda s: s[:0].copy()), "W4-SHAPE", "of shape (0,)"),
    "codes turned": (replace(NAME, lambda c: c.reshape(1, -1)), "W4-SHAPE", "of shape (1, 4096)"),
    "map other": (
        replace(f"{NAME}.quant_map", lambda m: m[::-1].copy()),
        "W4-MAP",
        "not the table of nf4",
    ),
    "map NaN": (replace(f"{NAME}.quant_map", lambda m: m * np.float32(np.nan)), "W4-MAP", "nf4"),
    "nested map other": (
        replace(f"{NAME}.nested_quant_map", lambda m: m * np.float32(0.9)),
        "W4-MAP",
        "nested_quant_map",
    ),
    "nested overflow": (
        lambda tensors: (
            with_state(nested_offset=3e38)(tensors),
            replace(f"{NAME}.nested_absmax", lambda a: a * 0 - np.float32(3e38))(tensors),
        ),
        "W-FINITE",
        f"{NAME}.nested_absmax: is not finite: inf at index (0,)",
    ),
    "nested NaN": (
        replace(f"{NAME}.nested_absmax", lambda a: a * np.float32(np.nan)),
        "W-FINITE",
        f"{NAME}.nested_absmax: is not finite: nan at index (0,)",
    ),
    "norm Inf": (
        replace("model.norm.weight", lambda a: a * np.float32(np.inf)),
        "W-FINITE",
        "model.norm.weight",
    ),
    "one layer dense": (
        lambda t: (
            [t.pop(key) for key in list(t) if key.startswith(f"{NAME}.")]
            and t.update({NAME: np.zeros((128, 64), np.float32)})
        ),
        "W4-MIXED",
        "layers differ",
    ),
}


def edited(tmp_path, edit):
    """A copy of the golden checkpoint with its tensors edited."""
    folder = tmp_path / "model"
    shutil.copytree(golden_folder("bnb_state") / "checkpoint", folder)
    tensors = load_file(folder / SINGLE)
    edit(tensors)
    save_file(tensors, folder / SINGLE)
    return folder


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
