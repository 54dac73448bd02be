"""The training loop: batches in; adapter, metrics, checkpoints out; a stopped run goes on exactly.

for micro_batches in the data:
    gradients of each, summed        train/step.py
    divide once, clip, check         train/step.py
    update, page by page             optim/
    log, evaluate, save              every so many steps
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from qlora_jax.adapters.adapter import Adapter
from qlora_jax.checkpoints.atomic import new_folder
from qlora_jax.data.dataset import Dataset
from qlora_jax.errors import InputError, NonFinite
from qlora_jax.evaluation.perplexity import perplexity
from qlora_jax.memory.planner import Plan
from qlora_jax.memory.shapes import nbytes
from qlora_jax.models import Decoder
from qlora_jax.models.fingerprint import fingerprint
from qlora_jax.models.layerwise import LayerwiseDecoder
from qlora_jax.optim.schedules import schedule
from qlora_jax.placement import passing_device_bytes, to_device
from qlora_jax.train.config import TrainConfig
from qlora_jax.train.loss_scale import LossScale
from qlora_jax.train.step import Sums, accumulate, finish
from qlora_jax.workflows.adapter_folder import save_adapter
from qlora_jax.workflows.batches import BatchSource, real_tokens
from qlora_jax.workflows.below import Below, refuse_kinds
from qlora_jax.workflows.header import compiling, header
from qlora_jax.workflows.hub import repository
from qlora_jax.workflows.recorder import Recorder
from qlora_jax.workflows.room import explained, laid_out_for, refuse_too_large
from qlora_jax.workflows.run_folder import RunFolder, refuse_small_disk, write_json
from qlora_jax.workflows.run_state import Counters, Identity, RunState, restore, save
from qlora_jax.workflows.signals import Stopped, StopRequest, stop_requests
from qlora_jax.workflows.step_programs import gradients_for, optimizer_for
from qlora_jax.workflows.stream_guard import guarded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BAD_STEPS = 5  # non-finite steps in a row after which a run stops


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
      lora: the trained adapter.
      metrics: one dict a logged step, as in metrics.jsonl.
      summary: what summary.json holds.
      folder: where everything was written; itself a PEFT adapter.
    """

    lora: Adapter
    metrics: list[dict[str, Any]]
    summary: dict[str, Any]
    folder: Path


