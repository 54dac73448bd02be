"""The training loop: it learns, leaves what it promises, and stops when it must."""

import json

import jax
import numpy as np
import optax
import pytest
from safetensors import safe_open

from qlora_jax.adapters.init import init_lora
from qlora_jax.checkpoints.peft import load_adapter
from qlora_jax.data.load import load_dataset
from qlora_jax.errors import DoesNotFit, InputError, NonFinite
from qlora_jax.evaluation.perplexity import batch_loss
from qlora_jax.models import Decoder
from qlora_jax.optim import paged
from qlora_jax.placement import HOST
from qlora_jax.train.config import TrainConfig
from qlora_jax.workflows.batches import BatchSource
from qlora_jax.workflows.header import header
from qlora_jax.workflows.signals import Stopped
from qlora_jax.workflows.trainer import BAD_STEPS, Trainer
from qlora_jax.workflows.training import open_run
from tests.tiny_model import FEW_TARGETS
from tests.workflows.runs import (
    SETTINGS,
    TEXTS,
    assert_same,
    assert_same_run,
    batches_of,
    quiet,
    rows_of,
    stop_behind,
    trainer,
    write_rows,
)

FILES = (
    *("config.yaml", "environment.json", "train.log", "metrics.jsonl", "summary.json", "loss.png"),
    *("adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "qlora_jax.json"),
    "chat_template.jinja",
)
POISON = 7  # a token whose embedding is NaN in `poisoned`: only batches with it are not finite


def settings(out, **changes) -> TrainConfig:
    """A configuration for a Trainer that is given everything as objects."""
    kept = {k: v for k, v in SETTINGS.items() if k in ("learning_rate", "logging_steps", "dtype")}
    return TrainConfig(
        **{**kept, "gradient_accumulation_steps": 1, "output_dir": str(out), **changes}
    )


def adapter(model: Decoder):
    return init_lora(model, r=4, alpha=8, targets=FEW_TARGETS, key=jax.random.key(0))


def test_the_loss_falls(home, tmp_path):
    run = trainer(home, tmp_path / "run", max_steps=25).fit()
    losses = [row["loss"] for row in run.metrics]
    assert len(losses) == 25
    assert np.mean(losses[-3:]) < 0.8 * np.mean(losses[:3])
    assert run.summary["first_loss"] == losses[0]
    assert run.summary["last_loss"] == losses[-1]
    assert run.summary["skipped_steps"] == 0


@pytest.mark.usefixtures("loss_is_plotted")
def test_the_folder_is_an_adapter_with_all_that_was_promised(home, tmp_path, opened):
    out = tmp_path / "run"
    run = trainer(home, out, max_steps=2, save_steps=2, val_size=0.3, eval_steps=1).fit()
    names = {path.name for path in out.iterdir()}
    assert set(FILES) <= names
    assert names - set(FILES) == {"best", "checkpoint-2", ".lock", "tokenizer_config.json"}
    adapter_files = {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json"}
    for inner in ("best", "checkpoint-2"):
        assert adapter_files <= {path.name for path in (out / inner).iterdir()}
    assert (out / "loss.png").read_bytes()[1:4] == b"PNG"
    assert_same(load_adapter(out, opened[0]).params, run.lora.params)
    with safe_open(out / "adapter_model.safetensors", "np") as file:
        name = "base_model.model.model.layers.1.mlp.down_proj.lora_{}.weight"
        assert file.get_slice(name.format("A")).get_shape() == [4, 128]
        assert file.get_slice(name.format("B")).get_shape() == [64, 4]
    found = json.loads((out / "adapter_config.json").read_text())
    assert (found["peft_type"], found["r"], found["lora_alpha"]) == ("LORA", 4, 8)


def test_the_same_run_twice_is_the_same(home, tmp_path):
    a, b = (trainer(home, tmp_path / name, max_steps=3).fit() for name in "ab")
    assert_same(a.lora.params, b.lora.params)
    assert rows_of(tmp_path / "a") == rows_of(tmp_path / "b")


def test_what_was_given_stays_as_it_was(home, tmp_path, opened):
    model, tokenizer = opened
    lora = adapter(model)
    before = jax.tree.map(np.array, (lora.params, model.weights()))
    data = load_dataset(home / "train.jsonl", tokenizer, max_seq_length=64)
    run = Trainer(model, lora, data, settings(tmp_path / "run", max_steps=2), say=quiet).fit()
    assert_same(before, (lora.params, model.weights()))
    assert any(np.any(pair["B"]) for pair in run.lora.params.values())


@pytest.mark.fully_compiled
def test_host_memory_gives_the_same_numbers(home, tmp_path):
    settings = {"max_steps": 3}
    device = trainer(home, tmp_path / "device", optim_memory="device", **settings).fit()
    host = trainer(home, tmp_path / "host", optim_memory="host", **settings).fit()
    assert_same(device.lora.params, host.lora.params)
    assert device.metrics[0]["host_bytes_moved"] == 0
    # There and back: two moments, and the count of the only page.
    assert host.metrics[0]["host_bytes_moved"] == 2 * (2 * host.lora.nbytes + 4)
    assert device.metrics[0]["host_seconds_moved"] == 0
    assert 0 < host.metrics[0]["host_seconds_moved"] < host.metrics[0]["step_time"]


@pytest.mark.slow
def test_8_bit_moments_are_rounded_moments(home, tmp_path):
    """Ranks are large enough here for leaves of 4096 numbers a layer."""
    runs = {
        name: trainer(home, tmp_path / name, max_steps=3, lora_r=64, optim=f"paged_adamw_{name}")
        for name in ("32bit", "8bit")
    }
    losses = {name: [row["loss"] for row in run.fit().metrics] for name, run in runs.items()}
    assert losses["8bit"][:2] == losses["32bit"][:2]  # a step uses moments before they are rounded
    assert losses["8bit"][2] != losses["32bit"][2]
    np.testing.assert_allclose(losses["8bit"], losses["32bit"], rtol=1e-2)


def test_a_full_host_ends_the_run_and_leaves_the_checkpoint(home, tmp_path, monkeypatch):
    settings = {"max_steps": 4, "save_steps": 2, "optim_memory": "host"}
    trainer(home, tmp_path / "whole", **settings).fit()
    run, put = trainer(home, tmp_path / "run", **settings), paged.put

    def full(tree, kind):
        if kind == HOST:
            raise jax.errors.JaxRuntimeError(
                "RESOURCE_EXHAUSTED: Out of memory allocating 77 bytes."
            )
        return put(tree, kind)

    def fill(step, total):
        if step == 3:
            monkeypatch.setattr(paged, "put", full)

    run.on_step = fill
    with pytest.raises(DoesNotFit, match=r"OPT-HOST.*no room in pinned_host.*checkpoints .* good"):
        run.fit()
    monkeypatch.undo()
    trainer(home, tmp_path / "run", **settings).fit(resume="auto")
    assert_same_run(tmp_path / "whole", tmp_path / "run", 4)


def test_epochs_end_where_the_rows_do(home, tmp_path):
    settings = {"num_epochs": 2, "gradient_accumulation_steps": 4}
    rows = write_rows(tmp_path / "rows.jsonl", [5 * text for text in TEXTS])  # a whole row each
    run = trainer(home, tmp_path / "run", dataset=rows, **settings).fit()
    # 9 rows by 4: steps of 4, 4 and 1 micro batches, twice.
    assert [row["epoch"] for row in run.metrics] == pytest.approx(
        [4 / 12, 8 / 12, 9 / 12, 1 + 4 / 12, 1 + 8 / 12, 1 + 9 / 12]
    )
    tokens = [row["num_tokens"] for row in run.metrics]
    assert tokens[-1] == 2 * tokens[2]


def test_float16_finishes(home, tmp_path):
    run = trainer(home, tmp_path / "run", dtype="float16", max_steps=8).fit()
    assert run.summary["skipped_steps"] < 8
    assert np.isfinite(run.summary["last_loss"])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(run.lora.params))
    assert any(np.any(pair["B"]) for pair in run.lora.params.values())


def test_it_goes_on_from_an_adapter(home, tmp_path):
    first = trainer(home, tmp_path / "first", max_steps=10).fit()
    paths = {"model": home / "model", "dataset": home / "train.jsonl"}
    changes = {"max_seq_length": 64, "max_steps": 1, "adapter": tmp_path / "first"}
    config = settings(tmp_path / "again", **paths, **changes)
    again = open_run(config, say=quiet)
    assert_same(again.lora.params, first.lora.params)
    assert again.fit().metrics[0]["loss"] < first.metrics[0]["loss"]


@pytest.fixture(scope="module")
def poisoned(opened):
    """The model with one token whose embedding is NaN; every other token is as before."""
    model, _ = opened
    weights = model.weights()
    name = "model.embed_tokens.weight"
    weights[name] = weights[name].at[POISON].set(np.nan)
    return Decoder.from_weights(model.config, weights, model.dtype)


@pytest.fixture(scope="module")
def batches(home, opened):
    """(batches without the token, one with it)."""
    good = batches_of(home, opened[1])
    assert not any((batch["input_ids"] == POISON).any() for batch in good)
    bad = {name: array.copy() for name, array in good[0].items()}
    bad["input_ids"][0, 5] = POISON
    return good, bad


def fit(model, data, out, **changes):
    own = settings(out, **{"max_steps": len(data), **changes})
    run = Trainer(model, adapter(model), data, own, say=quiet)
    return run.fit()


def test_a_step_that_is_not_finite_leaves_no_trace(tmp_path, poisoned, batches):
    good, bad = batches
    clean = fit(poisoned, [good[0], good[1]], tmp_path / "clean")
    met = fit(poisoned, [good[0], bad, good[1]], tmp_path / "met")
    assert_same(clean.lora.params, met.lora.params)
    assert met.summary["skipped_steps"] == 1
    assert met.metrics[1]["loss"] is None  # JSON has no NaN
    assert met.metrics[2]["loss"] == clean.metrics[1]["loss"]
    assert "step 2: loss or gradient is not finite" in (tmp_path / "met" / "train.log").read_text()


def test_a_bad_micro_batch_takes_its_whole_step(tmp_path, poisoned, batches):
    good, bad = batches
    accumulated = {"gradient_accumulation_steps": 2, "max_steps": 2}
    met = fit(poisoned, [good[0], bad, good[1], good[2]], tmp_path / "met", **accumulated)
    clean = fit(poisoned, good[1:3], tmp_path / "clean", **{**accumulated, "max_steps": 1})
    assert_same(clean.lora.params, met.lora.params)


def test_a_schedule_does_not_move_in_a_skipped_step(tmp_path, poisoned, batches):
    good, bad = batches
    met = fit(poisoned, [good[0], bad, good[1]], tmp_path / "run", lr_scheduler="linear")
    rates = [row["learning_rate"] for row in met.metrics]
    assert rates[1] == rates[2] < rates[0] or rates[0] == 0


def test_the_fifth_in_a_row_ends_the_run(tmp_path, poisoned, batches):
    good, bad = batches
    data = [good[0], *[bad] * (BAD_STEPS - 1), good[1], *[bad] * BAD_STEPS, good[2]]
    with pytest.raises(NonFinite, match=f"step {2 * BAD_STEPS + 1}") as error:
        fit(poisoned, data, tmp_path / "run", save_steps=1, save_total_limit=None)
    assert error.value.exit_code == 6
    steps = {int(path.name.split("-")[1]) for path in (tmp_path / "run").glob("checkpoint-*")}
    assert steps == set(range(1, 2 * BAD_STEPS + 1))
    kept = load_adapter(tmp_path / "run" / f"checkpoint-{2 * BAD_STEPS}", poisoned)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(kept.params))


