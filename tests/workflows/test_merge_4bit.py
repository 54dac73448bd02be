"""Back into 4 bits: what stays, what is quantized again and how well, and what is written."""

import json

import jax
import numpy as np
import pytest

from qlora_jax.adapters.adapter import Adapter
from qlora_jax.adapters.merge import merged_weights
from qlora_jax.checkpoints.peft import load_adapter
from qlora_jax.checkpoints.shards import Shards
from qlora_jax.errors import InputError, StorageError
from qlora_jax.models.moments import TextInLayers
from qlora_jax.quantization.policy import QuantizationConfig
from qlora_jax.quantization.tensor import QuantizedTensor, quantize
from qlora_jax.weight_names import LAYERS
from qlora_jax.workflows.answers import answers
from qlora_jax.workflows.checked_merge import checked_merge, reopened
from qlora_jax.workflows.describe import describe
from qlora_jax.workflows.merge import merge
from qlora_jax.workflows.merge_4bit import Into4Bits, merged_4bit
from qlora_jax.workflows.open import load_model, open_source
from qlora_jax.workflows.texts import Text
from tests.golden_data import golden_folder, read_arrays
from tests.tiers import tiered
from tests.tolerances import LOGITS_ATOL, MOMENTS_RTOL
from tests.trained import opened, trained

RANDOM = np.random.default_rng(0)
TEXT = Text("random", RANDOM.integers(0, 256, (64, 32)).astype(np.int32))
ASKED = Text("asked", TEXT.ids[:4])
COMPENSATED = Into4Bits("compensated", TEXT)
WAYS = {"requantize": Into4Bits(), "compensated": COMPENSATED}
ALLOWED = {"tolerance": 1e3, "growth": 1e3, "dtype": "float32"}


@pytest.fixture(scope="module")
def base():
    return opened("llama")


@pytest.fixture(scope="module")
def lora(base):
    return trained(base)


def config_of(name: str) -> dict:
    return json.loads((golden_folder(f"models/{name}") / "config.json").read_text())


def leaves(tensor: QuantizedTensor) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tensor.unpack())]


def assert_same(found: QuantizedTensor, expected: QuantizedTensor) -> None:
    for own, other in zip(leaves(found), leaves(expected), strict=True):
        np.testing.assert_array_equal(own, other)


@pytest.mark.fully_compiled
def test_requantized_is_the_merged_weight_quantized_once(base, lora):
    dense = dict(merged_weights(base, lora, dtype="float32"))
    found = dict(merged_4bit(base, lora, Into4Bits()))
    assert found.keys() == dense.keys()
    for name, own in found.items():
        if isinstance(own, QuantizedTensor):
            assert_same(own, quantize(dense[name]))
            assert own.dtype == "float32"
        else:
            np.testing.assert_array_equal(own, dense[name])


@pytest.mark.parametrize("way", tiered(WAYS, ["compensated"]))
def test_what_no_adapter_touches_stays_bit_for_bit(way):
    base = opened("llama", head=True)
    lora = trained(base, targets=["layers.1.mlp.up_proj", "self_attn.v_proj"])
    before = jax.tree.map(np.array, base.weights())
    changed = set()
    for name, own in merged_4bit(base, lora, WAYS[way]):
        parts = name.removeprefix(LAYERS).split(".", 1)
        layered = name.startswith(LAYERS)
        held = base.weights()[LAYERS + parts[1]][int(parts[0])] if layered else base.weights()[name]
        if not isinstance(held, QuantizedTensor):
            np.testing.assert_array_equal(own, held)
        elif not all(map(np.array_equal, leaves(own), leaves(held))):
            changed.add(name)
    adapted = {f"{LAYERS}{i}.self_attn.v_proj.weight" for i in (0, 1)}
    assert changed == adapted | {f"{LAYERS}1.mlp.up_proj.weight"}
    same = jax.tree.map(np.array_equal, before, base.weights())
    assert all(jax.tree.leaves(same))


