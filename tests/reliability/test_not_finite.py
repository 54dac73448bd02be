"""R17: NaN or Inf in what a model is made of is refused, with the tensor and the first index."""

import shutil
from pathlib import Path

import gguf
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qlora_jax.adapters.spec import make_spec
from qlora_jax.checkpoints.load import load_weights
from qlora_jax.checkpoints.peft import read_adapter
from qlora_jax.errors import InputError
from qlora_jax.models.config import ModelConfig
from qlora_jax.quantization.policy import QuantizationConfig
from qlora_jax.train.config import TrainConfig
from qlora_jax.workflows import run_state
from qlora_jax.workflows.convert import quantize_checkpoint
from qlora_jax.workflows.open import open_source
from tests.checkpoints.torch_writer import zip_of
from tests.reliability import clean

RULE = "R17"
NAME = "model.layers.1.mlp.up_proj.weight"
NORM = "model.norm.weight"
VALUES = {"nan": np.nan, "inf": np.inf, "-inf": -np.inf}
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
KINDS = gguf.GGMLQuantizationType


def load(path: Path, how: QuantizationConfig | None = None) -> None:
    with open_source(path) as source:
        load_weights(source, ModelConfig.from_dict(source.config), how, dtype="float32")


def refused(path: Path, name: str, index: str, how: QuantizationConfig | None = None) -> None:
    with pytest.raises(InputError) as caught:
        load(path, how)
    assert caught.value.code in ("W-FINITE", "GG-NAN")
    assert name in str(caught.value)
    assert index in str(caught.value)


def poison(path: Path, name: str, index: tuple[int, ...], value: float) -> None:
    """Puts one value, and NaN behind it, into a tensor of a safetensors file."""
    arrays = load_file(path)
    arrays[name] = arrays[name].copy()
    arrays[name][index] = value
    arrays[name].reshape(-1)[-1] = np.nan
    save_file(arrays, path)


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_weight(tmp_path, dtype, value):
    folder = clean.model(tmp_path / "model")
    path = folder / "model.safetensors"
    save_file({k: v.astype(DTYPES[dtype]) for k, v in load_file(path).items()}, path)
    load(folder)
    poison(path, NAME, (3, 5), VALUES[value])
    refused(folder, NAME, f"{value} at index (3, 5)")


@pytest.mark.parametrize("value", ["nan", "inf"])
@pytest.mark.parametrize("double_quant", [True, False], ids=["nested", "plain"])
def test_a_weight_that_is_quantized(tmp_path, double_quant, value):
    folder = clean.model(tmp_path / "model")
    poison(folder / "model.safetensors", NAME, (3, 5), VALUES[value])
    refused(folder, NAME, "at index (3, 5)", QuantizationConfig(double_quant=double_quant))


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("key", ["absmax", "nested_absmax"])
def test_a_scale(tmp_path, key, value):
    how = QuantizationConfig(block_size=64, double_quant=key == "nested_absmax")
    quantize_checkpoint(clean.model(tmp_path / "model"), tmp_path / "packed", how)
    load(tmp_path / "packed")
    index = 7 if key == "absmax" else 0
    poison(tmp_path / "packed" / "model.safetensors", f"{NAME}.{key}", (index,), VALUES[value])
    refused(tmp_path / "packed", f"{NAME}.{key}", f"at index ({index},)")


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0"])
def test_a_gguf_scale(tmp_path, kind):
    file = clean.gguf_parts()
    dims, _, _ = file.tensors["output.weight"]
    file.put("output.weight", np.ones(dims[::-1], np.float32), KINDS[kind])
    payload = bytearray(file.tensors["output.weight"][2])
    values, nbytes = gguf.GGML_QUANT_SIZES[KINDS[kind]]
    start = 64 // values * nbytes  # the scale of the block that holds value 64, or the value
    nan = {"F32": b"\0\0\xc0\x7f", "BF16": b"\xc0\x7f"}.get(kind, b"\0\x7e")
    payload[start : start + len(nan)] = nan
    file.tensors["output.weight"] = dims, int(KINDS[kind]), bytes(payload)
    folder = clean.write(tmp_path / "model", {"model.gguf": file.tobytes()})
    refused(folder / "model.gguf", "output.weight", "nan at value 64")


def test_a_weight_of_a_torch_file(tmp_path):
    folder, members = clean.torch_model(tmp_path / "model"), clean.torch_members()
    load(folder)
    norm = next(m for m in members if m.name.endswith("/data/0"))
    values = np.frombuffer(norm.data, np.float32).copy()
    values[33] = np.inf
    norm.data = values.tobytes()
    (folder / "pytorch_model.bin").write_bytes(zip_of(members))
    refused(folder, "model.embed_tokens.weight", "inf at index (1, 1)")


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("matrix", ["A", "B"])
def test_an_adapter(tmp_path, matrix, value):
    folder = clean.adapter(tmp_path / "adapter")
    name = f"base_model.model.model.layers.0.self_attn.q_proj.lora_{matrix}.weight"
    poison(folder / "adapter_model.safetensors", name, (1, 2), VALUES[value])
    with pytest.raises(InputError, match=r"W-FINITE.*at index \(1, 2\)") as caught:
        read_adapter(folder, clean.ADAPTED, clean.LAYERS)
    assert name in str(caught.value)


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("place", ["params/q/A", "optimizer/mu/q/A", "optimizer/nu/q/A"])
def test_moments(tmp_path, place, value):
    def tree(bad: str = ""):
        def leaf(path: str):
            numbers = np.ones((2, 3), np.float32)
            numbers[1, 2] = VALUES[value] if path == bad else 1
            return jnp.asarray(numbers)

        moments = {kind: {"q": {"A": leaf(f"optimizer/{kind}/q/A")}} for kind in ("mu", "nu")}
        params = {"q": {"A": leaf("params/q/A")}}
        return run_state.RunState(params, moments, run_state.Counters(step=3))

    config = TrainConfig(model="m", dataset="d.jsonl", output_dir="o")
    spec = make_spec({"self_attn.q_proj": (3, 2)}, 1)
    identity = run_state.Identity.of(config, "base", "data", spec)
    run_state.save(tmp_path / "good", tree(), identity)
    assert run_state.restore(tmp_path / "good", tree(), identity).counters.step == 3
    run_state.save(tmp_path / "bad", tree(place), identity)
    with pytest.raises(InputError, match=r"W-FINITE.*at index \(1, 2\)") as caught:
        run_state.restore(tmp_path / "bad", tree(), identity)
    assert place in str(caught.value)


def test_what_is_finite_loads(tmp_path):
    """The largest numbers of each dtype are no infinity."""
    folder = clean.model(tmp_path / "model")
    path = folder / "model.safetensors"
    whole = load_file(path)
    for dtype in DTYPES.values():
        arrays = {name: values.astype(dtype) for name, values in whole.items()}
        arrays[NORM][0] = ml_dtypes.finfo(dtype).max
        shutil.rmtree(folder)
        clean.model(folder)
        save_file(arrays, path)
        load(folder)
