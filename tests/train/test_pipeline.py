"""Layers one by one, from memory and from files: the numbers of the one program, bit for bit."""

import dataclasses
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.checkpoints.peft import load_adapter
from qlora_jax.evaluation.perplexity import perplexity
from qlora_jax.models.decoder import Decoder
from qlora_jax.models.fingerprint import fingerprint
from qlora_jax.models.layerwise import LayerwiseDecoder, layerwise
from qlora_jax.optim.paged_adamw import paged_adamw
from qlora_jax.placement import to_device
from qlora_jax.quantization.policy import QuantizationConfig
from qlora_jax.train import pipeline, step
from qlora_jax.train.step import accumulate, finish
from qlora_jax.workflows.convert import quantize_checkpoint
from qlora_jax.workflows.from_disk import open_from_disk
from qlora_jax.workflows.open import load_model, open_source
from tests.golden_data import GoldenFile, golden_folder
from tests.models.test_streaming import FAMILIES, adapter, assert_equal, batch
from tests.tiers import tiered
from tests.tiny_model import FEW_TARGETS
from tests.tolerances import FINAL_ADAPTER_ATOL, TRAINING_LOSS_RTOL


def both(path, dtype: str = "float32", quantization=None) -> tuple[Decoder, LayerwiseDecoder]:
    """The model in `path`, in memory and with its layers on disk."""
    with open_source(path) as source:
        resident = load_model(source, quantization=quantization, dtype=dtype)
        return resident, open_from_disk(source, quantization, dtype)


def in_4bit(name: str, folder, **how):
    """A golden folder as `qlora-jax quantize` writes it."""
    quantize_checkpoint(golden_folder(name), folder, QuantizationConfig(**how))
    return folder


