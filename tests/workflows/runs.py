"""What tests of the trainer share: small runs, and whether two of them are the same."""

import json
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from qlora_jax.checkpoints.orbax_io import load_with_metadata
from qlora_jax.data.load import load_dataset
from qlora_jax.train.config import TrainConfig
from qlora_jax.workflows.trainer import Trainer
from qlora_jax.workflows.training import open_run
from tests.tiny_model import FEW_TARGETS

TEXTS = (
    "to be, or not to be, that is the question:",
    "whether 'tis nobler in the mind to suffer",
    "the slings and arrows of outrageous fortune,",
    "or to take arms",
    "against a sea of troubles",
    "and by opposing end them. to die, to sleep;",
    "no more; and by a sleep to say we end",
    "the heart-ache",
    "and the thousand natural shocks that flesh is heir to",
)
# No two runs agree on these.
CLOCK = ("tokens_per_second", "step_time", "peak_memory_bytes", "host_seconds_moved")
SETTINGS = {
    "dtype": "float32",
    "lora_r": 4,
    "lora_alpha": 8,
    "target_modules": FEW_TARGETS,
    "max_seq_length": 64,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "gradient_accumulation_steps": 1,
}


def quiet(line: str) -> None:
    """Takes a line of a run."""


def write_rows(path: Path, texts: Sequence[str] = TEXTS) -> Path:
    """The texts as JSON lines."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def config(home: Path, out: Path, **settings: Any) -> TrainConfig:
    """The configuration of a small run on the model and the rows in `home`."""
    paths = {"model": home / "model", "dataset": home / "train.jsonl", "output_dir": out}
    return TrainConfig(**{**paths, **SETTINGS, **settings})


def trainer(home: Path, out: Path, **settings: Any) -> Trainer:
    """A run with everything opened from its configuration, as the command does it."""
    return open_run(config(home, out, **settings), resume=out.exists(), say=quiet)


def stop_behind(run: Trainer, at: int) -> None:
    """Has the run meet a SIGTERM behind step `at`."""

    def on_step(step: int, total: int) -> None:
        if step == at:
            signal.raise_signal(signal.SIGTERM)

    run.on_step = on_step


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what a clock says."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in CLOCK} for row in rows]


def assert_same_run(folder: Path, other: Path, step: int, moved: bool = False) -> None:
    """Parameters, optimizer, counters and figures of two runs at `step`, all bit for bit.

    With `moved`, the bytes that the optimizer moved may differ.
    """
    (tree, data), (again, counters) = (
        load_with_metadata(path / f"checkpoint-{step}" / "state") for path in (folder, other)
    )
    assert_same(tree, again)
    assert data["counters"] == counters["counters"]
    rows, others = rows_of(folder), rows_of(other)
    if moved:
        rows, others = ([row | {"host_bytes_moved": 0} for row in kept] for kept in (rows, others))
    assert rows == others
    final = [path / "adapter_model.safetensors" for path in (folder, other)]
    assert final[0].read_bytes() == final[1].read_bytes()


def assert_same(tree: Any, other: Any) -> None:
    """Two trees, bit for bit."""
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def batches_of(home: Path, tokenizer: Any) -> list[dict[str, np.ndarray]]:
    """The rows as batches of one shape: what a caller's own iterable gives."""
    data = load_dataset(home / "train.jsonl", tokenizer, max_seq_length=64)
    return [data.batch([row], 1) for row in range(len(data))]
