"""A checkpoint's state whose manifest is whole but says something else: one line, no traceback."""

import dataclasses

import jax.numpy as jnp
import pytest

from qlora_jax.checkpoints.orbax_io import save_orbax
from qlora_jax.errors import StorageError
from qlora_jax.workflows.run_state import Counters, Identity, RunState, restore

IDENTITY = Identity({"lora_r": 4}, "base", "data", "spec")
WRITTEN = {
    "counters": dataclasses.asdict(Counters(step=3)),
    "identity": dataclasses.asdict(IDENTITY),
}
STATE = RunState({"q": {"A": jnp.ones(2)}}, {"mu": jnp.zeros(2)}, Counters())


def restored(folder, **metadata) -> RunState:
    tree = {"params": STATE.params, "optimizer": STATE.optimizer}
    save_orbax(folder / "state", tree, metadata={**WRITTEN, **metadata})
    return restore(folder, STATE, IDENTITY)


def test_what_was_saved_comes_back(tmp_path):
    assert restored(tmp_path).counters == Counters(step=3)


@pytest.mark.parametrize(
    "metadata",
    [
        {"identity": None},
        {"identity": WRITTEN["identity"] | {"seed": 1}},
        {"identity": WRITTEN["identity"] | {"config": 5}},
        {"counters": {"step": 3}},
        {"counters": WRITTEN["counters"] | {"stride": 1}},
    ],
)
def test_another_manifest_is_named(tmp_path, metadata):
    with pytest.raises(StorageError, match=r"ORB-MANIFEST.*state/manifest\.json"):
        restored(tmp_path, **metadata)
