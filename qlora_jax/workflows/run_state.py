"""Everything that a run needs to go on exactly where it stopped, saved and restored as one.

    checkpoint-500/
        adapter_model.safetensors, adapter_config.json, ...    for PEFT and for people
        state/    adapter float32, optimizer, and the counters below, with a manifest of digests

A restored run refuses another configuration, base or data than its own: the figures would be those
of neither run.
"""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from qlora_jax.adapters.spec import LoraSpec
from qlora_jax.checkpoints.finite import EXPONENTS, check_finite
from qlora_jax.checkpoints.manifest import read_manifest, understood
from qlora_jax.checkpoints.orbax_io import load_with_metadata, save_orbax
from qlora_jax.errors import ConfigMismatch, listed
from qlora_jax.train.config import TrainConfig
from qlora_jax.train.loss_scale import LossScale

# What may differ between a run and its continuation: where it writes, how long it goes on, how
# often it speaks. Everything else changes the numbers.
MAY_CHANGE = {
    "early_stopping_patience",
    "eval_steps",
    "logging_steps",
    "max_steps",
    "num_epochs",
    "optim_memory",
    "output_dir",
    "report_to",
    "run_name",
    "save_best",
    "save_steps",
    "save_total_limit",
}


@dataclasses.dataclass
class Counters:
    """The part of a run's state that is not an array."""

    step: int = 0
    epoch: int = 0  # the epoch that the next batch belongs to
    batch: int = 0  # batches of that epoch that are used up
    tokens: int = 0
    trained_tokens: int = 0
    bad_steps: int = 0  # non-finite steps in a row, up to now
    skipped: int = 0  # non-finite steps in all
    best_eval_loss: float | None = None
    evaluations_since_best: int = 0
    loss_scale: LossScale = dataclasses.field(default_factory=LossScale)


@dataclasses.dataclass
class RunState:
    """Trainable parameters, the optimizer's state, and the counters."""

    params: Any
    optimizer: Any
    counters: Counters


@dataclasses.dataclass(frozen=True)
class Identity:
    """What a checkpoint belongs to; two runs with equal identities are the same run."""

    config: dict[str, Any]
    base: str  # models/fingerprint.py
    data: str  # the dataset's fingerprint; empty for batches that have none
    spec: str

    @staticmethod
    def of(config: TrainConfig, base: str, data: str, spec: LoraSpec) -> "Identity":
        settings = json.loads(json.dumps(config.model_dump(), default=str))
        kept = {key: value for key, value in settings.items() if key not in MAY_CHANGE}
        return Identity(kept, base, data, hashlib.sha256(repr(spec).encode()).hexdigest())

    def refuse_other(self, saved: "Identity", where: Path) -> None:
        """Raises ConfigMismatch naming everything that differs, with both values."""
        keys = sorted(self.config.keys() | saved.config.keys())
        pairs = [(key, saved.config.get(key), self.config.get(key)) for key in keys]
        pairs += [
            (name, getattr(saved, name)[:12], getattr(self, name)[:12])
            for name in ("base", "data", "spec")
        ]
        if different := [f"{key} {a!r} -> {b!r}" for key, a, b in pairs if a != b]:
            raise ConfigMismatch(
                "RUN-MISMATCH",
                where,
                f"this is another run: {listed(different)}",
                "what the run was started with",
                "the run's own config.yaml, or a new output_dir",
            )


def save(folder: Path, state: RunState, identity: Identity) -> None:
    """Writes `folder/state`."""
    tree = {"params": state.params, "optimizer": state.optimizer}
    metadata = {
        "counters": dataclasses.asdict(state.counters),
        "identity": dataclasses.asdict(identity),
    }
    save_orbax(folder / "state", tree, metadata=metadata)


def restore(folder: Path, like: RunState, identity: Identity) -> RunState:
    """The state that `save` wrote, placed as `like` is; verified before anything is returned.

    Raises:
      ConfigMismatch: it belongs to another run.
      StorageError, InputError: the files are damaged or missing, or a number is not finite.
    """
    home = folder / "state"
    with understood(home):
        # Before the arrays: another rank is another configuration, not a damaged tree.
        saved = read_manifest(home)["metadata"]
        identity.refuse_other(Identity(**saved["identity"]), folder)
        tree, metadata = load_with_metadata(
            home, like={"params": like.params, "optimizer": like.optimizer}
        )
        counters = Counters(**metadata["counters"])
        counters.loss_scale = LossScale(**metadata["counters"]["loss_scale"])
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if leaf.dtype.name in EXPONENTS:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            check_finite(np.asarray(leaf), str(home), name)
    return RunState(tree["params"], tree["optimizer"], counters)
