import pytest

from qlora_jax.errors import InputError
from qlora_jax.optim import memory
from qlora_jax.optim.memory import choose_memory

GB = 10**9


@pytest.mark.parametrize(
    ("requested", "free", "reserved", "elementwise", "choice", "reason"),
    [
        ("host", 99 * GB, 0, True, ("host", 0), "asked for"),
        ("device", 0, 0, True, ("device", 0), "asked for"),
        ("auto", 10 * GB, 8 * GB, True, ("device", 0), "2.00 GB are free"),
        ("auto", 10 * GB, 9 * GB, True, ("host", 2), "2 of 10 pages on the device"),
        ("auto", 10 * GB, 20 * GB, True, ("host", 0), "0.00 GB are free"),
        ("auto", 0, 0, False, ("device", 0), "cannot be paged"),
        ("auto", None, 0, True, ("device", 0), "free memory is unknown"),
    ],
)
def test_the_choice_follows_the_numbers(requested, free, reserved, elementwise, choice, reason):
    found = choose_memory(
        requested,
        state_bytes=2 * GB,
        pages=10,
        free_bytes=free,
        reserved_bytes=reserved,
        elementwise=elementwise,
    )
    assert (found.memory, found.resident) == choice
    assert reason in found.reason


def test_auto_stays_on_the_device_where_there_is_no_host_memory(monkeypatch):
    monkeypatch.setattr(memory, "has_host_memory", lambda: False)
    found = choose_memory("auto", state_bytes=2 * GB, pages=10, free_bytes=1)
    assert found.memory == "device"
    assert "no pinned_host memory" in found.reason


def test_an_unknown_word_is_refused():
    with pytest.raises(InputError, match=r"optim_memory: unknown 'gpu' \(expected auto, host"):
        choose_memory("gpu", state_bytes=1, pages=1)
