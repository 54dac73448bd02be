"""A run's figures: rows of metrics.jsonl, the line that a person reads, and the plot of the loss.

    step  250/1875 | epoch 0.43 | loss 1.0832 | grad 0.21 | lr 2.0e-4 | 3,912 tok/s (61% trained)

A row is a dict with some of the `KEYS`, `step` always. A row of a training step has `loss`, a row
of an evaluation `eval_loss`. `host_bytes_moved` are the optimizer's pages between host and device,
both ways, and `host_seconds_moved` what a step spent on starting these copies and waiting for them.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from qlora_jax.checkpoints.atomic import storage_errors, write_file
from qlora_jax.errors import InputError

Row = Mapping[str, Any]
KEYS = (
    "step",
    "epoch",
    "loss",
    "grad_norm",
    "learning_rate",
    "num_tokens",
    "num_trained_tokens",
    "tokens_per_second",
    "step_time",
    "peak_memory_bytes",
    "host_bytes_moved",
    "host_seconds_moved",
    "mean_token_accuracy",
    "eval_loss",
    "eval_perplexity",
)
TASK = re.compile(r"eval_\w+_acc")


class MetricsFile:
    """Appends rows to metrics.jsonl; each is in the file, whole, when `append` returns.

    Args:
      path: the file; made when the first row comes.
      resume_step: the step that the run goes on from: rows of later steps, which will be made
        again, and a last line that a killed process left unfinished are taken out.
    """

    def __init__(self, path: str | Path, resume_step: int | None = None):
        self.path = Path(path)
        if resume_step is not None and self.path.exists():
            kept = [row for row in read_metrics(self.path) if row["step"] <= resume_step]
            write_file(self.path, b"".join(map(as_line, kept)))

    def append(self, row: Row) -> None:
        """Adds one row; NaN and infinite numbers are written as null, for JSON has none.

        Raises:
          StorageError: the disk is full or fails.
          ValueError: a key that is not one of `KEYS` or `eval_TASK_acc`, or no `step`.
        """
        unknown = [key for key in row if key not in KEYS and not TASK.fullmatch(key)]
        if unknown or "step" not in row:
            raise ValueError(f"metrics row with unknown keys {unknown} or without step: {row}")
        # One write, so that a killed process leaves at most its last line unfinished.
        with storage_errors(self.path), open(self.path, "ab", buffering=0) as file:
            file.write(as_line(row))


def as_line(row: Row) -> bytes:
    """One line of metrics.jsonl."""
    finite = {key: value if is_finite(value) else None for key, value in row.items()}
    return json.dumps(finite, allow_nan=False).encode() + b"\n"


def is_finite(value: Any) -> bool:
    """Whether JSON can hold a value."""
    return not isinstance(value, float) or math.isfinite(value)


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; an unfinished last line is left out.

    Raises:
      InputError: METRICS-ROW, a finished line is not a row, with file and line.
    """
    rows = []
    lines = Path(path).read_bytes().split(b"\n")
    for number, line in enumerate(lines[:-1], 1):
        try:
            row = json.loads(line)
            rows.append({**row, "step": int(row["step"])})
        except (ValueError, TypeError, KeyError):
            raise InputError("METRICS-ROW", f"{path}:{number}", "is not a metrics row") from None
    return rows


