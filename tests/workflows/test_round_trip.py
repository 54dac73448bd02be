"""Each family: quantized, adapted, merged, written, opened again; it answers as base + adapter."""

import json

import jax
import numpy as np
import pytest

from qlora_jax.adapters.adapter import Adapter
from qlora_jax.adapters.init import init_lora
from qlora_jax.checkpoints.shards import Shards
from qlora_jax.cli.main import main
from qlora_jax.models import Decoder
from qlora_jax.quantization.tensor import QuantizedTensor
from qlora_jax.workflows.adapter_folder import load_adapter, save_adapter
from qlora_jax.workflows.answers import TOKENS
from qlora_jax.workflows.describe import describe
from qlora_jax.workflows.open import load_model, open_source
from tests.cli.converted import filled
from tests.golden_data import GOLDEN, golden_folder
from tests.tiers import tiered
from tests.tolerances import MERGED_LOGITS_RELATIVE

FAMILIES = sorted(path.name for path in (GOLDEN / "models").iterdir() if path.is_dir())
KINDS = {
    "lora": {},
    "dora": {"use_dora": True},
    "saved head": {"modules_to_save": ["lm_head"]},
    "saved embeddings": {"modules_to_save": ["embed_tokens"]},
}
CASES = [
    *((family, "lora") for family in FAMILIES),
    *(("llama_tied", kind) for kind in KINDS if kind != "lora"),
    ("phi3", "dora"),
]
IDS = np.random.default_rng(0).integers(0, 256, (1, TOKENS)).astype(np.int32)
# The same program as that of the merge's own check, so that it is compiled once.
LOGITS = jax.jit(lambda model, ids, adapter: model(ids, adapter=adapter))


def test_all_nine_folders_are_here():
    assert len(FAMILIES) == 9


def opened(path) -> Decoder:
    """The model of a folder or a file as it is stored, computed in float32."""
    with open_source(path) as source:
        return load_model(source, quantization=None, dtype="float32")


def logits(model: Decoder, adapter: Adapter | None = None) -> np.ndarray:
    return np.asarray(LOGITS(model, IDS, adapter))


def bound(expected: np.ndarray) -> float:
    """How far logits may be from `expected`."""
    return MERGED_LOGITS_RELATIVE * np.abs(expected).max()


def assert_close(found: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=bound(expected))


@pytest.mark.parametrize(("family", "kind"), tiered(CASES, [("phi3", "dora")]))
def test_merged_answers_as_base_and_adapter(family, kind, tmp_path, capsys):
    source = golden_folder(f"models/{family}")
    packed, adapter, merged = (tmp_path / name for name in ("packed", "adapter", "merged"))
    assert main(["quantize", str(source), str(packed)]) == 0
    base = opened(packed)
    fresh = init_lora(base, r=4, alpha=8, key=jax.random.key(0), **KINDS[kind])
    save_adapter(adapter, filled(fresh), base)
    lora = load_adapter(adapter, base)
    expected = logits(base, lora)
    if family == "llama":  # the adapter is no small thing beside the tolerance
        assert np.abs(expected - logits(base)).max() > 10 * bound(expected)

    arguments = ["--model", str(packed), "--tolerance", "0.1"]
    assert main(["merge", str(adapter), str(merged), *arguments]) == 0
    assert "(float32 as the base)" in capsys.readouterr().out
    assert_close(logits(opened(merged)), expected)

    before, after = (json.loads((path / "config.json").read_text()) for path in (source, merged))
    tied = before.get("tie_word_embeddings", False) and not lora.spec.modules_to_save
    assert after["tie_word_embeddings"] is tied
    with Shards(merged) as written:
        assert ("lm_head.weight" in written.names()) is not tied
    assert describe(merged).targets == describe(source).targets


@pytest.mark.parametrize("family", tiered(FAMILIES, ["phi3"]))
def test_4_bits_stay_as_they_are(family, tmp_path):
    """To 4 bits, to 4 bits again, and to a dense folder: the same codes, the same numbers."""
    packed, again, folder = (tmp_path / name for name in ("packed", "again", "dense"))
    source = golden_folder(f"models/{family}")
    assert main(["export", str(source), str(packed), "--format", "bnb-4bit"]) == 0
    assert main(["export", str(packed), str(again), "--format", "bnb-4bit"]) == 0
    assert main(["export", str(packed), str(folder), "--format", "hf"]) == 0
    with Shards(packed) as before, Shards(again) as after:
        assert set(before.names()) == set(after.names())
        for name in before.names():
            np.testing.assert_array_equal(after.read(name), before.read(name), err_msg=name)
    weights = opened(packed).weights()
    for name, dense in opened(folder).weights().items():
        held = weights[name]
        if isinstance(held, QuantizedTensor):
            held = held.dequantize("float32")
        np.testing.assert_array_equal(dense, held, err_msg=name)
