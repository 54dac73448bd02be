import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax import placement
from qlora_jax.errors import InputError

TREE = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": jnp.ones(4, jnp.bfloat16)}


def test_to_host_and_back_changes_the_place_and_no_bit():
    on_host = placement.to_host(TREE)
    back = placement.to_device(on_host)
    for leaf in jax.tree.leaves(on_host):
        assert placement.memory_kind(leaf) == "pinned_host"
    for leaf, original in zip(jax.tree.leaves(back), jax.tree.leaves(TREE), strict=True):
        assert placement.memory_kind(leaf) == "device"
        assert leaf.dtype == original.dtype
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(original))


def test_moved_arrays_are_committed_so_that_programs_are_compiled_once():
    double = jax.jit(lambda x: x * 2)
    first = placement.to_device(jnp.ones(3))
    double(double(first))
    assert double._cache_size() == 1


class DeviceWithout(str):
    """A device of a backend with device memory alone."""

    def addressable_memories(self):
        return [type("Memory", (), {"kind": "device"})()]


def test_a_backend_without_host_memory_is_named():
    device = DeviceWithout("thing:0")
    assert not placement.has_host_memory(device)
    array = type("Array", (), {})()
    array.sharding = type("Sharding", (), {"device_set": {device}})()
    device.id = 0
    with pytest.raises(InputError, match=r"device thing:0: has no memory of kind pinned_host"):
        placement.to_host(array)


class Reporting:
    """A device whose allocator keeps these figures."""

    def __init__(self, stats):
        self.memory_stats = lambda: stats


def test_memory_figures_are_the_allocators():
    device = Reporting({"bytes_limit": 100, "bytes_in_use": 30, "peak_bytes_in_use": 60})
    assert placement.total_device_bytes(device) == 100
    assert placement.free_device_bytes(device) == 70
    assert placement.peak_device_bytes(device) == 60


@pytest.mark.parametrize("stats", [None, {}])
def test_unknown_memory_is_none_and_not_a_number(stats):
    assert placement.total_device_bytes(Reporting(stats)) is None
    assert placement.free_device_bytes(Reporting(stats)) is None
    assert placement.peak_device_bytes(Reporting(stats)) is None
