"""Gradients of streamed weights are those of resident ones, and a wrong walk is seen."""

import jax
import pytest

from qlora_jax.models import layers
from qlora_jax.models.remat import POLICIES
from qlora_jax.placement import in_host
from qlora_jax.workflows import stream_guard


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
