"""Stop at a step and go on = never stopped, bit for bit; and what a resumed run refuses."""

import fcntl

import pytest

from qlora_jax.checkpoints.orbax_io import load_with_metadata
from qlora_jax.errors import ConfigMismatch, InputError, Locked, StorageError
from qlora_jax.workflows.signals import Stopped
from tests.tiers import slow, tiered
from tests.workflows.runs import assert_same_run, rows_of, stop_behind, trainer

# Packed, the rows make fewer batches an epoch than there are rows, unpacked 9; 1 or 3 batches a
# step, and steps that cross the end of an epoch. One stop is at that end itself.
PACKED = {"packing": True}
UNPACKED = {"packing": False}
CASES = [
    (PACKED, 1, 8, "within"),
    (PACKED, 1, 8, "edge"),
    (PACKED, 3, 5, "within"),
    (PACKED, 3, 5, "edge"),
    (UNPACKED, 1, 11, "within"),
    (UNPACKED, 1, 11, "edge"),
    (UNPACKED, 3, 5, "within"),
    (UNPACKED, 3, 5, "edge"),
]


@pytest.mark.parametrize(
    ("packing", "accumulation", "steps", "where"), tiered(CASES, [(PACKED, 3, 5, "edge")])
)
def test_stopped_and_resumed_is_never_stopped(home, tmp_path, packing, accumulation, steps, where):
    settings = {
        **packing,
        "gradient_accumulation_steps": accumulation,
        "max_steps": steps,
        "save_steps": steps,
        "lr_scheduler": "cosine",
        "warmup_ratio": 0.3,
        "lora_dropout": 0.3,
    }
    whole = trainer(home, tmp_path / "whole", **settings)
    edge = whole.batches.steps_per_epoch
    assert 1 < edge < steps, "the run must cross the end of an epoch"
    whole.fit()

    at = edge if where == "edge" else edge - 1
    first = trainer(home, tmp_path / "parts", **settings)
    stop_behind(first, at)
    with pytest.raises(Stopped, match="SIGTERM") as stopped:
        first.fit()
    assert stopped.value.exit_code == 143
    assert [path.name for path in (tmp_path / "parts").glob("checkpoint-*")] == [f"checkpoint-{at}"]
    trainer(home, tmp_path / "parts", **settings).fit(resume="auto")
    assert_same_run(tmp_path / "whole", tmp_path / "parts", steps)


@pytest.mark.slow
@pytest.mark.parametrize(
    "extra",
    [
        {"optim_memory": "host"},
        {"optim": "paged_adamw_8bit", "lora_r": 64},
        {"optim": "paged_adamw_8bit", "lora_r": 64, "optim_memory": "host"},
        {"dtype": "bfloat16", "batch_size": 2},
        {"val_size": 0.3, "eval_steps": 2},
        {"use_dora": True, "lora_dropout": 0.3},
        {"modules_to_save": ["lm_head", "embed_tokens"], "optim_memory": "host"},
    ],
    ids=lambda extra: next(iter(extra)),
)
def test_resume_is_exact_with(home, tmp_path, extra):
    settings = {"max_steps": 5, "save_steps": 5, **extra}
    trainer(home, tmp_path / "whole", **settings).fit()
    first = trainer(home, tmp_path / "parts", **settings)
    stop_behind(first, 3)
    with pytest.raises(Stopped):
        first.fit()
    trainer(home, tmp_path / "parts", **settings).fit(resume="auto")
    assert_same_run(tmp_path / "whole", tmp_path / "parts", 5)


@pytest.mark.fully_compiled
@pytest.mark.parametrize(
    ("first", "optim", "rank"),
    tiered(
        [
            ("host", "paged_adamw_32bit", 4),
            ("host", "paged_adamw_8bit", 64),
            ("device", "paged_adamw_8bit", 64),
        ],
        [("host", "paged_adamw_32bit", 4)],
    ),
)
def test_a_run_goes_on_with_its_state_in_the_other_memory(home, tmp_path, first, optim, rank):
    settings = {"max_steps": 5, "save_steps": 5, "optim": optim, "lora_r": rank}
    trainer(home, tmp_path / "whole", optim_memory=first, **settings).fit()
    stopped = trainer(home, tmp_path / "parts", optim_memory=first, **settings)
    stop_behind(stopped, 3)
    with pytest.raises(Stopped):
        stopped.fit()
    other = {"host": "device", "device": "host"}[first]
    trainer(home, tmp_path / "parts", optim_memory=other, **settings).fit(resume="auto")
    assert_same_run(tmp_path / "whole", tmp_path / "parts", 5, moved=True)


