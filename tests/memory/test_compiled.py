"""A plan with XLA's own figures: what becomes of the estimated ones."""

import pytest

from pallas_kernels.gpu import KNOWN
from qlora_jax.errors import InputError
from qlora_jax.memory import aot
from qlora_jax.memory.aot import Sizes
from qlora_jax.memory.choices import Choices
from qlora_jax.memory.compiled import compiled_gradients, with_sizes
from qlora_jax.memory.estimate import OWNERS, Estimate
from qlora_jax.memory.program import Micro

ROW = 2 * 8 * 4 * 4  # bytes of a batch of two rows of 8 tokens: four arrays of int32


def micro():
    return Micro(None, None, None, "bfloat16", 2, 8, KNOWN["rtx4090"])


def estimate(**device):
    owners = dict.fromkeys(OWNERS, 0)
    host = owners | {"optimizer": 40, "activations": 5}
    return Estimate(Choices("on", "offload", "host"), owners | device, host)


def test_what_is_not_named_is_workspace():
    before = estimate(base=1000, activations=300, loss=200, workspace=77)
    after = with_sizes(before, micro(), Sizes(temp=900, host_temp=64))
    assert after.device == before.device | {"workspace": 400 + ROW}
    assert after.device_bytes == 1000 + 900 + ROW
    assert after.host == before.host | {"activations": 64}
    assert after.choices == before.choices


@pytest.mark.parametrize(
    ("temp", "activations", "loss"), [(450, 300, 150), (250, 250, 0), (0, 0, 0)]
)
def test_no_part_is_more_than_all(temp, activations, loss):
    after = with_sizes(estimate(activations=300, loss=200), micro(), Sizes(temp=temp))
    assert (after.device["activations"], after.device["loss"]) == (activations, loss)
    assert after.device_bytes == temp + ROW


def test_without_its_packages_nothing_is_compiled(monkeypatch, tmp_path):
    monkeypatch.setattr(aot, "TOOLS", tmp_path)
    aot.load_plugin.cache_clear()
    with pytest.raises(InputError, match="AOT-PLUGIN"):
        compiled_gradients(micro(), "on", "full")
