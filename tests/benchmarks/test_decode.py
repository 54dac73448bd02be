"""The benchmark of decoding: overheads are of the same turn, a text goes on from turn to turn."""

import pytest

from benchmarks.decode import Run, against, summary
from qlora_jax.inference.weights import for_decoding
from tests.inference.tiny_model import tiny_model

NAMES = ("base", "adapter", "batch base", "batch shared", "batch different", "batch of loaded")


def test_overheads_are_of_the_same_turn():
    """A machine that is three times slower in one turn changes no overhead."""
    slow = [1.0, 3.0, 1.0]
    seconds = {name: [turn * (1 + 0.1 * i) for turn in slow] for i, name in enumerate(NAMES)}
    found = summary(seconds)
    assert found["adapter_overhead"] == pytest.approx(0.1)
    assert found["batch8_overhead"] == pytest.approx(1.4 / 1.3 - 1)
    assert found["unused_overhead"] == pytest.approx(1.5 / 1.4 - 1)
    assert found["tokens_per_second"] == 1


def test_the_peer_is_judged_by_its_fastest():
    seconds = {"base": [2.0], "batch base": [4.0], "a": [3.0], "b": [9.0], "c": [8.0], "d": [10.0]}
    found = against(seconds, {1: {"a": 0, "b": 0}, 8: {"c": 0, "d": 0}})
    assert found == {"times_as_fast": 1.5, "batch_times": 2}


def test_a_text_goes_on_and_begins_again_at_its_end():
    run = Run(for_decoding(tiny_model(), "dense"), None, None, 2, 6)
    assert int(run.state.cache.length[0]) == 16 + 2
    for expected in (18 + 4, 18 + 4):  # 2 are left after the first turn, and 4 are asked for
        assert run.seconds_of_a_token(4) > 0
        assert run.state.cache.length.tolist() == [expected] * 2
