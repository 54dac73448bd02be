"""A model in another form: the same bits where nothing is lost, one weight in memory at a time."""

import json
import shutil
import weakref
from concurrent.futures import ThreadPoolExecutor

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qlora_jax.checkpoints import load
from qlora_jax.checkpoints.load import Loader
from qlora_jax.checkpoints.shards import INDEX, SINGLE, Shards
from qlora_jax.errors import InputError
from qlora_jax.models import ModelConfig
from qlora_jax.quantization.policy import QuantizationConfig
from qlora_jax.quantization.tensor import QuantizedTensor
from qlora_jax.workflows.convert import (
    bnb_checkpoint,
    dense_checkpoint,
    dense_weights,
    parameters,
    quantize_checkpoint,
)
from qlora_jax.workflows.open import load_model, open_source
from tests.golden_data import GoldenFile, golden_folder
from tests.tiny_model import write_tiny_model
from tests.tolerances import LOGITS_ATOL

DENSE, PACKED = golden_folder("bnb_state") / "source", golden_folder("bnb_state") / "checkpoint"
EMBEDDINGS, UP = "model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"


def arrays(folder):
    with Shards(folder) as source:
        return {name: source.read(name) for name in source.names()}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape), name
        assert found[name].tobytes() == array.tobytes(), name


@pytest.fixture
def in_dtype(tmp_path):
    """A function that writes the tiny model in another dtype."""

    def write(dtype):
        folder = write_tiny_model(tmp_path / dtype)
        tensors = {name: a.astype(dtype) for name, a in load_file(folder / SINGLE).items()}
        save_file(tensors, folder / SINGLE, {"format": "pt"})
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"dtype": dtype}))
        return folder

    return write


def test_what_bitsandbytes_wrote_answers_as_it_does():
    with open_source(PACKED) as source:
        model = load_model(source, quantization=None, dtype="float32")
    inputs = {"input_ids", "attention_mask"}
    with GoldenFile(PACKED.parent / "io.npz", inputs=inputs) as golden:
        mask = golden.input("attention_mask").astype(np.int32)
        logits = model(golden.input("input_ids").astype(np.int32), attention_mask=mask)
        golden.compare("logits", logits, atol=LOGITS_ATOL, where=mask)


