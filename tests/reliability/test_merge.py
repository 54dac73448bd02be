"""R19: an adapter not finite, or too large to merge, is refused; the base stays as it is."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qlora_jax.cli.main import main
from tests.reliability import clean

RULE = "R19"
B0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
LARGE = {"float16": 1e5, "bfloat16": 3e38, "float32": 3e38}  # B that makes W + s B A overflow


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("base", ["dequantized", "original"])
@pytest.mark.parametrize(
    ("value", "dtype", "code"),
    [
        *((value, "float32", "W-FINITE") for value in (np.nan, np.inf, -np.inf)),
        *((value, dtype, "MERGE-FINITE") for dtype, value in LARGE.items()),
    ],
)
def test_nothing_is_written_and_the_base_is_untouched(tmp_path, capsys, base, value, dtype, code):
    folder, adapter = clean.model(tmp_path / "base"), clean.adapter(tmp_path / "adapter")
    arrays = load_file(adapter / "adapter_model.safetensors")
    arrays[B0] = np.full_like(arrays[B0], value)
    save_file(arrays, adapter / "adapter_model.safetensors")
    before = files(folder), files(adapter)
    argv = ["merge", str(adapter), str(tmp_path / "out"), "--model", str(folder)]
    assert main([*argv, "--base", base, "--dtype", dtype]) == 2
    error = capsys.readouterr().err
    assert f"error[{code}]" in error
    assert "layers.0.self_attn.q_proj" in error
    assert (files(folder), files(adapter)) == before
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter"}


@pytest.mark.parametrize(
    ("value", "code"), [(np.nan, "W-FINITE"), (-np.inf, "W-FINITE"), (3e38, "MERGE-FINITE")]
)
def test_nor_is_anything_of_a_merge_back_into_4_bits(tmp_path, capsys, value, code):
    folder, adapter = clean.model(tmp_path / "base"), clean.adapter(tmp_path / "adapter")
    arrays = load_file(adapter / "adapter_model.safetensors")
    arrays[B0] = np.full_like(arrays[B0], value)
    save_file(arrays, adapter / "adapter_model.safetensors")
    before = files(folder), files(adapter)
    argv = ["merge", str(adapter), str(tmp_path / "out"), "--model", str(folder), "--bits", "4"]
    assert main([*argv, "--quantization", "nf4", "--residual-rank", "2"]) == 2
    error = capsys.readouterr().err
    assert f"error[{code}]" in error
    assert "layers.0.self_attn.q_proj" in error
    assert (files(folder), files(adapter)) == before
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter"}