@pytest.mark.parametrize(
    ("family", "kind", "double_quant"),
    tiered(
        [
            ("llama", "nf4", True),
            ("llama", "fp4", False),
            ("gemma3", "nf4", True),
            ("phi3", "nf4", True),
        ],
        [("llama", "nf4", True)],
    ),
)
def test_compensated_outputs_are_nearer(family, kind, double_quant):
    """By the loss of each linear on its own inputs, and by the logits on another text."""
    base = opened(family, kind, double_quant)
    lora = trained(base)
    losses: dict[str, list[float]] = {}

    def on_merged(name, wide, packed, moments):
        plain = quantize(wide, kind=kind, double_quant=double_quant)
        losses[name] = [loss(wide, own, moments) for own in (packed, plain)]

    list(merged_4bit(base, lora, COMPENSATED, on_merged=on_merged))
    assert len(losses) == base.config.num_hidden_layers * len(lora.spec.targets)
    assert all(ours < plain / 1.2 for ours, plain in losses.values()), losses
    ids = np.random.default_rng(1).integers(0, 256, (4, 32)).astype(np.int32)
    expected = np.stack(answers(base, ids, lora).logits)
    off = {}
    for way, into in WAYS.items():
        found = np.stack(answers(merge(base, lora, into=into), ids, None).logits)
        off[way] = np.square(found - expected).mean()
    assert off["compensated"] < off["requantize"], off


def loss(w: np.ndarray, tensor: QuantizedTensor, moments: np.ndarray) -> float:
    """The sum over the inputs of |W x - Q x|^2, in float64."""
    left = np.float64(w) - np.asarray(tensor.dequantize("float32"), np.float64)
    return float(np.einsum("oi,ij,oj->", left, np.float64(moments), left))


def test_moments_are_those_of_the_linears_inputs(base, lora, monkeypatch):
    """Of the first norm and of the last layer's feed-forward: computed here, token by token."""
    monkeypatch.setattr("qlora_jax.models.moments.TOKENS", 700)  # parts of 21 rows, the last of 1
    text = TextInLayers(base, lora, TEXT.ids)
    held = base.weights()
    rows = np.asarray(held["model.embed_tokens.weight"], np.float64)[TEXT.ids.reshape(-1)]
    rows /= np.sqrt(np.mean(rows**2, axis=1, keepdims=True) + base.config.rms_norm_eps)
    rows *= np.asarray(held[f"{LAYERS}input_layernorm.weight"][0], np.float64)
    one = {name.removeprefix(LAYERS): own for name, own in held.items() if name.startswith(LAYERS)}
    found = text.moments(jax.tree.map(lambda leaf: leaf[0], one))
    np.testing.assert_allclose(found["self_attn.q_proj"], rows.T @ rows, rtol=MOMENTS_RTOL)
    assert found["self_attn.v_proj"] is found["self_attn.q_proj"]
    assert {name: len(own) for name, own in found.items()} == {
        name: width for name, (_, width) in base.module_shapes().items() if name in found
    }
    text.advance(jax.tree.map(lambda leaf: leaf[0], one))
    again = text.moments(jax.tree.map(lambda leaf: leaf[1], one))
    assert np.abs(again["self_attn.q_proj"] - found["self_attn.q_proj"]).max() > 1


@pytest.mark.parametrize("way", tiered(WAYS, ["requantize"]))
def test_what_is_written_opens_equal_and_says_where_it_is_from(way, base, lora, tmp_path):
    out, into = tmp_path / "out", WAYS[way]
    check = checked_merge(
        base, lora, out, config=config_of("llama"), into=into, text=ASKED, **ALLOWED
    )
    held, model = merge(base, lora, into=into).weights(), reopened(out)
    for name, own in model.weights().items():
        if isinstance(own, QuantizedTensor):
            assert_same(own, held[name])
        else:
            np.testing.assert_array_equal(own, held[name])
    found = describe(out)
    assert found.kind == "4-bit model"
    made = found.made["merged"]
    assert (made["bits"], made["method"], made["into"]) == (4, way, "dequantized")
    assert made["quantization"] == {"kind": "nf4", "block_size": 64, "double_quant": True}
    assert len(made["base"]) == len(made["adapter"]) == 64
    assert ("calibration" in made) == (way == "compensated")
    report = json.loads((out / "merge_report.json").read_text())
    assert report["largest"] == check.largest
    assert report["merged_perplexity"] == answers(model, ASKED.ids, None).perplexity
    assert list(report["layers"]) == ["0", "1"]
    assert len(report["weights"]["weights"]) == 14
    told = "\n".join(check.lines())
    assert "perplexity" in told
    assert "asked, 124 tokens" in told