def test_early_stopping_and_the_best_adapter(home, tmp_path, opened):
    model, tokenizer = opened
    data = load_dataset(home / "train.jsonl", tokenizer, max_seq_length=64)
    config = settings(tmp_path / "run", max_steps=20, eval_steps=2, early_stopping_patience=3)
    # An optimizer that moves nothing: the first evaluation stays the best one.
    run = Trainer(
        model,
        adapter(model),
        data,
        config,
        tokenizer,
        eval_data=data,
        optimizer=optax.set_to_zero(),
        say=quiet,
    ).fit()
    assert run.summary["steps"] == 2 * (1 + 3)
    assert run.summary["best_eval_loss"] == run.summary["eval_loss"]
    assert_same(load_adapter(tmp_path / "run" / "best", model).params, adapter(model).params)


def test_best_is_the_best_and_not_the_last(home, tmp_path):
    # So large a rate that the loss goes up again.
    run = trainer(
        home, tmp_path / "run", max_steps=5, eval_steps=1, val_size=0.3, learning_rate=1.0
    ).fit()
    losses = [row["eval_loss"] for row in run.metrics if "eval_loss" in row]
    assert min(losses) < losses[-1], "choose a larger learning rate"
    best = json.loads((tmp_path / "run" / "best" / "qlora_jax.json").read_text())
    assert best["step"] == 1 + int(np.argmin(losses))
    assert run.summary["best_eval_loss"] == min(losses)


