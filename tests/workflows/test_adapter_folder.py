"""What qlora_jax.json says of the base that an adapter was trained on; what it cannot say."""

import json

import pytest

from qlora_jax.errors import InputError
from qlora_jax.quantization.policy import QuantizationConfig
from qlora_jax.workflows.adapter_folder import trained_with
from qlora_jax.workflows.open import open_source
from qlora_jax.workflows.open_as_trained import choose
from tests.golden_data import golden_folder


def write(folder, **fields):
    (folder / "qlora_jax.json").write_text(json.dumps(fields))
    return folder


def test_what_the_base_was(tmp_path):
    how = {"kind": "fp4", "block_size": 128, "double_quant": False}
    folder = write(tmp_path, quantization=how, dtype="float16")
    assert trained_with(folder) == (QuantizationConfig("fp4", 128, False), "float16")
    assert trained_with(write(tmp_path, quantization=None, dtype="float32")) == (None, "float32")
    assert trained_with(write(tmp_path, dtype="float32")) is None


def test_an_adapter_that_does_not_say_is_told(tmp_path):
    with open_source(golden_folder("models/llama")) as source:
        assert choose(source).reason == "nf4, the default"
        choice = choose(source, tmp_path)
    assert (choice.quantization, choice.dtype) == (None, "float32")
    expected = f"since {tmp_path} does not say; --quantization nf4 if it was trained on that"
    assert choice.reason == f"as stored, {expected}"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"quantization": None, "dtype": "float8"}, "dtype is 'float8'"),
        ({"quantization": None, "dtype": {}}, "dtype is {}"),
        ({"quantization": [4], "dtype": "float32"}, r"quantization is \[4\]"),
        ({"quantization": {"bits": 4}, "dtype": "float32"}, "quantization is {'bits': 4}"),
        ({"quantization": {"kind": []}, "dtype": "float32"}, "quantization is {'kind': "),
    ],
)
def test_damage_is_refused(tmp_path, fields, words):
    with pytest.raises(InputError, match=rf"PEFT-EXTRA\]: .*qlora_jax.json: {words}"):
        trained_with(write(tmp_path, **fields))
