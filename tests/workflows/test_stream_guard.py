"""Gradients of streamed weights are those of resident ones, and a wrong walk is seen."""

import jax
import pytest

from qlora_jax.checkpoints.shards import Shards
from qlora_jax.models import layers
from qlora_jax.models.layerwise import LayerwiseDecoder
from qlora_jax.models.remat import POLICIES
from qlora_jax.placement import in_host
from qlora_jax.workflows import stream_guard
from qlora_jax.workflows.open import load_model
from tests.golden_data import golden_folder


@pytest.fixture(autouse=True)
def asked_anew():
    """What was compiled with a planted fault is forgotten, and what was found too."""
    stream_guard.stream_fault.cache_clear()
    jax.clear_caches()
    yield
    stream_guard.stream_fault.cache_clear()
    jax.clear_caches()


@pytest.mark.parametrize("remat", POLICIES)
def test_streams_right(remat):
    assert stream_guard.stream_fault(remat) is None
    assert stream_guard.streams_right(remat)


def plant(monkeypatch, wrong, of):
    """Fetches `wrong(i)` in place of entry i of what `of` picks."""
    right = layers.at
    monkeypatch.setattr(layers, "at", lambda tree, i: right(tree, wrong(i) if of(tree) else i))


def is_backward(tree):
    """Whether it is what the backward pass fetches: weights, and what was kept."""
    return isinstance(tree, tuple)


@pytest.mark.parametrize("remat", POLICIES)
def test_a_backward_that_walks_up_is_seen(monkeypatch, remat):
    plant(monkeypatch, lambda i: stream_guard.LAYERS - 2 - i, is_backward)
    assert "the gradient of" in stream_guard.stream_fault(remat)
    assert not stream_guard.streams_right(remat)


def test_a_neighbours_weights_are_seen(monkeypatch):
    plant(monkeypatch, lambda i: i - 1, lambda tree: in_host(tree) and not is_backward(tree))
    assert "layer 0 of 5: the gradient of A" in stream_guard.stream_fault()


def test_a_fault_is_told_and_the_layers_are_fetched_one_by_one(monkeypatch):
    """On a GPU alone, which is pretended here: a CPU's programs copy nothing."""
    with Shards(golden_folder("models") / "llama") as source:
        model = load_model(source, quantization=None, stream_weights="on")
    assert stream_guard.guarded(model, "none") == (model, ())
    monkeypatch.setattr(stream_guard.jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(stream_guard, "stream_fault", lambda remat: "layer 2 is wrong")
    found, notes = stream_guard.guarded(model, "none")
    assert isinstance(found, LayerwiseDecoder)
    assert notes == (
        "layers are fetched from Python: layer 2 is wrong; gradient_checkpointing=none becomes "
        "full",
    )
    _, notes = stream_guard.guarded(model, "offload")
    assert notes == ("layers are fetched from Python: layer 2 is wrong",)
