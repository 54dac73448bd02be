"""A merged folder holds every weight once, says the truth about itself, and appears whole."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from qlora_jax.checkpoints.merged import save_merged
from qlora_jax.checkpoints.shards import INDEX, SINGLE, Shards
from qlora_jax.errors import InputError
from qlora_jax.models.config import ModelConfig
from tests.golden_data import golden_folder

NAME = "model.layers.1.mlp.up_proj.weight"


def parts(name):
    folder = golden_folder(name)
    config = json.loads((folder / "config.json").read_text())
    return ModelConfig.from_dict(config), load_file(folder / SINGLE), config


@pytest.mark.parametrize("name", ["models/llama", "models/llama_tied", "bnb_state/source"])
@pytest.mark.parametrize("shard_bytes", [10**9, 100_000])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_goes_round(tmp_path, name, shard_bytes, dtype):
    model_config, tensors, config = parts(name)
    extra = {"generation_config.json": golden_folder(name) / "generation_config.json"}
    out = tmp_path / "out"
    save_merged(
        model_config,
        ((key, tensors[key]) for key in tensors),
        config | {"quantization_config": {"quant_method": "bitsandbytes"}},
        out,
        dtype=dtype,
        shard_bytes=shard_bytes,
        extra_files=extra,
    )
    assert (out / INDEX).exists() == (shard_bytes < 10**6)
    assert (out / "generation_config.json").read_bytes() == extra[
        "generation_config.json"
    ].read_bytes()
    with Shards(out) as written:
        assert set(written.names()) == set(tensors)
        for key, array in tensors.items():
            np.testing.assert_array_equal(
                written.read(key),
                array.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype),
            )
        assert written.config == config | {"dtype": dtype}


def test_the_configuration_says_the_truth(tmp_path):
    model_config, tensors, config = parts("models/llama_tied")
    del config["dtype"], config["tie_word_embeddings"]
    save_merged(model_config, tensors, config | {"torch_dtype": "float16"}, tmp_path / "out")
    with Shards(tmp_path / "out") as written:
        assert written.config["dtype"] == "bfloat16"
        assert "torch_dtype" not in written.config
        assert written.config["tie_word_embeddings"] is True


@pytest.mark.parametrize(
    ("edit", "code", "words"),
    [
        (lambda t: t.pop(NAME), "W-MISSING", f"missing weights: {NAME}"),
        (lambda t: t.update({NAME + "s": t[NAME]}), "W-UNKNOWN", f"Try: the name {NAME}"),
        (lambda t: t.update({NAME: t[NAME].T}), "W-SHAPE", "has the shape (64, 128)"),
        (
            lambda t: t[NAME].__setitem__((1, 2), np.nan),
            "W-FINITE",
            f"{NAME}: is not finite: nan at index (1, 2)",
        ),
        (lambda t: t[NAME].__setitem__((1, 2), 7e4), "W-FINITE", "inf at index (1, 2)"),
    ],
)
def test_refuses_and_leaves_nothing(tmp_path, edit, code, words):
    model_config, tensors, config = parts("models/llama")
    edit(tensors)
    with pytest.raises(InputError) as error:
        save_merged(model_config, tensors, config, tmp_path / "out", dtype="float16")
    assert error.value.code == code, str(error.value)
    assert words in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_refuses_a_doubled_weight(tmp_path):
    model_config, tensors, config = parts("models/llama")
    pairs = [*tensors.items(), (NAME, tensors[NAME])]
    with pytest.raises(InputError, match=f"W-DOUBLE.*{NAME}"):
        save_merged(model_config, pairs, config, tmp_path / "out")


def test_never_overwrites(tmp_path):
    model_config, tensors, config = parts("models/llama")
    with pytest.raises(InputError, match="OUT-EXISTS"):
        save_merged(model_config, tensors, config, tmp_path)