def test_a_quantization_config_that_is_null_is_none(tmp_path):
    shutil.copytree(DENSE, tmp_path / "dense")
    config = json.loads((DENSE / "config.json").read_text()) | {"quantization_config": None}
    (tmp_path / "dense" / "config.json").write_text(json.dumps(config))
    bnb_checkpoint(tmp_path / "dense", tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written == json.loads((PACKED / "config.json").read_text())


@pytest.mark.parametrize("origin", [DENSE, PACKED])
def test_bitsandbytes_folder_is_that_of_bitsandbytes(tmp_path, origin):
    assert bnb_checkpoint(origin, tmp_path / "out") is False
    assert_same(arrays(tmp_path / "out"), arrays(PACKED))
    for name in ("config.json", "generation_config.json"):
        written = json.loads((tmp_path / "out" / name).read_text())
        assert written == json.loads((PACKED / name).read_text())


def test_a_copy_says_of_its_tensors_what_they_are(tmp_path):
    """Whatever the source's config.json says: readers look at each matrix's own state."""
    source = tmp_path / "source"
    shutil.copytree(PACKED, source)
    config = json.loads((source / "config.json").read_text())
    right = dict(config["quantization_config"])
    wrong = {"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False}
    config["quantization_config"] |= {**wrong, "bnb_4bit_quant_storage": "bfloat16"}
    (source / "config.json").write_text(json.dumps(config))
    bnb_checkpoint(source, tmp_path / "copy")
    copied = json.loads((tmp_path / "copy" / "config.json").read_text())["quantization_config"]
    assert copied == right


def test_a_4bit_model_is_never_quantized_again(tmp_path):
    with pytest.raises(InputError, match="W4-REQUANTIZE"):
        quantize_checkpoint(PACKED, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("convert", [quantize_checkpoint, bnb_checkpoint, dense_checkpoint])
def test_the_sources_dtype_is_kept(tmp_path, in_dtype, convert, dtype):
    source = in_dtype(dtype)
    convert(source, tmp_path / "out")
    convert(source, tmp_path / "wide", dtype="float32")
    own, wide, expected = arrays(tmp_path / "out"), arrays(tmp_path / "wide"), arrays(source)
    for name in (EMBEDDINGS, "model.norm.weight"):
        assert_same({name: own[name]}, {name: expected[name]})
        assert wide[name].dtype == np.float32
    for folder, said in (("out", dtype), ("wide", "float32")):
        assert json.loads((tmp_path / folder / "config.json").read_text())["dtype"] == said
    assert parameters(source, None)[EMBEDDINGS].dtype == dtype


def test_dense_to_dense_is_a_copy(tmp_path, in_dtype):
    source = in_dtype("bfloat16")
    assert dense_checkpoint(source, tmp_path / "out") is True
    assert (tmp_path / "out" / SINGLE).read_bytes() == (source / SINGLE).read_bytes()
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {path.name for path in source.iterdir()} - {"io.npz"}


@pytest.mark.parametrize("shard_bytes", [10**9, 100_000])
def test_dense_weights_of_a_4bit_model_are_those_it_computes_with(tmp_path, shard_bytes):
    dense_checkpoint(PACKED, tmp_path / "out", shard_bytes=shard_bytes)
    assert (tmp_path / "out" / INDEX).exists() == (shard_bytes < 10**9)
    expected = parameters(PACKED, "float32")
    found = arrays(tmp_path / "out")
    assert found.keys() == arrays(DENSE).keys()
    for name, array in found.items():
        layer = int(name.split(".")[2]) if "layers" in name else ...
        weight = expected[name.replace(f"layers.{layer}.", "layers.")]
        weight = weight[layer] if "layers" in name else weight
        dense = weight.dequantize("float32") if isinstance(weight, QuantizedTensor) else weight
        np.testing.assert_array_equal(array, dense)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_a_report_is_written_with_the_weights(tmp_path):
    report, _ = quantize_checkpoint(DENSE, tmp_path / "out", report=True)
    assert len(report.weights) == 14
    assert json.loads((tmp_path / "out" / "quantization.json").read_text()) == report.to_json()
    assert (tmp_path / "out" / "quantization.png").read_bytes().startswith(b"\x89PNG")


def test_progress_counts_the_bytes_of_all_weights(tmp_path):
    seen = []
    quantize_checkpoint(DENSE, tmp_path / "out", progress=lambda *step: seen.append(step))
    dense = arrays(DENSE)
    assert {name for _, _, name in seen} == dense.keys()
    assert seen[-1][:2] == (sum(a.nbytes for a in dense.values()),) * 2


@pytest.mark.parametrize("how", [QuantizationConfig(), None])
def test_at_most_two_weights_are_in_memory(monkeypatch, how):
    """One that is used, and one that is read meanwhile: when a read is asked for, one is there."""
    alive, counts = [], []

    class Watched(Shards):
        def read(self, name):
            array = super().read(name)
            alive.append(weakref.ref(array))
            return array

    class Asked(ThreadPoolExecutor):
        def submit(self, *call):
            counts.append(sum(array() is not None for array in alive))
            return super().submit(*call)

    monkeypatch.setattr(load, "ThreadPoolExecutor", Asked)
    with Watched(DENSE) as source:
        loader = Loader(source, ModelConfig.from_dict(source.config), how, "float32")
        pairs = loader.weights() if how else dense_weights(loader)
        for _, weight in pairs:
            jax.block_until_ready(weight)
            del weight
    assert counts == [0] + [1] * 21


def test_bytes_of_mixed_dtypes_are_cast_to_one(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(DENSE, source)
    tensors = load_file(source / SINGLE)
    tensors[UP] = tensors[UP].astype(ml_dtypes.bfloat16)
    save_file(tensors, source / SINGLE)
    dense_checkpoint(source, tmp_path / "out")
    assert {array.dtype.name for array in arrays(tmp_path / "out").values()} == {"float32"}
