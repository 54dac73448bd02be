"""The memory of a run: refused before anything is allocated, and explained when it runs out."""

import resource
import subprocess
import sys
from itertools import product

import jax
import numpy as np
import pytest

from qlora_jax import process
from qlora_jax.errors import DoesNotFit
from qlora_jax.workflows import room, trainer, training
from tests.tiers import tiered
from tests.workflows.runs import assert_same_run, batches_of, config, rows_of
from tests.workflows.runs import trainer as opened

ENOUGH = 8_000_000_000


def given(monkeypatch, size: int) -> None:
    """Lets the machine have so many bytes left."""
    monkeypatch.setattr(process, "available", lambda: (size, "what a test leaves"))
    monkeypatch.setattr(process, "resident", lambda: 0)


def test_a_run_that_cannot_fit_is_refused_before_its_weights_are_read(home, tmp_path, monkeypatch):
    given(monkeypatch, 150_000_000)
    monkeypatch.setattr(training, "load_model", None)
    said = []
    with pytest.raises(DoesNotFit, match="RUN-MEMORY") as caught:
        training.open_run(config(home, tmp_path / "run"), say=said.append)
    assert caught.value.exit_code == 4
    assert "what a test leaves" in str(caught.value)
    assert "Try: optim=paged_adamw_8bit" in str(caught.value)
    assert any(line.startswith("in all") for line in said)
    assert any("it does not fit" in line for line in said)
    assert not (tmp_path / "run").exists()


def test_a_trainer_of_objects_is_refused_too(home, tmp_path, monkeypatch):
    given(monkeypatch, ENOUGH)
    run = opened(home, tmp_path / "run", max_steps=1)
    given(monkeypatch, 150_000_000)
    again = trainer.Trainer(
        run.model, run.lora, batches_of(home, run.tokenizer), run.config, say=lambda line: None
    )
    with pytest.raises(DoesNotFit, match="RUN-MEMORY"):
        again.fit()
    assert not (tmp_path / "run").exists()


# Opened without a limit first: what imports, and the arenas of threads, take is not the run's.
LIMITED = """
import resource, sys
from qlora_jax import process
from qlora_jax.errors import DoesNotFit
from qlora_jax.workflows.training import open_run
from qlora_jax.train.config import TrainConfig
config = TrainConfig.from_yaml(sys.argv[1])
open_run(config)
limit = process.address_space() + 100_000_000
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    open_run(config)
except DoesNotFit as error:
    print(error)
    sys.exit(error.exit_code)
"""


@pytest.mark.slow
def test_a_limit_of_the_shell_is_seen(home, tmp_path):
    """A limit above what the process has, and below what even a small run takes."""
    path = tmp_path / "run.yaml"
    path.write_text(config(home, tmp_path / "run").to_yaml())
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, path], capture_output=True, text=True, check=False
    )
    assert done.returncode == 4, done.stderr
    assert "ulimit -v" in done.stdout
    assert resource.getrlimit(resource.RLIMIT_AS)[0] != 0


def exhausted(*args, **options):
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 7 bytes.\nmore")


@pytest.mark.parametrize("kind", ["XLA's", "Python's"])
def test_memory_that_runs_out_is_answered_with_the_plan(home, tmp_path, kind):
    said = []
    run = opened(home, tmp_path / "run", max_steps=2)
    run.say = said.append
    run.gradients = exhausted
    if kind == "Python's":
        run.gradients = lambda *args, **options: np.empty(1 << 60, np.uint8)
    with pytest.raises(DoesNotFit, match="RUN-OOM") as caught:
        run.fit()
    text = str(caught.value)
    assert text.count(", or ") == room.ADVICE - 1
    assert "more" not in text
    assert any(line.startswith("in all") for line in said)


def test_other_errors_of_xla_are_bugs_and_stay_what_they_are(home, tmp_path):
    run = opened(home, tmp_path / "run", max_steps=2)

    def fails(*args, **options):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    run.gradients = fails
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        run.fit()


def watched(run) -> list[tuple[int, ...]]:
    """The shapes that the run's gradients are asked of, as it goes."""
    shapes, gradients = [], run.gradients

    def seen(params, model, batch, **options):
        shapes.append(batch["input_ids"].shape)
        return gradients(params, model, batch, **options)

    run.gradients = seen
    return shapes


def test_the_largest_batch_runs_before_the_first_step(home, tmp_path):
    run = opened(home, tmp_path / "run", max_steps=3, packing=False, save_steps=2)
    shapes = watched(run)
    run.fit()
    assert len(shapes) == 1 + 3
    assert shapes[0] == (1, run.row_length) == max(shapes)
    again = opened(home, tmp_path / "run", max_steps=3, packing=False, save_steps=2)
    shapes = watched(again)
    again.fit(resume=str(tmp_path / "run" / "checkpoint-2"))
    assert shapes[0] == (1, again.row_length)


def test_it_changes_nothing(home, tmp_path, monkeypatch):
    settings = {"max_steps": 3, "save_steps": 3, "lora_dropout": 0.3}
    opened(home, tmp_path / "one", **settings).fit()
    monkeypatch.setattr(trainer.Trainer, "make_room", lambda self, state, batch: None)
    other = opened(home, tmp_path / "two", **settings)
    other.largest = 1 << 30
    other.fit()
    assert_same_run(tmp_path / "one", tmp_path / "two", 3)


@pytest.mark.slow
def test_a_larger_batch_that_comes_later_runs_once_more(home, tmp_path):
    run = opened(home, tmp_path / "run", max_steps=3, packing=False)
    batches = [run.batches.data.batch([row], 1) for row in range(9)]
    batches.sort(key=lambda batch: batch["input_ids"].size)
    small, large = batches[0], batches[-1]
    assert small["input_ids"].size < large["input_ids"].size
    other = trainer.Trainer(
        run.model, run.lora, [small, large, small], run.config, say=lambda line: None
    )
    shapes = watched(other)
    other.fit()
    sizes = [small["input_ids"].shape] * 2 + [large["input_ids"].shape] * 2
    assert shapes == [*sizes, small["input_ids"].shape]
    assert len(rows_of(tmp_path / "run")) == 3


@pytest.mark.parametrize(
    ("stream_weights", "policy"),
    tiered(product(["on", "all"], ["full", "offload"]), [("on", "offload")]),
)
def test_a_run_with_weights_in_host_memory(home, tmp_path, stream_weights, policy):
    settings = {"max_steps": 3, "save_steps": 3}
    opened(home, tmp_path / "one", gradient_checkpointing="full", **settings).fit()
    run = opened(
        home,
        tmp_path / "two",
        stream_weights=stream_weights,
        gradient_checkpointing=policy,
        optim_memory="host",
        **settings,
    )
    assert room.streaming_of(run.model) == stream_weights
    run.fit()
    losses = [[row["loss"] for row in rows_of(tmp_path / name)] for name in ("one", "two")]
    if stream_weights == "on":
        assert losses[0] == losses[1]
    else:
        np.testing.assert_allclose(*losses, rtol=1e-5)