def terminal_row(
    row: Row,
    *,
    total_steps: int,
    trained_share: float | None = None,
    memory_limit_bytes: int | None = None,
    seconds_left: float | None = None,
    compiles: int | None = None,
) -> str:
    """The line that is printed for a row; what is not known is left out.

    Args:
      row: as in metrics.jsonl.
      total_steps: of the run.
      trained_share: of the tokens, how many are trained, 0 to 1; from the row's counts when None.
      memory_limit_bytes: what the device has; None where that is unknown.
      seconds_left: until the end of the run.
      compiles: how often the step was compiled so far.
    """
    parts = [f"step {row['step']:>{len(str(total_steps))}}/{total_steps}"]
    if (epoch := row.get("epoch")) is not None:
        parts.append(f"epoch {epoch:.2f}")
    if (loss := row.get("loss")) is not None:
        parts.append(f"loss {loss:.4f}")
    if (norm := row.get("grad_norm")) is not None:
        parts.append(f"grad {norm:.2f}")
    if (rate := row.get("learning_rate")) is not None:
        parts.append(f"lr {short(rate)}")
    if (speed := row.get("tokens_per_second")) is not None:
        if trained_share is None and row.get("num_tokens"):
            trained_share = row.get("num_trained_tokens", 0) / row["num_tokens"]
        share = "" if trained_share is None else f" ({trained_share:.0%} trained)"
        parts.append(f"{speed:,.0f} tok/s{share}")
    if (loss := row.get("eval_loss")) is not None:
        perplexity = row.get("eval_perplexity", math.exp(min(loss, 700)))
        parts += [f"eval loss {loss:.4f}", f"perplexity {perplexity:,.2f}"]
    if (peak := row.get("peak_memory_bytes")) is not None:
        limit = "" if memory_limit_bytes is None else f"/{memory_limit_bytes / 1e9:.1f}"
        parts.append(f"{peak / 1e9:.1f}{limit} GB")
    if moved := row.get("host_bytes_moved"):
        parts.append(f"moved {moved / 1e9:.2f} GB in {row['host_seconds_moved'] * 1e3:.0f} ms")
    if seconds_left is not None:
        parts.append(f"eta {clock(seconds_left)}")
    if compiles is not None:
        parts.append(f"compiles {compiles}")
    return " | ".join(parts)


def short(number: float) -> str:
    """2.0e-4: two digits and an exponent without zeros."""
    digits, exponent = f"{number:.1e}".split("e")
    return f"{digits}e{int(exponent)}"


def clock(seconds: float) -> str:
    """Hours, minutes and seconds: 1:42:10."""
    minutes, seconds = divmod(max(0, round(seconds)), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


def smoothed(values: Iterable[float], weight: float) -> list[float]:
    """Exponential moving average, each point divided by the sum of its weights (no pull to 0)."""
    total, scale, found = 0.0, 0.0, []
    for value in values:
        total, scale = weight * total + (1 - weight) * value, weight * scale + 1 - weight
        found.append(total / scale)
    return found


def plot_loss(rows: Iterable[Row], path: str | Path, *, title: str = "loss") -> None:
    """Draws training loss, raw and smoothed, and evaluation loss over the steps, as a PNG.

    Steps without a finite loss leave a gap in the raw curve. Nothing finite draws empty axes.
    """
    # Only this function needs matplotlib, and no window: pyplot's global state is not touched.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    rows = list(rows)
    train = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    finite = [(step, loss) for step, loss in train if loss is not None and math.isfinite(loss)]
    evaluated = [
        (row["step"], row["eval_loss"]) for row in rows if row.get("eval_loss") is not None
    ]

    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if finite:
        gaps = [math.nan if loss is None else loss for _, loss in train]
        axes.plot([step for step, _ in train], gaps, color="#9ecae1", lw=1, label="train")
        steps, losses = zip(*finite, strict=True)
        weight = 1 - 1 / min(20, max(2, len(losses) / 20))  # little lag in a short run
        axes.plot(steps, smoothed(losses, weight), color="#08519c", lw=2, label="train, smoothed")
    if evaluated:
        steps, losses = zip(*evaluated, strict=True)
        style = {"color": "#d94801", "lw": 1.2, "marker": "o", "ms": 5}
        axes.plot(steps, losses, **style, label="evaluation")
        axes.annotate(
            f"{losses[-1]:.3f}",
            (steps[-1], losses[-1]),
            xytext=(0, 7),
            textcoords="offset points",
            ha="center",
            color=style["color"],
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
        )
    axes.set(xlabel="optimizer step", ylabel="loss (nats per trained token)", title=title)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if finite or evaluated:
        axes.legend(frameon=False)
    figure.savefig(path, format="png")