@pytest.mark.fully_compiled
def test_a_transform_of_the_users_own(home, tmp_path, opened):
    model, tokenizer = opened
    data = load_dataset(home / "train.jsonl", tokenizer, max_seq_length=64)

    def run(name, **more):
        changes = {"max_steps": 3, **more.pop("changes", {})}
        config = settings(tmp_path / name, **changes)
        own = optax.sgd(1.0, momentum=0.9)
        lora = adapter(model)
        return Trainer(model, lora, data, config, optimizer=own, say=quiet, **more).fit()

    resident = run("resident")
    assert any(np.any(pair["B"]) for pair in resident.lora.params.values())
    with pytest.raises(InputError, match="elementwise"):
        run("refused", changes={"optim_memory": "host"})
    paged = run("paged", changes={"optim_memory": "host"}, elementwise=True)
    assert_same(resident.lora.params, paged.lora.params)


def test_an_iterable_of_batches(tmp_path, opened, batches):
    model, good = opened[0], batches[0]
    run = fit(model, good, tmp_path / "run", max_steps=len(good) + 2)
    assert run.metrics[-1]["epoch"] == pytest.approx(1 + 2 / len(good))
    with pytest.raises(InputError, match="only once"):
        fit(model, good, tmp_path / "other", max_steps=1) and Trainer(
            model, adapter(model), iter(good), settings(tmp_path / "iterator", max_steps=1)
        ).fit()