@pytest.mark.slow
@pytest.mark.fully_compiled
@pytest.mark.parametrize("remat", ["full", "offload"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_every_family(family, remat):
    resident, disk = both(golden_folder("models") / family)
    spec, params = adapter(resident)
    expected = step.gradients(params, resident, batch(resident), spec=spec, remat="full")
    assert float(jnp.abs(expected.grads["mlp.down_proj"]["A"]).max()) > 0
    for model in (disk, layerwise(resident)):
        found = pipeline.gradients(params, model, batch(resident), spec=spec, remat=remat)
        assert_equal(expected, found)


SETTINGS = {
    "4-bit": {},
    "dropout": {"dropout": 0.3},
    "DoRA": {"use_dora": True},
    "embeddings and head in full": {"modules_to_save": ("embed_tokens", "lm_head")},
    "the head in full": {"modules_to_save": ("lm_head",)},
    "everything": {
        "dropout": 0.3,
        "use_dora": True,
        "modules_to_save": ("embed_tokens", "lm_head"),
    },
}


@pytest.mark.fully_compiled
@pytest.mark.parametrize(
    ("setting", "family"),
    tiered(product(SETTINGS, ["llama", "llama_tied", "gemma3"]), [("everything", "llama_tied")]),
)
def test_gradients_of_every_kind_of_adapter(setting, family, tmp_path):
    settings = SETTINGS[setting] | {"targets": FEW_TARGETS}
    resident, disk = both(in_4bit(f"models/{family}", tmp_path / "4-bit"))
    spec, params = adapter(resident, **settings)
    key = jax.random.key(7) if "dropout" in settings else None
    how = {"spec": spec, "dropout_key": key, "loss_scale": 8.0}
    expected = step.gradients(params, resident, batch(resident), remat="full", **how)
    found = pipeline.gradients(params, disk, batch(resident), remat="offload", **how)
    assert_equal(expected, found)
    assert_equal(adapter(disk, **settings)[1], params)
    assert fingerprint(layerwise(resident)) == fingerprint(resident)


STORED = {
    "fp4": {"kind": "fp4", "block_size": 32},
    "single quantization": {"double_quant": False},
    "blocks that rows do not end": {"block_size": 4096},
    "a head in 4 bits": {"quantize_lm_head": True},
}


@pytest.mark.slow
@pytest.mark.fully_compiled
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("stored", STORED)
def test_every_way_to_be_stored(stored, dtype, tmp_path):
    resident, disk = both(in_4bit("models/llama", tmp_path / "4-bit", **STORED[stored]), dtype)
    spec, params = adapter(resident, targets=FEW_TARGETS)
    expected = step.gradients(params, resident, batch(resident), spec=spec, remat="full")
    assert_equal(expected, pipeline.gradients(params, disk, batch(resident), spec=spec))
    assert fingerprint(disk) == fingerprint(resident)


@pytest.mark.slow
@pytest.mark.fully_compiled
def test_a_batch_without_positions_and_segments():
    resident, disk = both(golden_folder("models/qwen3"))
    spec, params = adapter(resident)
    bare = {name: batch(resident)[name] for name in ("input_ids", "labels")}
    expected = step.gradients(params, resident, bare, spec=spec, remat="full")
    assert_equal(expected, pipeline.gradients(params, disk, bare, spec=spec))


def trained(model: Decoder | LayerwiseDecoder, gradients, golden: GoldenFile):
    """(losses, gradient norms, adapter) of the twelve golden steps."""
    lora = load_adapter(golden_folder("training") / "initial_adapter", model)
    optimizer = paged_adamw(2e-3, weight_decay=0.01)
    params, state = lora.params, optimizer.init(lora.params)
    losses, norms = [], []
    steps = zip(golden.input("input_ids"), golden.input("labels"), strict=True)
    for step_ids, step_labels in steps:
        total = None
        for ids, labels in zip(step_ids, step_labels, strict=True):
            micro = {"input_ids": jnp.int32(ids), "labels": jnp.int32(labels)}
            sums = gradients(params, model, micro, spec=lora.spec, remat="full")
            losses.append(float(sums.loss / sums.count))
            total = accumulate(total, sums)
        grads, metrics = finish(total, max_grad_norm=0.3)
        norms.append(float(metrics.grad_norm))
        params, state = optimizer.apply(params, grads, state)
    return np.reshape(losses, (len(norms), -1)), norms, params


@pytest.mark.slow
@pytest.mark.fully_compiled
def test_golden_training(tmp_path):
    resident, disk = both(in_4bit("training/base", tmp_path / "4-bit"))
    path = golden_folder("training") / "trajectory.npz"
    with GoldenFile(path, inputs={"input_ids", "labels"}) as golden:
        expected = trained(resident, step.gradients, golden)
        losses, norms, params = trained(disk, pipeline.gradients, golden)
        golden.compare("micro_batch_loss", losses, rtol=TRAINING_LOSS_RTOL)
        golden.compare("grad_norm", norms, rtol=TRAINING_LOSS_RTOL)
    np.testing.assert_array_equal(losses, expected[0])
    np.testing.assert_array_equal(norms, expected[1])
    assert_equal(params, expected[2])
    final = load_adapter(golden_folder("training") / "final_adapter", resident)
    for name, pair in final.params.items():
        for half in ("A", "B"):
            np.testing.assert_allclose(params[name][half], pair[half], atol=FINAL_ADAPTER_ATOL)


@pytest.mark.fully_compiled
@pytest.mark.parametrize("family", tiered(FAMILIES, ["gemma3"]))
def test_perplexity(family):
    resident, disk = both(golden_folder("models") / family)
    windows = np.asarray(batch(resident, rows=5)["input_ids"])
    expected = perplexity(resident, windows)
    assert [perplexity(model, windows) for model in (disk, layerwise(resident))] == [expected] * 2


def test_a_second_step_compiles_nothing_and_depth_adds_no_program():
    programs = []
    model = layerwise(deeper(both(golden_folder("models/llama"))[0], 7))
    spec, params = adapter(model, targets=FEW_TARGETS)
    params, before = to_device(params), pipeline.programs()
    for rows in (batch(model), batch(model), batch(model)):
        sums = pipeline.gradients(params, model, rows, spec=spec)
        params = jax.tree.map(jnp.subtract, params, sums.grads)
        programs.append(pipeline.programs() - before)
    assert programs == [5] * 3


def deeper(model: Decoder, layers: int) -> Decoder:
    """The same layers over and over."""
    config = dataclasses.replace(model.config, num_hidden_layers=layers, windows=(None,) * layers)
    weights = {
        name: jnp.stack([weight[i % 2] for i in range(layers)]) if "layers" in name else weight
        for name, weight in model.weights().items()
    }
    return Decoder.from_weights(config, weights, model.dtype)
