"""What a run says while it goes: rows on the terminal and in metrics.jsonl, plot and summary."""

import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from qlora_jax.evaluation.perplexity import PerplexityResult
from qlora_jax.placement import peak_device_bytes, total_device_bytes
from qlora_jax.train import pipeline, step
from qlora_jax.train.config import TrainConfig
from qlora_jax.train.metrics import MetricsFile, plot_loss, read_metrics, terminal_row
from qlora_jax.train.step import StepMetrics
from qlora_jax.workflows.run_state import Counters

METRICS = "metrics.jsonl"


class Recorder:
    """Keeps a run's figures, and prints one row every `logging_steps`.

    Args:
      folder: where metrics.jsonl goes.
      config: of the run.
      total_steps: of the run.
      counters: where the run stands; rows of later steps, which will come again, are taken out.
      say: takes each printed line.
    """

    def __init__(
        self,
        folder: Path,
        config: TrainConfig,
        total_steps: int,
        counters: Counters,
        say: Callable[[str], None],
    ):
        self.folder, self.config, self.total_steps, self.say = folder, config, total_steps, say
        self.file = MetricsFile(folder / METRICS, resume_step=counters.step)
        self.started, self.first_step = time.perf_counter(), counters.step
        self.before = (counters.tokens, time.perf_counter())
        self.idle = 0.0  # seconds since then that went into evaluations and checkpoints
        self.compiled = programs()

    def step(
        self,
        counters: Counters,
        metrics: StepMetrics,
        *,
        epoch: float,
        learning_rate: float,
        bytes_moved: int,
        seconds_moved: float,
        seconds: float,
    ) -> None:
        """Every `logging_steps`, at the first step and at the last: one row."""
        step = counters.step
        if step % self.config.logging_steps and step not in (1, self.total_steps):
            return
        (tokens, since), now = self.before, time.perf_counter()
        self.before, training = (counters.tokens, now), now - since - self.idle
        self.idle = 0.0
        row = {
            "step": step,
            "epoch": epoch,
            "loss": float(metrics.loss),
            "grad_norm": float(metrics.grad_norm),
            "learning_rate": learning_rate,
            "num_tokens": counters.tokens,
            "num_trained_tokens": counters.trained_tokens,
            "tokens_per_second": (counters.tokens - tokens) / training,
            "step_time": seconds,
            "peak_memory_bytes": peak_bytes(),
            "host_bytes_moved": bytes_moved,
            "host_seconds_moved": seconds_moved,
            "mean_token_accuracy": float(metrics.accuracy),
        }
        self.file.append(row)
        done = step - self.first_step
        left = (now - self.started) / done * (self.total_steps - step)
        self.say(
            terminal_row(
                row,
                total_steps=self.total_steps,
                memory_limit_bytes=total_device_bytes(),
                seconds_left=left,
                compiles=programs() - self.compiled,
            )
        )

    def evaluation(self, step: int, result: PerplexityResult) -> None:
        """A row of an evaluation."""
        row = {
            "step": step,
            "eval_loss": result.mean_nll,
            "eval_perplexity": result.perplexity,
        }
        self.file.append(row)
        self.say(terminal_row(row, total_steps=self.total_steps))

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Every row of the run, those before a resume included."""
        path = self.folder / METRICS
        return read_metrics(path) if path.exists() else []

    def finish(self, counters: Counters) -> dict[str, Any]:
        """Draws loss.png; returns what summary.json says."""
        rows = self.rows
        plot_loss(rows, self.folder / "loss.png", title=self.config.run_name or self.folder.name)
        losses = [row["loss"] for row in rows if "loss" in row]
        evaluations = [row["eval_loss"] for row in rows if "eval_loss" in row]
        return {
            "steps": counters.step,
            "tokens": counters.tokens,
            "trained_tokens": counters.trained_tokens,
            "skipped_steps": counters.skipped,
            "first_loss": losses[0] if losses else None,
            "last_loss": losses[-1] if losses else None,
            "eval_loss": evaluations[-1] if evaluations else None,
            "best_eval_loss": counters.best_eval_loss,
            "seconds": time.perf_counter() - self.started,
            "peak_memory_bytes": peak_bytes(),
        }


def programs() -> int:
    """How many programs of a step were compiled so far."""
    return step.programs() + pipeline.programs()


def peak_bytes() -> int:
    """The most memory used so far: of the device where it is counted, else of the process."""
    on_device = peak_device_bytes()
    if on_device is not None and jax.default_backend() != "cpu":
        return on_device
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
