"""Weights come out stacked, cast and quantized as asked; what does not fit is refused by name."""

import json
import shutil
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qlora_jax.checkpoints.load import load_weights
from qlora_jax.checkpoints.shards import SINGLE, Shards
from qlora_jax.errors import InputError
from qlora_jax.models.config import ModelConfig
from qlora_jax.quantization.policy import QuantizationConfig
from qlora_jax.quantization.tensor import QuantizedTensor, quantize
from tests.golden_data import golden_folder

Q_PROJ = "model.layers.1.self_attn.q_proj.weight"
STACKED = "model.layers.self_attn.q_proj.weight"


def load(folder, *args, **options):
    with Shards(folder) as source:
        return load_weights(source, ModelConfig.from_dict(source.config), *args, **options)


@pytest.fixture
def changed(tmp_path):
    """A function that copies the golden llama with other tensors or configuration."""

    def change(edit=None, name="models/llama", **config):
        folder = tmp_path / "model"
        shutil.copytree(golden_folder(name), folder)
        tensors = load_file(folder / SINGLE)
        if edit:
            edit(tensors)
        save_file(tensors, folder / SINGLE)
        old = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(old | config))
        return folder

    return change


@pytest.mark.parametrize("name", ["llama", "llama_tied", "llama3_rope"])
def test_dense_weights_are_stacked(name):
    folder = golden_folder(f"models/{name}")
    tensors, weights = load_file(folder / SINGLE), load(folder, dtype="float32")
    for stacked, weight in weights.items():
        assert isinstance(weight, jax.Array)
        assert weight.dtype == jnp.float32
        layers = weight if "layers" in stacked else weight[None]
        for i, one in enumerate(layers):
            key = stacked.replace("layers.", f"layers.{i}.")
            np.testing.assert_array_equal(one, tensors.pop(key))
    assert not tensors
    assert ("lm_head.weight" in weights) == (name != "llama_tied")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dense_weights_are_rounded_as_jax_does(dtype):
    folder = golden_folder("models/llama")
    name = "model.norm.weight"
    weight = load(folder, dtype=dtype)[name]
    np.testing.assert_array_equal(weight, jnp.asarray(load_file(folder / SINGLE)[name], dtype))


@pytest.mark.parametrize(
    "how",
    [QuantizationConfig(), QuantizationConfig(kind="int4", block_size=32, double_quant=False)],
)
def test_linears_are_quantized(how):
    folder = golden_folder("models/llama")
    calls, steps = [], []
    weights = load(
        folder, how, on_weight=lambda *call: calls.append(call), progress=lambda *s: steps.append(s)
    )
    tensors = load_file(folder / SINGLE)
    quantized = {name for name, weight in weights.items() if isinstance(weight, QuantizedTensor)}
    assert quantized == {name for name in weights if how.covers(name)}
    assert len(quantized) == 7
    expected = quantize(
        jnp.asarray(tensors[Q_PROJ]),
        kind=how.kind,
        block_size=how.block_size,
        double_quant=how.double_quant,
    )
    jax.tree.map(np.testing.assert_array_equal, weights[STACKED][1], expected)
    assert weights[STACKED][1].dtype == "float32"
    assert weights["model.norm.weight"].dtype == jnp.bfloat16
    assert [name for name, _, _ in calls].count(Q_PROJ) == 1
    (dense,) = [dense for name, dense, _ in calls if name == Q_PROJ]
    np.testing.assert_array_equal(dense, tensors[Q_PROJ])
    assert len(calls) == 14
    assert [name for _, _, name in steps].count(Q_PROJ) == 1
    sizes = [tensors[name].nbytes for _, _, name in steps]
    assert [done for done, _, _ in steps] == list(np.cumsum(sizes))
    assert {total for _, total, _ in steps} == {sum(sizes)} == {steps[-1][0]}


def test_the_layout_is_as_asked():
    folder = golden_folder("models/llama")
    plain, halves = (
        load(folder, QuantizationConfig()),
        load(folder, QuantizationConfig(), layout="halves"),
    )
    assert halves[STACKED].layout == "halves"
    jax.tree.map(np.testing.assert_array_equal, halves[STACKED].unpack(), plain[STACKED])