class Trainer:
    """Fine-tunes an adapter on a frozen base.

        run = Trainer(model, lora, data, TrainConfig(max_steps=500, output_dir="out"), tok).fit()

    Args:
      model: the base; never changed, never copied.
      lora: where the adapter begins.
      data: a Dataset, or any iterable of batches (dicts of `input_ids`, `labels`, and as the loader
        makes them `positions` and `segment_ids`), the same at every iteration.
      config: every knob of the run.
      tokenizer: saved beside the adapter, if given.
      eval_data: a Dataset that `eval_steps` evaluates on.
      below: frozen adapters that this one is trained on top of, see workflows/below.py.
      optimizer: an optax transform instead of `config.optim`; clipping to `max_grad_norm` comes
        before it. It runs on the device, unless `elementwise` says that it may be paged.
      elementwise: the transform treats every number apart from all others.
      plan: how the run is laid out in memory, if that was planned before the model was loaded.
      say: takes each printed line; they also go to train.log.
      notes: further lines of the header.

    Attributes:
      on_step: called with (steps done, steps in all) when a run begins and after each step.

    Raises:
      InputError: the configuration asks for what it has not been given.
    """

    def __init__(
        self,
        model: Decoder | LayerwiseDecoder,
        lora: Adapter,
        data: Dataset | Iterable[Any],
        config: TrainConfig,
        tokenizer: "PreTrainedTokenizerFast | None" = None,
        *,
        eval_data: Dataset | None = None,
        below: Below = Below(),  # noqa: B008 (frozen, and empty)
        optimizer: optax.GradientTransformation | None = None,
        elementwise: bool = False,
        plan: Plan | None = None,
        say: Callable[[str], object] = print,
        notes: Iterable[str] = (),
    ):
        if config.output_dir is None:
            raise InputError(
                "RUN-FOLDER", "output_dir", "missing", "a folder", "output_dir=out/run"
            )
        # In host memory: what is trained is a copy, and a GPU need not hold both.
        self.lora = jax.tree.map(np.asarray, lora)
        self.config, self.tokenizer = config, tokenizer
        self.eval_data, self.below, self.say = eval_data, below, say
        refuse_kinds(below, lora, model)
        self.on_step: Callable[[int, int], None] = lambda step, total: None
        if eval_data is None:
            config.refuse_unused_evaluation()
        self.batches = BatchSource(
            data,
            config.batch_size,
            config.gradient_accumulation_steps,
            config.shuffle_seed,
        )
        self.total_steps = self.number_of_steps()
        self.learning_rate = schedule(
            config.lr_scheduler, config.learning_rate, self.total_steps, config.warmup_ratio
        )
        self.plan = plan or laid_out_for(model, lora, config, self.row_length, below.adapter)
        self.remat = self.plan.choices.gradient_checkpointing
        self.model, fault = guarded(model, self.remat)
        self.notes = (*config.notes, *notes, *fault)
        self.gradients = gradients_for(self.model, self.remat)
        self.optimizer, self.memory_reason = optimizer_for(
            self.lora, config, self.plan, self.learning_rate, optimizer, elementwise
        )
        self.largest = 0  # tokens of the largest micro batch that has run
        self.key = jax.random.key(config.seed)

    @property
    def row_length(self) -> int:
        """Tokens of the longest row; 0 for batches of the caller's own."""
        return max(self.batches.data.row_lengths) if self.batches.loader else 0

    def number_of_steps(self) -> int:
        """`max_steps`, or the steps of `num_epochs` passes over the data."""
        if self.config.max_steps is not None:
            return self.config.max_steps
        if (per_epoch := self.batches.steps_per_epoch) is None:
            raise InputError(
                "RUN-STEPS",
                "max_steps",
                "missing, and the data does not tell its length",
                "a number of steps",
                "max_steps=1000",
            )
        return math.ceil(per_epoch * self.config.num_epochs)

    def fit(self, resume: str | Path | None = None) -> Run:
        """Runs to the end, or on from a checkpoint: `auto` for the newest, or its folder.

        SIGINT and SIGTERM end the run behind the step that they meet, with a checkpoint.

        Raises:
          InputError: the folder is not empty, or there is nothing to resume.
          ConfigMismatch: the checkpoint is of another run.
          DoesNotFit: the run is larger than the memory, by its plan or as it runs.
          NonFinite: five steps in a row were NaN or infinite; the last checkpoint is kept.
          Stopped: a signal came; its checkpoint is written.
        """
        refuse_too_large(self.plan, self.say)
        folder = RunFolder(self.config.output_dir, resume=resume is not None)
        with folder.locked(), stop_requests() as stop:
            self.tell = folder.logged(self.say)
            for line in header(self):
                self.tell(line)
            with explained(self.config, self.plan, self.tell):
                return self.run(folder, resume, stop)

    def run(self, folder: RunFolder, resume: str | Path | None, stop: StopRequest) -> Run:
        """`fit`, in a folder that is ours."""
        state = self.begin(folder, resume)
        folder.write_start(self.config.to_yaml())
        recorder = Recorder(folder.path, self.config, self.total_steps, state.counters, self.tell)
        self.on_step(state.counters.step, self.total_steps)
        self.tell(compiling())
        if (largest := self.batches.largest()) is not None:
            self.make_room(state, largest)
        for group in self.groups(state.counters):
            self.step(state, group, recorder)
            self.on_step(state.counters.step, self.total_steps)
            trained = time.perf_counter()
            self.evaluate(state, folder, recorder)
            self.checkpoint(state, folder, stop)
            recorder.idle += time.perf_counter() - trained
            if self.has_stopped_improving(state.counters):
                break
        return self.end(state, folder, recorder)

    def make_room(self, state: RunState, batch: Any) -> None:
        """Runs the largest micro batch so far once, for nothing, beside the sum of those before it.

        So memory runs out before the first step or not at all. What is free then tells how much of
        the optimizer's state may stay on the device.
        """
        self.largest = batch["input_ids"].size
        sums = self.micro_batch(state, batch, 0)
        if self.config.gradient_accumulation_steps > 1:
            sums = accumulate(sums, self.micro_batch(state, batch, 0))
        jax.block_until_ready(sums)
        del sums
        passing = passing_device_bytes()
        if passing is not None and self.config.optim_memory == "auto":
            state.optimizer, self.memory_reason = self.optimizer.fit(
                state.params, state.optimizer, reserved_bytes=passing
            )

    def begin(self, folder: RunFolder, resume: str | Path | None) -> RunState:
        """The state of step 0, or that of a checkpoint."""
        # A copy, for updates donate what they get; committed, or the programs that take it would be
        # compiled again after the first update.
        params = to_device(jax.tree.map(jnp.array, self.lora.params))
        scale = LossScale.for_dtype(self.model.dtype)
        state = RunState(params, self.optimizer.init(params), Counters(loss_scale=scale))
        base = fingerprint(self.model) + self.below.digest
        self.identity = Identity.of(self.config, base, self.batches.fingerprint, self.lora.spec)
        refuse_small_disk(folder.path, 2 * nbytes([state.params, state.optimizer]))
        if resume is None:
            return state
        checkpoint = folder.resumed_checkpoint(resume)
        state = restore(checkpoint, self.saved(state), self.identity)
        state.optimizer = self.optimizer.placed(state.params, state.optimizer)
        self.tell(f"resumed  {checkpoint} (step {state.counters.step} of {self.total_steps})")
        return state

    def groups(self, counters: Counters) -> Iterator[list[Any]]:
        """The micro batches of every step still to do; `counters` say where the data stands."""
        while counters.step < self.total_steps:
            start = counters.batch
            for group in self.batches.groups(counters.epoch, start):
                counters.batch += len(group)
                yield group
                if counters.step == self.total_steps:
                    return
            if counters.batch == start == 0:
                raise InputError("DATA-EMPTY", "data", "no batch in a whole epoch", "at least one")
            counters.epoch, counters.batch = counters.epoch + 1, 0

    def step(self, state: RunState, group: list[Any], recorder: Recorder) -> None:
        """One optimizer step: gradients of all micro batches, one division, one update."""
        started = time.perf_counter()
        counters = state.counters
        scale, sums = counters.loss_scale, None
        for number, batch in enumerate(group):
            if batch["input_ids"].size > self.largest:
                self.make_room(state, batch)
            sums = accumulate(sums, self.micro_batch(state, batch, number))
        grads, metrics = finish(
            sums, max_grad_norm=self.config.max_grad_norm, loss_scale=scale.value
        )
        # A skipped step leaves the optimizer's own count, and with it the schedule, where it was.
        learning_rate = float(self.learning_rate(counters.step - counters.skipped))
        if finite := bool(metrics.finite):
            state.params, state.optimizer = self.optimizer.apply(
                state.params, grads, state.optimizer
            )
            counters.bad_steps = 0
        else:
            self.skip(counters, scale)
        counters.loss_scale = scale.after(finite)
        counters.step += 1
        counters.tokens += sum(real_tokens(batch) for batch in group)
        counters.trained_tokens += int(metrics.count)
        recorder.step(
            counters,
            metrics,
            learning_rate=learning_rate,
            epoch=self.epoch(counters),
            bytes_moved=self.optimizer.bytes_moved if finite else 0,
            seconds_moved=self.optimizer.seconds_moved if finite else 0.0,
            seconds=time.perf_counter() - started,
        )

    def micro_batch(self, state: RunState, batch: Any, number: int) -> Sums:
        """Loss and gradients of micro batch `number` of a step."""
        counters, spec, key = state.counters, self.lora.spec, None
        if spec.lora_dropout:
            key = jax.random.fold_in(jax.random.fold_in(self.key, counters.step), number)
        return self.gradients(
            state.params,
            self.model,
            self.batches.inputs(batch),
            **self.below.arguments,
            spec=spec,
            dropout_key=key,
            loss_scale=counters.loss_scale.value,
            remat=self.remat,
        )

    def skip(self, counters: Counters, scale: LossScale) -> None:
        """Counts a step that is not applied; the fifth in a row ends the run."""
        counters.skipped += 1
        if scale.can_fall():
            return
        counters.bad_steps += 1
        self.tell(f"step {counters.step + 1}: loss or gradient is not finite; skipped")
        if counters.bad_steps == BAD_STEPS:
            raise NonFinite(
                "RUN-NONFINITE",
                self.config.output_dir,
                f"loss or gradient was NaN or infinite in {BAD_STEPS} steps in a row, the last "
                f"is step {counters.step + 1}",
                "finite numbers",
                "a smaller learning_rate; the checkpoints before are good",
            )

    def evaluate(self, state: RunState, folder: RunFolder, recorder: Recorder) -> None:
        """Every `eval_steps` and at the end: loss on the evaluation data, and the best adapter."""
        counters = state.counters
        due = counters.step % self.config.eval_steps == 0 or counters.step == self.total_steps
        if self.eval_data is None or not due:
            return
        both = self.below.under(self.adapter(state))
        result = perplexity(self.model, self.eval_data, adapter=both)
        recorder.evaluation(counters.step, result)
        if counters.best_eval_loss is not None and result.mean_nll >= counters.best_eval_loss:
            counters.evaluations_since_best += 1
            return
        counters.best_eval_loss, counters.evaluations_since_best = result.mean_nll, 0
        if self.config.save_best:
            self.save_adapter(folder.path / "best", state)

    def has_stopped_improving(self, counters: Counters) -> bool:
        """Whether `early_stopping_patience` evaluations in a row were no better than the best."""
        patience = self.config.early_stopping_patience
        if not patience or counters.evaluations_since_best < patience:
            return False
        self.tell(f"stopped at step {counters.step}: {patience} evaluations without a better loss")
        return True

    def checkpoint(self, state: RunState, folder: RunFolder, stop: StopRequest) -> None:
        """Every `save_steps`, and when a signal asks to stop: everything, whole or not at all."""
        step = state.counters.step
        if step % self.config.save_steps and not stop.signal:
            return
        path = folder.checkpoint(step)
        if not path.exists():  # a resumed run that is stopped at once has it already
            with new_folder(path) as temporary:
                self.save_adapter(temporary, state)
                save(temporary, self.saved(state), self.identity)
            folder.keep_newest(self.config.save_total_limit)
        if stop.signal:
            raise Stopped(stop.signal, path)

    def saved(self, state: RunState) -> RunState:
        """The state as a checkpoint holds it: the optimizer's is the same wherever it lives."""
        whole = self.optimizer.whole(state.params, state.optimizer)
        return dataclasses.replace(state, optimizer=whole)

    def end(self, state: RunState, folder: RunFolder, recorder: Recorder) -> Run:
        """The final adapter, the plot and the summary."""
        self.save_adapter(folder.path, state)
        summary = recorder.finish(state.counters)
        write_json(folder.path / "summary.json", summary)
        self.tell(f"done     adapter in {folder.path} (PEFT opens the folder itself)")
        return Run(self.adapter(state), recorder.rows, summary, folder.path)

    def adapter(self, state: RunState) -> Adapter:
        """The adapter as it is now."""
        return Adapter(state.params, self.lora.spec)

    def save_adapter(self, path: Path, state: RunState) -> None:
        """The adapter and its tokenizer, into a new folder or one that may have them already."""
        save_adapter(
            path,
            self.adapter(state),
            self.model,
            self.tokenizer,
            base_model_name=repository(self.config.model),
            extra={"step": state.counters.step, **self.below.facts},
            replace=True,
        )

    def epoch(self, counters: Counters) -> float:
        """Passes over the data so far, as far as its length is known."""
        per_epoch = self.batches.steps_per_epoch
        within = counters.batch / self.config.gradient_accumulation_steps
        return counters.epoch + (min(1.0, within / per_epoch) if per_epoch else 0.0)
