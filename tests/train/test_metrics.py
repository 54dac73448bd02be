import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_jax.errors import InputError
from qlora_jax.train.metrics import MetricsFile, plot_loss, read_metrics, smoothed, terminal_row

ROW = {
    "step": 250,
    "epoch": 0.43,
    "loss": 1.0832,
    "grad_norm": 0.21,
    "learning_rate": 2e-4,
    "num_tokens": 1000,
    "num_trained_tokens": 610,
    "tokens_per_second": 3912.4,
    "step_time": 0.52,
    "peak_memory_bytes": 18_400_000_000,
    "host_bytes_moved": 0,
    "host_seconds_moved": 0.0,
    "mean_token_accuracy": 0.71,
}


def test_the_line_that_a_person_reads():
    line = terminal_row(
        ROW, total_steps=1875, memory_limit_bytes=24 * 10**9, seconds_left=6130, compiles=1
    )
    assert line == (
        "step  250/1875 | epoch 0.43 | loss 1.0832 | grad 0.21 | lr 2.0e-4 | "
        "3,912 tok/s (61% trained) | 18.4/24.0 GB | eta 1:42:10 | compiles 1"
    )


@pytest.mark.parametrize(
    ("row", "line"),
    [
        ({"step": 3}, "step 3/9"),
        ({"step": 3, "loss": math.nan}, "step 3/9 | loss nan"),
        ({"step": 3, "learning_rate": 0.0}, "step 3/9 | lr 0.0e0"),
        ({"step": 3, "peak_memory_bytes": 10**9}, "step 3/9 | 1.0 GB"),
        (
            {"step": 3, "host_bytes_moved": 3_310_000_000, "host_seconds_moved": 0.1302},
            "step 3/9 | moved 3.31 GB in 130 ms",
        ),
        ({"step": 3, "eval_loss": 1.0}, "step 3/9 | eval loss 1.0000 | perplexity 2.72"),
        (
            {"step": 3, "eval_loss": 9.0, "eval_perplexity": 8103.0},
            "step 3/9 | eval loss 9.0000 | perplexity 8,103.00",
        ),
    ],
)
def test_what_is_not_known_is_left_out(row, line):
    assert terminal_row(row, total_steps=9) == line


def test_rows_are_appended_and_read_back(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    rows = [ROW, {"step": 260, "eval_loss": 1.0, "eval_perplexity": 2.7, "eval_mmlu_acc": 0.4}]
    for row in rows:
        file.append(row)
    assert read_metrics(tmp_path / "metrics.jsonl") == rows


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_json_lacks_becomes_null(tmp_path, value):
    MetricsFile(tmp_path / "metrics.jsonl").append({"step": 1, "loss": value})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text) == {"step": 1, "loss": None}


@pytest.mark.parametrize("row", [{"step": 1, "los": 2.0}, {"loss": 1.0}, {"step": 1, "eval_x": 1}])
def test_a_misspelt_key_is_our_own_error(tmp_path, row):
    with pytest.raises(ValueError, match="unknown keys"):
        MetricsFile(tmp_path / "metrics.jsonl").append(row)
    assert not (tmp_path / "metrics.jsonl").exists()


@given(st.integers(0, 12), st.integers(0, 30))
def test_resuming_leaves_the_rows_of_an_uninterrupted_run(tmp_path_factory, resume_step, torn):
    path = tmp_path_factory.mktemp("run") / "metrics.jsonl"
    rows = [{"step": step, "loss": 1 / step} for step in range(1, 13)]
    first = MetricsFile(path)
    for row in rows:
        first.append(row)
    path.write_bytes(path.read_bytes() + b'{"step": 13, "loss": 0.07'[:torn])  # killed here
    second = MetricsFile(path, resume_step=resume_step)
    for row in rows[resume_step:]:
        second.append(row)
    assert read_metrics(path) == rows


@pytest.mark.parametrize("line", ["nonsense", "[1]", '{"loss": 1}', '{"step": null}', ""])
def test_a_damaged_row_is_named_by_its_line(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
    with pytest.raises(InputError, match=r"metrics.jsonl:2: is not a metrics row"):
        read_metrics(path)


@given(st.lists(st.floats(0, 100), min_size=1), st.floats(0, 0.99))
def test_smoothing_stays_within_the_values_and_starts_at_the_first(values, weight):
    found = smoothed(values, weight)
    assert found[0] == pytest.approx(values[0])
    assert all(min(values) - 1e-9 <= value <= max(values) + 1e-9 for value in found)


def drawn(tmp_path, rows):
    """The number of pixels of each curve's colour, by its name."""
    import matplotlib.image
    import numpy as np

    plot_loss(rows, tmp_path / "loss.png", title="a run")
    image = (matplotlib.image.imread(tmp_path / "loss.png")[..., :3] * 255).round()
    colours = {"train": (158, 202, 225), "smoothed": (8, 81, 156), "evaluation": (217, 72, 1)}
    return {name: int(np.all(image == rgb, -1).sum()) for name, rgb in colours.items()}


def test_the_plot_shows_what_there_is(tmp_path):
    train = [{"step": i, "loss": 2 + math.sin(i)} for i in range(1, 30)]
    evaluation = [{"step": i, "eval_loss": 2.5} for i in (10, 20)]
    found = drawn(tmp_path, train + evaluation)
    assert min(found.values()) > 100
    only_train = drawn(tmp_path, train)
    assert only_train["evaluation"] == 0
    assert only_train["smoothed"] > 100
    assert max(drawn(tmp_path, [{"step": 1, "loss": None}]).values()) == 0
    assert max(drawn(tmp_path, []).values()) == 0


def test_a_loss_that_was_not_finite_leaves_a_gap(tmp_path):
    rows = [{"step": i, "loss": 2 + math.sin(i)} for i in range(1, 30)]
    whole = drawn(tmp_path, rows)
    for i in range(5, 20):
        rows[i]["loss"] = None if i % 2 else math.nan
    assert 0 < drawn(tmp_path, rows)["train"] < whole["train"]
