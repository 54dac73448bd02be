"""A head that is 4-bit or in host memory: loss, gradient and perplexity as with it at hand."""

import functools

import jax
import numpy as np
import pytest

from qlora_jax.adapters.init import init_lora
from qlora_jax.evaluation import perplexity
from qlora_jax.models import Decoder
from qlora_jax.placement import to_host
from qlora_jax.quantization.tensor import QuantizedTensor, quantize
from qlora_jax.train import loss as losses
from qlora_jax.train.loss import loss_fn
from qlora_jax.weight_names import EMBEDDINGS, HEAD
from tests.inference.tiny_model import tiny_model
from tests.tiers import tiered
from tests.tolerances import MEAN_NLL_RTOL, VJP_ATOL, VJP_RTOL

IDS = np.random.default_rng(0).integers(0, 265, (3, 12)).astype(np.int32)
BATCH = {"input_ids": IDS, "labels": np.where(IDS % 5 == 0, -100, IDS)}


def with_head(model: Decoder, head) -> Decoder:
    return Decoder.from_weights(model.config, model.weights() | {HEAD: head}, model.dtype)


FORMS = ["dense", "nf4", "nf4, blocks of 128"]


@pytest.fixture(scope="module", params=tiered(FORMS, ["nf4"]))
def heads(request) -> tuple[Decoder, Decoder]:
    """A model, and the same with its head dense on the device."""
    model = tiny_model(hidden_size=64, tie_word_embeddings=False)
    if request.param == "dense":
        return model, model
    block_size = 128 if "128" in request.param else 64  # 128: flat, two rows a block
    head = quantize(model.weights()[HEAD], block_size=block_size)
    return with_head(model, head), with_head(model, head.dequantize())


@functools.cache
def step(spec):
    return jax.jit(jax.value_and_grad(functools.partial(loss_fn, spec=spec), has_aux=True))


def assert_alike(one, other):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=VJP_RTOL, atol=VJP_ATOL)


@pytest.mark.fully_compiled
@pytest.mark.slow
def test_loss_and_gradient(heads):
    model, exact = heads
    lora = init_lora(model, r=2, targets=["q_proj", "down_proj"], key=jax.random.key(0))
    run = step(lora.spec)
    found = run(lora.params, model, BATCH)
    assert_alike(found, run(lora.params, exact, BATCH))
    from_host = run(lora.params, with_head(model, to_host(model.weights()[HEAD])), BATCH)
    assert_alike(from_host, found)
    if isinstance(model.head(), QuantizedTensor):  # by blocks either way, and so to the bit
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(from_host), strict=True):
            np.testing.assert_array_equal(a, b)


def test_perplexity(heads):
    model, exact = heads
    expected = perplexity(exact, IDS).mean_nll
    for head in (model.weights()[HEAD], to_host(model.weights()[HEAD])):
        found = perplexity(with_head(model, head), IDS).mean_nll
        np.testing.assert_allclose(found, expected, rtol=MEAN_NLL_RTOL)


def test_a_head_tied_to_embeddings_in_host_memory(monkeypatch):
    """The embeddings are looked up elsewhere; here it is the head that must not be copied whole."""
    model = tiny_model(tie_word_embeddings=True)
    hidden = model.hidden(IDS)
    expected = loss_fn({}, model, BATCH)
    monkeypatch.setattr(Decoder, "hidden", lambda *args, **options: hidden)
    weights = model.weights() | {EMBEDDINGS: to_host(model.weights()[EMBEDDINGS])}
    assert_alike(
        loss_fn({}, Decoder.from_weights(model.config, weights, "float32"), BATCH), expected
    )


def test_a_dense_head_on_the_device_is_read_as_it_is():
    head = tiny_model().head()
    assert losses.as_loss_reads(head, head.dtype) is head