def test_a_saved_module_stays_dense_and_unties_the_model(tmp_path):
    base, out = opened("llama_tied"), tmp_path / "out"
    lora = trained(base, modules_to_save=["lm_head"])
    checked_merge(base, lora, out, config=config_of("llama_tied"), into=COMPENSATED, **ALLOWED)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    with Shards(out) as source:
        head = source.read("lm_head.weight")
    np.testing.assert_array_equal(head, lora.params["lm_head"]["weight"])


def test_a_4_bit_head_that_became_dense_is_named_as_one(tmp_path):
    base, out = opened("llama", head=True), tmp_path / "out"
    lora = trained(base, modules_to_save=["lm_head"])
    config = {**config_of("llama"), "quantization_config": {"llm_int8_skip_modules": []}}
    checked_merge(base, lora, out, config=config, into=Into4Bits(), **ALLOWED)
    told = json.loads((out / "config.json").read_text())["quantization_config"]
    assert told["llm_int8_skip_modules"] is None
    reopened(out)


@pytest.mark.parametrize("way", tiered(WAYS, ["compensated"]))
def test_a_residual_beside_it_brings_it_nearer(way, base, lora, tmp_path):
    out = tmp_path / "out"
    how = {"config": config_of("llama"), "into": WAYS[way], "text": ASKED, **ALLOWED}
    check = checked_merge(base, lora, out, residual_rank=16, **how)
    assert check.residual.largest < check.largest
    assert (
        check.residual.nbytes
        == (tmp_path / "out-residual" / "adapter_model.safetensors").stat().st_size
    )
    merged = reopened(out)
    residual = load_adapter(check.residual.path, merged)
    found = answers(merged, ASKED.ids, residual).perplexity
    assert found == pytest.approx(check.residual.perplexity)
    whole = checked_merge(base, lora, tmp_path / "full", residual_rank=64, **how)
    assert whole.residual.largest < 50 * LOGITS_ATOL  # all that 4 bits lost
    assert "MB beside it" in "\n".join(whole.lines())
    (tmp_path / "full").rename(tmp_path / "other")
    with pytest.raises(InputError, match=r"OUT-EXISTS.*full-residual"):
        checked_merge(base, lora, tmp_path / "full", residual_rank=64, **how)
    assert not (tmp_path / "full").exists()


def test_a_perplexity_that_grows_too_much_is_an_error(base, lora, tmp_path):
    how = {"config": config_of("llama"), "into": Into4Bits(), "text": ASKED, "tolerance": 1e3}
    with pytest.raises(StorageError, match=r"MERGE-CHECK.*perplexity is .*% off.*compensated or a"):
        checked_merge(base, lora, tmp_path / "out", growth=1e-9, residual_rank=4, **how)
    assert [path.name for path in tmp_path.iterdir()] == ["out.failed"]
    report = json.loads((tmp_path / "out.failed" / "merge_report.json").read_text())
    assert report["passed"] is False


def test_what_could_not_be_compared_is_set_aside(base, lora, tmp_path, monkeypatch):
    def full(_):
        raise MemoryError("no room")

    monkeypatch.setattr("qlora_jax.workflows.checked_merge.reopened", full)
    how = {"config": config_of("llama"), "into": Into4Bits(), "text": ASKED}
    with pytest.raises(MemoryError):
        checked_merge(base, lora, tmp_path / "out", **how)
    assert [path.name for path in tmp_path.iterdir()] == ["out.failed"]


