"""Compiling for GPUs that are not there: what can be seen without the packages that do it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels.gpu import KNOWN
from qlora_jax.errors import InputError
from qlora_jax.memory import aot
from qlora_jax.memory.aot import HostSharding, Sizes


@pytest.mark.parametrize("name", KNOWN)
def test_a_gpu_is_described_for_xla(name):
    text, target = aot.description(KNOWN[name]), KNOWN[name]
    assert f"core_count: {target.sms}\n" in text
    assert f"shared_memory_per_block_optin: {target.shared_bytes}\n" in text
    assert "major: {} minor: {}".format(*target.capability) in text
    assert ("ACCELERATED" in text) == (target.capability >= (9, 0))


def test_without_its_packages_one_error_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr(aot, "PLUGIN", "no_such_plugin")
    monkeypatch.setattr(aot, "TOOLS", tmp_path)
    with pytest.raises(InputError, match="plugin and ptxas cannot be found") as caught:
        aot.load_plugin.__wrapped__()
    assert caught.value.code == "AOT-PLUGIN"
    assert "pip install 'qlora-jax[compile-gpu]'" in str(caught.value)


def test_ptxas_alone_can_be_missing(monkeypatch, tmp_path):
    monkeypatch.setattr(aot, "PLUGIN", "jax")
    monkeypatch.setattr(aot, "TOOLS", tmp_path)
    with pytest.raises(InputError, match="there: ptxas cannot be found"):
        aot.load_plugin.__wrapped__()


def mesh():
    return Mesh(np.array(jax.devices()[:1]), ("x",))


def test_a_sharding_in_host_memory_is_equal_to_its_like_alone():
    there, again = (HostSharding(mesh(), PartitionSpec()) for _ in range(2))
    here = NamedSharding(mesh(), PartitionSpec())
    assert there.memory_kind == "pinned_host"
    assert there == again
    assert hash(there) == hash(again)
    assert there != here
    assert here != there
    assert HostSharding(mesh(), PartitionSpec("x")) != there


def test_what_is_traced_says_that_it_is_in_host_memory():
    there = HostSharding(mesh(), PartitionSpec())
    spaces = []

    def look(x, y):
        spaces.extend(jax.typeof(array).memory_space for array in (x, y))
        return y

    host = jax.ShapeDtypeStruct((4,), jnp.float32, sharding=there)
    jax.jit(look).trace(host, jax.ShapeDtypeStruct((4,), jnp.float32))
    assert spaces == [jax.memory.Space.Host, jax.memory.Space.Device]


def test_sizes_are_what_xla_says():
    x = jax.ShapeDtypeStruct((1024,), jnp.float32)
    compiled = jax.jit(lambda x, y: (x + 1, y.sum()), donate_argnums=0).lower(x, x).compile()
    found = aot.sizes(compiled)
    assert found.argument == 8192
    assert found.alias == 4096
    assert found.device == 8192 + found.output - 4096 + found.temp
    assert found.host == 0


def test_a_peak_of_a_program_counts_what_is_donated_once():
    found = Sizes(10, 5, 3, 100, 1000, 200, 200, 7)
    assert found.device == 112
    assert found.host == 1007
