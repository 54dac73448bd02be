"""Twelve steps of QLoRA against bitsandbytes + peft + torch: losses, norms, the final adapter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.checkpoints.load import load_weights
from qlora_jax.checkpoints.peft import load_adapter
from qlora_jax.checkpoints.shards import Shards
from qlora_jax.models import Decoder, ModelConfig
from qlora_jax.models.remat import POLICIES
from qlora_jax.optim.paged_adamw import paged_adamw
from qlora_jax.placement import to_host
from qlora_jax.quantization.policy import QuantizationConfig
from qlora_jax.train.step import accumulate, finish, gradients
from tests.golden_data import GoldenFile, golden_folder
from tests.tiers import tiered
from tests.tolerances import FINAL_ADAPTER_ATOL, TRAINING_LOSS_RTOL

FOLDER = "training"


def quantized_base() -> Decoder:
    source = Shards(golden_folder(FOLDER) / "base")
    config = ModelConfig.from_dict(source.config)
    weights = load_weights(source, config, QuantizationConfig(), dtype="float32")
    return Decoder.from_weights(config, weights, "float32")


@pytest.mark.parametrize("memory", tiered(["device", "host"], ["device"]))
def test_golden_training(memory):
    folder, model = golden_folder(FOLDER), quantized_base()
    lora = load_adapter(folder / "initial_adapter", model)
    optimizer = paged_adamw(2e-3, weight_decay=0.01, memory=memory)
    params, state = lora.params, optimizer.init(lora.params)
    losses, norms = [], []
    with GoldenFile(folder / "trajectory.npz", inputs={"input_ids", "labels"}) as golden:
        steps = zip(golden.input("input_ids"), golden.input("labels"), strict=True)
        for step_ids, step_labels in steps:
            total = None
            for ids, labels in zip(step_ids, step_labels, strict=True):
                batch = {"input_ids": jnp.int32(ids), "labels": jnp.int32(labels)}
                sums = gradients(params, model, batch, spec=lora.spec)
                losses.append(float(sums.loss / sums.count))
                total = accumulate(total, sums)
            grads, metrics = finish(total, max_grad_norm=0.3)
            norms.append(float(metrics.grad_norm))
            params, state = optimizer.apply(params, grads, state)
        golden.compare(
            "micro_batch_loss", np.reshape(losses, (len(norms), -1)), rtol=TRAINING_LOSS_RTOL
        )
        golden.compare("grad_norm", norms, rtol=TRAINING_LOSS_RTOL)
    final = load_adapter(folder / "final_adapter", model)
    assert params.keys() == final.params.keys()
    for name, pair in final.params.items():
        for half in ("A", "B"):
            np.testing.assert_allclose(params[name][half], pair[half], atol=FINAL_ADAPTER_ATOL)


def test_one_batch_of_two_is_two_batches_of_one():
    folder, model = golden_folder(FOLDER), quantized_base()
    lora = load_adapter(folder / "final_adapter", model)
    with np.load(folder / "trajectory.npz") as arrays:
        ids, labels = jnp.int32(arrays["input_ids"][0, 0]), jnp.int32(arrays["labels"][0, 0])
    labels = labels.at[1, :12].set(-100)  # rows of unequal weight

    def step(*batches):
        total = None
        for rows in batches:
            batch = {"input_ids": ids[rows], "labels": labels[rows]}
            total = accumulate(total, gradients(lora.params, model, batch, spec=lora.spec))
        return finish(total, max_grad_norm=None)

    (whole, a), (halves, b) = step(slice(0, 2)), step(slice(0, 1), slice(1, 2))
    assert a.count == b.count
    np.testing.assert_allclose(a.loss, b.loss, rtol=1e-6)
    for name in whole:
        for half in ("A", "B"):
            x, y = whole[name][half], halves[name][half]
            np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-7)


@pytest.mark.fully_compiled
@pytest.mark.slow
@pytest.mark.parametrize("remat", POLICIES)
def test_streamed_layers_train_as_resident_ones_bit_for_bit(remat):
    folder, resident = golden_folder(FOLDER), quantized_base()
    streamed = jax.tree.map(lambda leaf: leaf, resident)
    streamed.layers = to_host(resident.layers)
    found = []
    with np.load(folder / "trajectory.npz") as arrays:
        batches = list(zip(arrays["input_ids"][:, 0], arrays["labels"][:, 0], strict=True))
    for model in (resident, streamed):
        lora = load_adapter(folder / "initial_adapter", model)
        optimizer = paged_adamw(2e-3, weight_decay=0.01)
        params, state = lora.params, optimizer.init(lora.params)
        losses = []
        for ids, labels in batches:
            batch = {"input_ids": jnp.int32(ids), "labels": jnp.int32(labels)}
            sums = gradients(params, model, batch, spec=lora.spec, remat=remat)
            losses.append(float(sums.loss))
            grads, _ = finish(sums, max_grad_norm=0.3)
            params, state = optimizer.apply(params, grads, state)
        found.append((losses, params))
    assert len(found[0][0]) == 12
    assert found[0][0] == found[1][0]
    jax.tree.map(np.testing.assert_array_equal, found[0][1], found[1][1])
