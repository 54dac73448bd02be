"""The round trip by commands: every format out, opened again, with its dtype, shards and notes."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from qlora_jax.checkpoints.orbax_io import load_orbax
from qlora_jax.checkpoints.shards import Shards
from qlora_jax.cli.main import main
from qlora_jax.workflows.convert import parameters
from qlora_jax.workflows.describe import describe
from qlora_jax.workflows.open import open_source
from tests.cli.converted import write_home

NO_TOKENIZER = "has no tokenizer, so the"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return write_home(tmp_path_factory.mktemp("home"))


@pytest.fixture
def at_home(home, tmp_path, monkeypatch, capsys):
    """The home as the current folder; `call(argv)` runs a command that writes to its {out}."""
    monkeypatch.chdir(home)

    def call(argv: str) -> tuple[Path, str]:
        name = f"{len(list(tmp_path.iterdir()))}" + (".gguf" if "gguf" in argv else "")
        out = tmp_path / name
        code = main(argv.format(out=out).split())
        shown = capsys.readouterr()
        assert (code, shown.err) == (0, ""), shown.err
        assert f"written    {out} (" in shown.out or argv.startswith("quantize")
        return out, shown.out

    return call


def arrays(path: Path | str) -> dict[str, np.ndarray]:
    """The weights of a model as they are stored; a GGUF file's unpacked."""
    with open_source(path) as source:
        return {name: source.read(name) for name in source.names()}


def dtypes(path: Path | str) -> set[str]:
    with open_source(path) as source:
        return {source.dtype(name) for name in source.names()}


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("base", ["model", "model-4bit"])
def test_merge_keeps_the_bases_dtype(at_home, base):
    out, shown = at_home(f"merge run {{out}} --model {base}")
    assert "(float32 as the base): " in shown
    assert dtypes(out) == {"float32"}
    config = json.loads((out / "config.json").read_text())
    assert (config["dtype"], config["tie_word_embeddings"]) == ("float32", False)
    assert "quantization_config" not in config
    assert (out / "tokenizer.json").read_bytes() == Path("run/tokenizer.json").read_bytes()
    assert (out / "generation_config.json").exists()


