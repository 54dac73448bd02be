"""Compiling for GPUs that are not there: what can be seen without the packages that do it."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels.gpu import KNOWN
from qlora_jax.adapters.spec import make_spec
from qlora_jax.errors import InputError
from qlora_jax.memory import aot
from qlora_jax.memory.aot import HostSharding, Sizes
from qlora_jax.memory.compiled import Step, step_memory
from qlora_jax.models.config import ModelConfig
from qlora_jax.models.families import module_shapes
from tests.golden_data import golden_folder


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


def step(**changes):
    path = golden_folder("models/llama") / "config.json"
    config = ModelConfig.from_dict(json.loads(path.read_text()), str(path))
    spec = make_spec(module_shapes(config), config.num_hidden_layers, r=2, alpha=2)
    return Step(config, spec, None, rows=1, length=8, **changes)


def params_of(step):
    shapes = module_shapes(step.config)
    sides = sum(sum(shapes[name]) for name in step.spec.targets)
    return 4 * 2 * step.config.num_hidden_layers * sides


def test_a_step_is_its_gradients_and_what_is_beside_them():
    sizes = Sizes(argument=10**9, output=10**6, temp=10**8, host_argument=7)
    one = step_memory(sizes, step())
    assert (one.device, one.host) == (sizes.device, 7)
    several = step_memory(sizes, step(accumulation=4), resident_state=30, host_state=500)
    assert several.device == sizes.device + params_of(step()) + 30
    assert several.host == 507


def test_an_update_that_is_larger_than_the_gradients_is_the_peak():
    sizes = Sizes(argument=1000, output=10, temp=10)
    found = step_memory(sizes, step(), resident_state=30, pages=10**9)
    assert found.device == 1000 + params_of(step()) + 10**9 + 30
