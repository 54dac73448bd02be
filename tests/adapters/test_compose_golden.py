"""Compositions as PEFT's add_weighted_adapter makes them: delta W of two modules, and logits."""

import numpy as np
import pytest

from qlora_jax.adapters.adapter import Adapter
from qlora_jax.adapters.compose import compose
from qlora_jax.checkpoints.load import load_weights
from qlora_jax.checkpoints.peft import load_adapter
from qlora_jax.checkpoints.shards import Shards
from qlora_jax.models import Decoder, ModelConfig
from tests.golden_data import GoldenFile, golden_folder, read_arrays
from tests.tolerances import LOGITS_ATOL, PEFT_SVD_ATOL

WEIGHTS = {"plain": 0.7, "second": 0.4}
OPTIONS = {
    "cat": {},
    "linear": {},
    "svd": {"svd_rank": 8},
    "ties": {"density": 0.5},
    "magnitude_prune": {"density": 0.5},
}


@pytest.fixture(scope="module")
def base() -> Decoder:
    with Shards(golden_folder("adapters") / "base") as source:
        config = ModelConfig.from_dict(source.config)
        weights = load_weights(source, config, quantization=None, dtype="float32")
    return Decoder.from_weights(config, weights, "float32")


def delta(adapter: Adapter, path: str) -> np.ndarray:
    """scale B A of a module path, float32."""
    layer, name = path.removeprefix("model.layers.").split(".", 1)
    A, B = adapter.layer(name, int(layer))
    return adapter.spec.scales(name)[int(layer)] * np.asarray(B) @ np.asarray(A)


def test_every_composition_is_listed():
    found = {
        key.split(".")[0] for key in read_arrays(golden_folder("adapters") / "compositions.npz")
    }
    assert found == OPTIONS.keys()


@pytest.mark.parametrize("method", OPTIONS)
def test_golden_composition(method, base):
    folder = golden_folder("adapters")
    adapters = {name: load_adapter(folder / name, base) for name in WEIGHTS}
    composed = compose(adapters, WEIGHTS, method=method, **OPTIONS[method])
    atol = PEFT_SVD_ATOL if method == "svd" else LOGITS_ATOL
    inputs = read_arrays(folder / "io.npz")
    ids, mask = np.int32(inputs["input_ids"]), np.int32(inputs["attention_mask"])
    file = folder / "compositions.npz"
    with GoldenFile(file, part=lambda key: key.startswith(f"{method}.")) as golden:
        for key in golden.outputs():
            what, _, path = key.removeprefix(f"{method}.").partition(".")
            if what == "delta":
                golden.compare(key, delta(composed, path), atol=atol)
            else:
                logits = base(ids, attention_mask=mask, adapter=composed)
                golden.compare(key, logits, atol=atol, where=mask)