def test_dense_tensors_do_not_pile_up():
    class Watched(Shards):
        def __init__(self, folder):
            super().__init__(folder)
            self.given, self.most = [], 0

        def read(self, name):
            self.most = max(self.most, sum(given() is not None for given in self.given))
            array = super().read(name)
            if len(self.shape(name)) == 2 and "layers" in name:
                self.given.append(weakref.ref(array))
            return array

    with Watched(golden_folder("models/llama")) as source:
        load_weights(source, ModelConfig.from_dict(source.config), QuantizationConfig())
        assert len(source.given) == 14
        assert source.most <= 1


def set_value(name, index, value):
    return lambda tensors: tensors[name].__setitem__(index, value)


BAD = {
    "shape": (
        lambda t: t.update({Q_PROJ: t[Q_PROJ][:32].copy()}),
        {},
        "W-SHAPE",
        f"{Q_PROJ}: has the shape (32, 64) (expected shape (64, 64))",
    ),
    "NaN": (
        set_value(Q_PROJ, (3, 5), np.nan),
        {},
        "W-FINITE",
        f"{Q_PROJ}: is not finite: nan at index (3, 5)",
    ),
    "Inf": (
        set_value("model.norm.weight", 7, -np.inf),
        {},
        "W-FINITE",
        "model.norm.weight: is not finite: -inf at index (7,)",
    ),
    "integers": (
        lambda t: t.update({Q_PROJ: t[Q_PROJ].astype(np.int32)}),
        {},
        "W-DTYPE",
        f"{Q_PROJ}: has the dtype int32",
    ),
    "missing": (lambda t: t.pop(Q_PROJ), {}, "W-MISSING", f"missing weights: {Q_PROJ}"),
    "unknown": (
        lambda t: t.update({"model.layers.0.mlp.gate.weight": t[Q_PROJ].copy()}),
        {},
        "W-UNKNOWN",
        "unknown weights: model.layers.0.mlp.gate.weight",
    ),
    "fewer layers": (None, {"num_hidden_layers": 1}, "W-UNKNOWN", "layers 0 to 0"),
    "more layers": (
        None,
        {"num_hidden_layers": 3},
        "W-MISSING",
        "missing weights: model.layers.2.",
    ),
    "head not tied": (
        None,
        {"tie_word_embeddings": True},
        "W-TIED",
        "lm_head.weight: differs from model.embed",
    ),
    "a number as tied head": (
        lambda t: t.update({"lm_head.weight": np.array(1.0, np.float32)}),
        {"tie_word_embeddings": True},
        "W-TIED",
        "lm_head.weight: differs from model.embed",
    ),
    "other method": (
        None,
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        "W4-METHOD",
        "quant_method 'gptq'",
    ),
    "method alone": (None, {"quantization_config": "bitsandbytes"}, "W4-METHOD", "'bitsandbytes'"),
    "8 bits": (
        None,
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
        "W4-METHOD",
        "expected bitsandbytes with load_in_4bit",
    ),
    "no state": (
        None,
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
        "W4-KEYS",
        "missing quant_state",
    ),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("quantization", [None, QuantizationConfig()], ids=["dense", "nf4"])
def test_refuses(changed, case, quantization):
    edit, config, code, words = BAD[case]
    with pytest.raises(InputError) as error:
        load(changed(edit, **config), quantization)
    assert error.value.code == code, str(error.value)
    assert words in str(error.value)


def test_float16_overflow_is_told(changed):
    folder = changed(set_value("model.norm.weight", 2, 70000.0))
    load(folder, dtype="bfloat16")
    with pytest.raises(InputError, match=r"inf at index \(2,\).*finite in float16"):
        load(folder, dtype="float16")


def test_a_tied_model_may_carry_its_head(changed):
    folder = changed(
        lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].copy()}),
        name="models/llama_tied",
    )
    assert "lm_head.weight" not in load(folder)


def test_layers_of_other_dtypes_are_quantized_from_float32(changed):
    folder = changed(lambda t: t.update({Q_PROJ: t[Q_PROJ].astype(np.float16)}))
    assert load(folder, QuantizationConfig())[STACKED].dtype == "float32"
    folder_64 = changed_to_float64(folder)
    assert load(folder_64, QuantizationConfig())[STACKED].dtype == "float32"


def changed_to_float64(folder):
    tensors = {name: array.astype(np.float64) for name, array in load_file(folder / SINGLE).items()}
    save_file(tensors, folder / SINGLE)
    return folder