def test_merge_in_shards(at_home):
    command = "merge run {out} --model model-4bit --dtype float16"
    (whole, _), (split, shown) = at_home(command), at_home(f"{command} --shard-size 100KB")
    assert "(float16): " in shown
    found = describe(split)
    assert found.files == [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    assert_same(arrays(split), arrays(whole))


def test_merge_into_the_original_weights(at_home):
    out, shown = at_home("merge run {out} --model model --base original --tolerance 100")
    assert "merging into the original weights" in shown
    assert_same(
        {name: array for name, array in arrays(out).items() if "norm" in name},
        {name: array for name, array in arrays("model").items() if "norm" in name},
    )


MERGE_4BIT = "merge run {out} --model model-4bit --bits 4 --perplexity-tolerance 9"


@pytest.mark.slow
def test_merge_back_into_the_nearest_codes(at_home):
    plain, shown = at_home(MERGE_4BIT)
    assert "4 bits     requantize: each weight to its nearest code" in shown
    assert "Python's documentation, 1,016 tokens" in shown
    assert arrays("model-4bit").keys() == arrays(plain).keys()


def test_merge_back_into_4_bits(at_home, tmp_path, capsys):
    words = np.random.default_rng(0).choice(["to", "be", "or", "not", "that", "is"], 1500)
    (tmp_path / "text.txt").write_text(" ".join(words))
    calibration = f"--calibration {tmp_path / 'text.txt'} --residual-rank 2"
    out, shown = at_home(f"{MERGE_4BIT} {calibration}")
    assert "4 bits     compensated: for the outputs on text.txt, " in shown
    assert "(4 bits, the rest float32 as the base): " in shown
    assert "held out of text.txt, " in shown
    assert f"residual   {out}-residual: " in shown
    assert describe(Path(f"{out}-residual")).facts["r"] == 2
    assert arrays("model-4bit").keys() == arrays(out).keys()
    assert "quant_method" in json.loads((out / "config.json").read_text())["quantization_config"]
    assert main(["inspect", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "4-bit model" in shown
    for told in (
        "into: dequantized",
        "bits: 4",
        "method: compensated",
        "calibration: name=text.txt",
    ):
        assert told in shown, shown


def test_quantize_in_shards(at_home):
    out, _ = at_home("quantize model {out} --shard-size 100KB")
    assert len(describe(out).files) > 1
    assert_same(arrays(out), arrays("model-4bit"))


def test_export_hf(at_home):
    same, shown = at_home("export model {out} --format hf")
    assert "(hf, float32 as the source): " in shown
    assert_same(arrays(same), arrays("model"))
    dense, _ = at_home("export model-4bit {out} --format hf")
    assert dtypes(dense) == {"float32"}
    half, _ = at_home("export model-4bit {out} --format hf --dtype bfloat16 --shard-size 0.1MB")
    assert dtypes(half) == {"bfloat16"}
    assert len(describe(half).files) == 3
    bare, shown = at_home("export bare {out} --format hf")
    assert NO_TOKENIZER in shown
    assert describe(bare).tokenizer == []


def test_export_4bit(at_home):
    out, shown = at_home("export model {out} --format bnb-4bit")
    assert "(bnb-4bit, float32 as the source): " in shown
    assert_same(arrays(out), arrays("model-4bit"))
    again, _ = at_home("export model-4bit {out} --format bnb-4bit --shard-size 100KB")
    assert_same(arrays(again), arrays("model-4bit"))
    half, _ = at_home("export model-4bit {out} --format bnb-4bit --dtype float16")
    with Shards(half) as source:
        assert source.dtype("model.embed_tokens.weight") == "float16"
    _, shown = at_home("export bare {out} --format bnb-4bit")
    assert NO_TOKENIZER in shown


def test_int4_is_ours_alone(at_home, capsys):
    out, shown = at_home("quantize model {out} --kind int4")
    assert "int4 is read here alone" in shown
    assert main(["export", str(out), "never", "--format", "bnb-4bit"]) == 2
    assert capsys.readouterr().err.startswith("error[W4-INT4]")
    assert not Path("never").exists()
    dense, _ = at_home(f"export {out} {{out}} --format hf")
    assert describe(dense).kind == "model"


def test_export_peft(at_home):
    out, _ = at_home("export run {out} --format peft --model model")
    for name in ("adapter_model.safetensors", "tokenizer.json", "qlora_jax.json"):
        assert (out / name).read_bytes() == Path("run", name).read_bytes()
    back, shown = at_home("export orbax-run {out} --format peft")
    assert NO_TOKENIZER in shown
    tensors = "adapter_model.safetensors"
    assert (back / tensors).read_bytes() == Path("run", tensors).read_bytes()


def test_export_gguf(at_home):
    out, shown = at_home("export model {out} --format gguf")
    assert "(gguf, f32 as the source): " in shown
    assert_same(arrays(out), arrays("model"))
    half, _ = at_home("export model {out} --format gguf --dtype float16")
    named, _ = at_home("export model {out} --format gguf --type f16")
    both, _ = at_home("export model {out} --format gguf --type f16 --dtype float16")
    assert half.read_bytes() == named.read_bytes() == both.read_bytes()
    _, shown = at_home("export bare {out} --format gguf --type q8_0")
    assert NO_TOKENIZER in shown


def test_export_gguf_from_4_bits(at_home):
    import gguf

    out, _ = at_home("export model-4bit {out} --format gguf --type q8_0")
    reader = gguf.GGUFReader(out)
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert types["blk.1.ffn_up.weight"] == "Q8_0"
    assert reader.fields["llama.vocab_size"].contents() == 256
    again, _ = at_home(f"quantize {out} {{out}}")
    assert "4-bit model" in describe(again).kind


@pytest.mark.parametrize("adapter", ["run", "orbax-run"])
def test_export_gguf_lora(at_home, adapter):
    import gguf

    out, _ = at_home(f"export {adapter} {{out}} --format gguf-lora --model model-4bit --type f32")
    reader = gguf.GGUFReader(out)
    assert reader.fields["adapter.type"].contents() == "lora"
    shapes = {tensor.name: tensor.shape.tolist() for tensor in reader.tensors}
    assert shapes["blk.1.ffn_down.weight.lora_a"] == [128, 4]


def test_export_orbax(at_home):
    out, shown = at_home("export model-4bit {out} --format orbax")
    assert "no config.json, no tokenizer" in shown
    found, expected = load_orbax(out), parameters("model-4bit", None)
    up = "model.layers.mlp.up_proj.weight"
    np.testing.assert_array_equal(found[up].dequantize(), expected[up].dequantize())
    adapter, _ = at_home("export run {out} --format orbax --model model")
    assert describe(adapter).kind == "Orbax adapter"


def test_inspect_of_what_was_written(at_home, home, capsys):
    for name, kind in [
        *(("model", "model"), ("model-4bit", "4-bit model"), ("run", "adapter")),
        *(("orbax-run", "Orbax adapter"), ("orbax-model", "Orbax checkpoint")),
    ]:
        assert main(["inspect", name]) == 0
        assert capsys.readouterr().out.startswith(f"{name}: {kind}\n")
        assert main(["inspect", name, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["kind"] == kind
        assert found["nbytes"] > 0
        assert len(found["weights"]) > 3


@pytest.mark.filterwarnings("default::qlora_jax.errors.Note")
def test_a_note_on_the_source_is_said_once(home, tmp_path, capsys):
    odd = tmp_path / "odd"
    shutil.copytree(home / "model", odd)
    config = json.loads((odd / "config.json").read_text())
    (odd / "config.json").write_text(json.dumps({**config, "favourite_colour": "blue"}))
    for argv in (
        ["quantize", str(odd), str(tmp_path / "4bit")],
        ["merge", str(home / "run"), str(tmp_path / "merged"), "--model", str(odd)],
        ["export", str(odd), str(tmp_path / "dense"), "--format", "hf"],
    ):
        assert main(argv) == 0
        error = capsys.readouterr().err
        assert error.count("favourite_colour") == 1
        assert error.startswith("note ")


def test_quantize_with_an_adapter_that_begins_closer(at_home):
    """The folder, the adapter in it, what is said of both, and that a run goes on from there."""
    out, shown = at_home(
        "quantize model {out} --report --init pissa_niter_8 --iterations 2 --seed 3 --lora-r 8 "
        "--lora-alpha 12 --use-rslora --target-modules q_proj,up_proj "
        "--rank-pattern layers.1.mlp.up_proj=4 --alpha-pattern q_proj=6"
    )
    assert "4 bits alone" in shown
    said = json.loads((out / "quantization.json").read_text())
    together, alone = said["total"]["relative_error"], said["alone"]["total"]["relative_error"]
    assert together < alone
    assert (
        f"closer     {100 * together:.2f}% from the model, 4 bits alone {100 * alone:.2f}%" in shown
    )
    assert f"adapter    {out}/adapter (pissa_niter_8): train with model={out} and adapter=" in shown
    adapter = describe(out / "adapter")
    assert adapter.facts["r"] == 8
    assert adapter.facts["lora_alpha"] == 12
    assert adapter.facts["use_rslora"] is True
    assert adapter.facts["rank_pattern"] == {"layers.1.mlp.up_proj": 4}
    assert adapter.facts["alpha_pattern"] == {"q_proj": 6}
    assert set(adapter.targets) == {"self_attn.q_proj", "mlp.up_proj"}
    for made in (adapter.made, describe(out).made):
        init = made["init"]
        assert (init["name"], init["iterations"], init["seed"]) == ("pissa_niter_8", 2, 3)
        assert (init["source"], init["relative_error"]) == ("model", together)