def test_a_tolerance_of_0_is_one(base, lora, tmp_path):
    how = {"config": config_of("llama"), "into": Into4Bits(), "text": ASKED, "tolerance": 0.0}
    with pytest.raises(StorageError, match=r"MERGE-CHECK.*at most 0"):
        checked_merge(base, lora, tmp_path / "out", **how)


@pytest.mark.parametrize(
    ("rank", "into", "words"),
    [
        (0, Into4Bits(), r"LORA-RANK\]: residual_rank: 0"),
        (5000, Into4Bits(), r"LORA-RANK\]: residual_rank: 5000"),
        (4, None, r"MERGE-METHOD\]: residual_rank: given for a dense result"),
    ],
)
def test_a_residual_that_cannot_be_is_refused_before_the_work(
    rank, into, words, base, lora, tmp_path
):
    with pytest.raises(InputError, match=words):
        checked_merge(
            base, lora, tmp_path / "out", config=config_of("llama"), into=into, residual_rank=rank
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dora", "modules_to_save", "patterns", "rslora"])
def test_every_kind_of_pefts_adapters(name):
    """The merged model is nearer to 4-bit base + adapter than the base alone is."""
    folder = golden_folder("adapters")
    with Shards(folder / "base") as source:
        packed = load_model(source, quantization=QuantizationConfig(), dtype="float32")
    lora = load_adapter(folder / name, packed)
    ids = read_arrays(folder / "io.npz")["input_ids"].astype(np.int32)
    expected = np.asarray(packed(ids, adapter=lora))
    off = np.asarray(merge(packed, lora, into=COMPENSATED)(ids)) - expected
    without = np.asarray(packed(ids)) - expected
    assert np.square(off).mean() < np.square(without).mean() / 4


def spoiled(lora: Adapter) -> Adapter:
    params = {name: dict(own) for name, own in lora.params.items()}
    one = params["self_attn.k_proj"]
    one["B"] = one["B"].at[1, 2, 0].set(np.nan)
    return Adapter(params, lora.spec)


SHORT = Text("short.txt", TEXT.ids[:2])
WRONG = {
    "a dense base": ("dense", Into4Bits(), r"MERGE-4BIT.*not 4-bit.*quantization nf4"),
    "an unknown method": ("base", Into4Bits("gptq"), r"MERGE-METHOD.*'gptq'.*compensated"),
    "no text": ("base", Into4Bits("compensated"), "MERGE-CALIBRATION.*without"),
    "a text too much": ("base", Into4Bits("requantize", TEXT), "MERGE-CALIBRATION.*with a"),
    "a short text": ("base", Into4Bits("compensated", SHORT), r"short.txt: 64 tokens.*least 128"),
    "blocks over rows": ("wide", COMPENSATED, r"MERGE-BLOCKS.*blocks of 128.*requantize"),
    "NaN": ("spoiled", COMPENSATED, r"LORA-FINITE.*layers\.1\.self_attn\.k_proj\.lora_B: nan"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_merged_is_refused_and_nothing_is_written(case, base, lora, tmp_path):
    which, into, message = WRONG[case]
    with open_source(golden_folder("models/llama")) as source:
        models = {
            "dense": lambda: load_model(source, quantization=None, dtype="float32"),
            "wide": lambda: load_model(
                source, quantization=QuantizationConfig(block_size=128), dtype="float32"
            ),
        }
        model = models.get(which, lambda: base)()
    adapter = spoiled(lora) if which == "spoiled" else lora
    with pytest.raises(InputError, match=message):
        checked_merge(model, adapter, tmp_path / "out", config=config_of("llama"), into=into)
    with pytest.raises(InputError, match=message):
        merge(model, adapter, into=into)
    assert not list(tmp_path.iterdir())


def test_the_original_base_and_4_bits_are_refused(base, lora, tmp_path):
    with (
        open_source(golden_folder("models/llama")) as source,
        pytest.raises(InputError, match=r"MERGE-BASE.*'original' and back into 4 bits"),
    ):
        merge(base, lora, base="original", source=source, into=Into4Bits())