def test_dropout_drops(home, tmp_path):
    settings = {"max_steps": 3}
    trainer(home, tmp_path / "without", **settings).fit()
    trainer(home, tmp_path / "with", lora_dropout=0.3, **settings).fit()
    # B begins as zero, so the first loss is the same; what comes after is not.
    without, dropped = rows_of(tmp_path / "without"), rows_of(tmp_path / "with")
    assert without[0]["loss"] == dropped[0]["loss"]
    assert without[2]["loss"] != dropped[2]["loss"]


@pytest.fixture(scope="module")
def stopped(home, tmp_path_factory):
    """A run of 4 steps that was stopped behind the second."""
    out = tmp_path_factory.mktemp("stopped") / "run"
    run = trainer(home, out, max_steps=4)
    stop_behind(run, 2)
    with pytest.raises(Stopped):
        run.fit()
    return out


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"lora_alpha": 16}, "lora_alpha 8 -> 16"),
        ({"learning_rate": 5e-3}, "learning_rate 0.01 -> 0.005"),
        (
            {"target_modules": ["q_proj"]},
            r"target_modules \['q_proj', 'down_proj'\] -> \['q_proj'\]",
        ),
        ({"packing": False}, "packing True -> False"),
        ({"max_seq_length": 63}, "max_seq_length 64 -> 63"),
        ({"shuffle_seed": 1}, "shuffle_seed 42 -> 1"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps 1 -> 2"),
        *map(
            slow,
            [
                ({"lora_r": 8}, "lora_r 4 -> 8"),
                ({"use_dora": True}, "use_dora False -> True"),
                ({"modules_to_save": ["lm_head"]}, r"modules_to_save \[\] -> \['lm_head'\]"),
                ({"block_size": 32}, "block_size 64 -> 32"),
            ],
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_another_configuration_is_refused_with_both_values(home, stopped, changed, said):
    before = {path: path.read_bytes() for path in stopped.glob("*.yaml")}
    run = trainer(home, stopped, **{"max_steps": 4, **changed})
    with pytest.raises(ConfigMismatch, match=said):
        run.fit(resume="auto")
    assert {path: path.read_bytes() for path in stopped.glob("*.yaml")} == before


def test_other_rows_are_refused(home, stopped, tmp_path):
    (tmp_path / "train.jsonl").write_text((home / "train.jsonl").read_text().upper())
    other = tmp_path / "train.jsonl"
    other.write_text(other.read_text().replace("TEXT", "text"))  # the key
    run = trainer(home, stopped, max_steps=4, dataset=str(other))
    with pytest.raises(ConfigMismatch, match=r"dataset .* data '"):
        run.fit(resume="auto")


def test_more_steps_and_other_intervals_are_not_another_run(home, stopped):
    run = trainer(home, stopped, max_steps=5, save_steps=1, logging_steps=2)
    assert run.fit(resume=stopped / "checkpoint-2").summary["steps"] == 5


def test_a_damaged_checkpoint_is_refused(home, tmp_path):
    run = trainer(home, tmp_path / "run", max_steps=4)
    stop_behind(run, 1)
    with pytest.raises(Stopped):
        run.fit()
    manifest = tmp_path / "run" / "checkpoint-1" / "state" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"step":1', '"step":2'))
    with pytest.raises(StorageError, match=r"manifest\.json: is damaged"):
        trainer(home, tmp_path / "run", max_steps=4).fit(resume="auto")


def test_a_used_folder_is_refused_and_left_as_it_is(home, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    run = trainer(home, tmp_path / "new", max_steps=1)
    run.config = run.config.replace(output_dir=tmp_path / "run")
    with pytest.raises(InputError, match="not empty"):
        run.fit()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["notes.txt"]


def test_resume_without_a_run_makes_no_folder(home, tmp_path):
    run = trainer(home, tmp_path / "run", max_steps=1)
    with pytest.raises(InputError, match="missing"):
        run.fit(resume="auto")
    assert not (tmp_path / "run").exists()


def test_two_runs_in_one_folder(home, tmp_path):
    run = trainer(home, tmp_path / "run", max_steps=1)
    (tmp_path / "run").mkdir()
    with open(tmp_path / "run" / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write("process 77 on here")
        file.flush()
        with pytest.raises(Locked, match="in use by process 77 on here"):
            run.fit()
    run.fit()


def test_only_the_newest_checkpoints_stay(home, tmp_path):
    trainer(home, tmp_path / "run", max_steps=5, save_steps=1, save_total_limit=2).fit()
    names = {path.name for path in (tmp_path / "run").iterdir() if "checkpoint" in path.name}
    assert names == {"checkpoint-4", "checkpoint-5"}
    state, metadata = load_with_metadata(tmp_path / "run" / "checkpoint-5" / "state")
    assert set(state) == {"params", "optimizer"}
    assert metadata["counters"]["step"] == 5
