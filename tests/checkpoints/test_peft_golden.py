"""PEFT's own adapters: logits with the adapter and after merging, and the way through our files."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from qlora_jax.adapters.merge import merged_weights
from qlora_jax.checkpoints.load import load_weights
from qlora_jax.checkpoints.merged import save_merged
from qlora_jax.checkpoints.peft import load_adapter, save_adapter
from qlora_jax.checkpoints.shards import Shards
from qlora_jax.models import Decoder, ModelConfig
from tests.golden_data import GoldenFile, golden_folder, read_arrays
from tests.tolerances import LOGITS_ATOL

ADAPTERS = ["attention_only", "dora", "modules_to_save", "patterns", "plain", "rslora", "second"]
INPUTS = {"input_ids", "attention_mask"}


def adapters() -> Path:
    return golden_folder("adapters")


def decoder(folder: Path) -> Decoder:
    with Shards(folder) as source:
        config = ModelConfig.from_dict(source.config, str(folder))
        weights = load_weights(source, config, quantization=None, dtype="float32")
    return Decoder.from_weights(config, weights, "float32")


def test_every_adapter_is_listed():
    found = {path.name for path in adapters().iterdir() if path.is_dir()} - {"base"}
    assert found == set(ADAPTERS)
    outputs = {f"{name}.{kind}logits" for name in found for kind in ("", "merged_")}
    assert read_arrays(adapters() / "io.npz").keys() == outputs | INPUTS | {"base_logits"}


@pytest.mark.parametrize("name", ["base", *ADAPTERS])
def test_golden_adapter(name, tmp_path):
    def of_this_test(key: str) -> bool:
        return key in INPUTS or key.startswith((f"{name}.", f"{name}_"))

    model = decoder(adapters() / "base")
    adapter = None if name == "base" else load_adapter(adapters() / name, model)
    with GoldenFile(adapters() / "io.npz", inputs=INPUTS, part=of_this_test) as golden:
        mask = np.int32(golden.input("attention_mask"))
        ids = np.int32(golden.input("input_ids"))

        def compare(key: str, model: Decoder, adapter=None):
            logits = model(ids, attention_mask=mask, adapter=adapter)
            golden.compare(key, logits, atol=LOGITS_ATOL, where=mask)

        if adapter is None:
            compare("base_logits", model)
            return
        compare(f"{name}.logits", model, adapter)
        config = json.loads((adapters() / "base" / "config.json").read_text())
        pairs = merged_weights(model, adapter)
        save_merged(model.config, pairs, config, tmp_path / "merged", dtype="float32")
        compare(f"{name}.merged_logits", decoder(tmp_path / "merged"))


@pytest.mark.parametrize("name", ADAPTERS)
def test_what_is_loaded_and_saved_is_what_peft_saved(name, tmp_path):
    model = decoder(adapters() / "base")
    adapter = load_adapter(adapters() / name, model)
    save_adapter(tmp_path / name, adapter)
    theirs, ours = (folder / name / "adapter_config.json" for folder in (adapters(), tmp_path))
    theirs, ours = json.loads(theirs.read_text()), json.loads(ours.read_text())
    for key in ours:
        same = sorted if key == "target_modules" else lambda value: value
        # All that we write is among PEFT's own fields, with PEFT's values.
        assert same(ours[key]) == same(theirs[key]), key
    with GoldenFile(adapters() / name / "adapter_model.safetensors") as golden:
        written = read_arrays(tmp_path / name / "adapter_model.safetensors")
        assert written.keys() == set(golden.keys())
        for key, array in written.items():
            assert array.dtype == np.float32
            golden.compare_exact(key, array)
    theirs, ours = (
        folder / name / "adapter_model.safetensors" for folder in (adapters(), tmp_path)
    )
    assert ours.read_bytes() == theirs.read_bytes()
    again = load_adapter(tmp_path / name, model)
    assert again.spec == adapter.spec
    jax.tree.map(np.testing.assert_array_equal, again, adapter)