@pytest.mark.slow
def test_an_iterable_is_stopped_and_resumed_exactly(tmp_path, opened, batches):
    model, good = opened[0], batches[0]
    whole = fit(model, good, tmp_path / "whole", max_steps=len(good) + 2)

    def part():
        config = settings(
            tmp_path / "parts", max_steps=len(good) + 2, save_steps=1, save_total_limit=None
        )
        return Trainer(model, adapter(model), good, config, say=quiet)

    first = part()
    stop_behind(first, len(good) + 1)
    with pytest.raises(Stopped):
        first.fit()
    assert_same(part().fit(resume="auto").lora.params, whole.lora.params)


def test_what_cannot_begin_is_refused(tmp_path, opened, batches):
    model, good = opened[0], batches[0]

    def start(data, **changes):
        config = TrainConfig(**{"output_dir": str(tmp_path / "run"), **changes})
        return Trainer(model, adapter(model), data, config, say=quiet)

    with pytest.raises(InputError, match="output_dir: missing"):
        Trainer(model, adapter(model), good, TrainConfig(max_steps=1))
    with pytest.raises(InputError, match="max_steps: missing"):
        start(map(dict, good))
    with pytest.raises(InputError, match="eval_steps"):
        start(good, max_steps=1, eval_steps=5)
    with pytest.raises(InputError, match="no batch in a whole epoch"):
        start([], max_steps=1).fit()


@pytest.mark.fully_compiled
def test_padding_behind_a_row_changes_no_loss(home, tmp_path):
    run = trainer(home, tmp_path / "run", packing=False)
    batch = next(run.batches.groups(0, 0))[0]
    assert (batch["segment_ids"] == 0).any()
    bare = run.batches.inputs(batch)
    assert batch.keys() - bare.keys() == {"segment_ids"}
    losses = [batch_loss({}, run.model, inputs)[0] for inputs in (batch, bare)]
    assert losses[0] == losses[1]


@pytest.mark.fully_compiled
@pytest.mark.slow
def test_rows_of_one_sequence_need_no_segment_ids(home, tmp_path, monkeypatch):
    """Padding stands last and attention is causal: the same steps, bit for bit."""
    settings = {"max_steps": 3, "save_steps": 3, "packing": False}
    plain = trainer(home, tmp_path / "without", **settings)
    assert "segment_ids" not in plain.batches.inputs(next(plain.batches.groups(0, 0))[0])
    plain.fit()
    monkeypatch.setattr(BatchSource, "inputs", lambda self, batch: batch)
    trainer(home, tmp_path / "with", **settings).fit()
    assert_same_run(tmp_path / "without", tmp_path / "with", 3)


def test_the_header_says_how_attention_is_computed(home, tmp_path):
    lines = header(trainer(home, tmp_path / "run"))
    assert lines[-1].startswith("attention  chunked (not cudnn: the default device is a cpu")


@pytest.mark.parametrize("packing", [True, False])
def test_only_packed_rows_keep_their_segment_ids(home, tmp_path, packing):
    batches = trainer(home, tmp_path / "run", packing=packing).batches
    assert ("segment_ids" in batches.inputs(next(batches.groups(0, 0))[0])) == packing
