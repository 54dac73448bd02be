"""Whether a run fits, in which way, how long a step takes at least, and what to change if not.

    plan(ModelConfig, TrainConfig, Budget) -> Plan

From shapes alone: no weight is read, nothing is compiled or allocated. Of the ways that `auto`
leaves open (choices.py) the quickest that fits is taken; the rest of the figures are its.
"""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

from qlora_jax.adapters.composed_spec import spec_of_sum
from qlora_jax.adapters.spec import LoraSpec
from qlora_jax.checkpoints.peft import read_adapter
from qlora_jax.errors import InputError
from qlora_jax.memory.bound import Bound, bound
from qlora_jax.memory.budget import Budget
from qlora_jax.memory.changes import Change, changes
from qlora_jax.memory.choices import Choices, candidates
from qlora_jax.memory.estimate import Estimate, Estimator
from qlora_jax.memory.gpus import PINNED_LIMIT, PINNED_VARIABLE
from qlora_jax.memory.program import Micro
from qlora_jax.models.config import ModelConfig
from qlora_jax.models.families import module_shapes
from qlora_jax.train.config import TrainConfig
from qlora_jax.train.for_model import fitted, quantization_of, spec_of

DOUBT = 0.1  # of temporaries: by how much their estimate may be too small


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a run would be laid out in memory.

    Attributes:
      fits: whether it can be held.
      choices: what every `auto` became; of the way that takes least where none fits.
      reasons: why, by key.
      estimate: bytes by owner.
      budget: what it is held against.
      micro: what a step's program is traced from.
      accumulation: micro batches of a step.
      bound: seconds of a step, at least; None where the device's rates are not known.
      changes: what would help, the cheapest first; none where it fits.
      notes: what else is to be known, a line each.
      compiled: the temporaries are XLA's own figure for the compiled program.
    """

    fits: bool
    choices: Choices
    reasons: dict[str, str]
    estimate: Estimate
    budget: Budget
    micro: Micro
    accumulation: int
    bound: Bound | None
    changes: tuple[Change, ...]
    notes: tuple[str, ...]
    compiled: bool = False

    @property
    def device_bytes(self) -> int:
        """The most on the device at once."""
        return self.estimate.device_bytes

    @property
    def host_bytes(self) -> int:
        """The most on the host at once."""
        return self.estimate.host_bytes

    def table(self) -> list[str]:
        """The plan for people, a line each."""
        return list(lines(self))

    def as_json(self) -> dict[str, Any]:
        """Plain data: bytes are whole numbers, seconds are null where they cannot be told."""
        owners = {
            owner: {"device": size, "host": self.estimate.host[owner]}
            for owner, size in self.estimate.device.items()
        }
        return {
            "fits": self.fits,
            "device_bytes": self.device_bytes,
            "host_bytes": self.host_bytes,
            "by_owner": owners,
            "compiled": self.compiled,
            "step_seconds_bound": self.bound and self.bound.step_seconds,
            "bottleneck": self.bound and self.bound.bottleneck,
            "changes": [dataclasses.asdict(change) for change in self.changes],
            "gpu": self.budget.name,
            "limits": {"device": self.budget.device, "host": self.budget.host},
            "choices": dataclasses.asdict(self.choices),
            "seconds": self.bound and self.bound.seconds,
            "streaming_hidden_from_tokens": self.bound and self.bound.hidden_from,
        }


def plan(shape: ModelConfig, config: TrainConfig, budget: Budget) -> Plan:
    """The quickest way that fits, or the one that takes least and what would help.

    Raises:
      InputError: the configuration does not suit the model.
    """
    config, notes = fitted(config, shape)
    return plan_of(micro_of(shape, config, budget), config, budget, notes)


def plan_of(micro: Micro, config: TrainConfig, budget: Budget, notes: Iterable[str] = ()) -> Plan:
    """`plan` of a micro batch that is known; of the configuration the rest counts."""
    estimator = Estimator(micro, config)
    ways = list(candidates(config, on_gpu=budget.card is not None))
    found = chosen(estimator, config, ways, budget)
    fits = found is not None
    if found is None:
        tried = {way.optim_memory: estimator.estimate(way) for way in ways[-2:]}
        found = min(tried.values(), key=lambda estimate: estimate.device_bytes)
    rates = None
    if budget.card is not None:
        accumulation = config.gradient_accumulation_steps
        rates = bound(found, estimator.micro, accumulation, budget.card)
    if budget.card is not None and found.pinned_bytes > PINNED_LIMIT:
        least = -(-found.pinned_bytes // (1 << 30))
        notes = [*notes, f"pinned host memory: set {PINNED_VARIABLE}={least} or more"]
    return Plan(
        fits=fits,
        choices=found.choices,
        reasons=reasons(config, found.choices, budget, fits=fits),
        estimate=found,
        budget=budget,
        micro=estimator.micro,
        accumulation=config.gradient_accumulation_steps,
        bound=rates,
        changes=() if fits else changes(estimator, config, found, budget),
        notes=tuple(notes),
    )


def plan_compiled(shape: ModelConfig, config: TrainConfig, budget: Budget) -> Plan:
    """`plan`, and then the temporaries of the way that it chose by XLA's own analysis.

    It takes half a minute or more.

    Raises:
      InputError: AOT-PLUGIN, what compiles for a GPU is not installed; PLAN-COMPILE, no GPU.
    """
    from qlora_jax.memory.compiled import compiled_estimate

    if budget.card is None:
        found = "compiles for a GPU, and none is here or named"
        raise InputError("PLAN-COMPILE", "--compile", found, "--gpu NAME", "--gpu rtx4090")
    first = plan(shape, config, budget)
    found = compiled_estimate(first.micro, first.estimate)
    fits = budget.holds(found.device_bytes, found.host_bytes)
    return dataclasses.replace(first, fits=fits, estimate=found, compiled=True)


def micro_of(shape: ModelConfig, config: TrainConfig, budget: Budget) -> Micro:
    """The largest micro batch of the run: full rows."""
    return Micro(
        shape,
        adapter_spec(shape, config),
        quantization_of(config),
        config.dtype,
        config.batch_size,
        config.max_seq_length,
        budget.card and budget.card.gpu,
        frozen_spec(shape, config),
    )


def adapter_spec(shape: ModelConfig, config: TrainConfig) -> LoraSpec:
    """Of the new adapter, or of the one that the run goes on from."""
    return spec_of(config, shape) if config.adapter is None else saved_spec(config.adapter, shape)


def frozen_spec(shape: ModelConfig, config: TrainConfig) -> LoraSpec | None:
    """Of the sum of the adapters that the run trains on top of."""
    specs = [saved_spec(path, shape) for path in config.frozen_adapters]
    return spec_of_sum(specs) if specs else None


def saved_spec(path: str, shape: ModelConfig) -> LoraSpec:
    """Of an adapter's folder."""
    return read_adapter(path, module_shapes(shape), shape.num_hidden_layers).spec


def chosen(
    estimator: Estimator, config: TrainConfig, ways: list[Choices], budget: Budget
) -> Estimate | None:
    """The first way that fits.

    With optim_memory auto as many pages of the state stay on the device as it has room for, beside
    what temporaries may take more than they were estimated to.
    """
    for way in ways:
        if estimator.surely_exceeds(way, budget.device):
            continue
        found = estimator.estimate(way)
        if not budget.holds(found.device_bytes, found.host_bytes):
            continue
        if way.optim_memory == "device" or config.optim_memory == "host" or budget.card is None:
            return found
        spare = int(DOUBT * (found.device["activations"] + found.device["workspace"]))
        page = -(-estimator.state // estimator.pages)
        room = (budget.device - found.device_bytes - spare) // page
        resident = max(0, min(estimator.pages, room))
        return estimator.estimate(dataclasses.replace(way, resident=resident))
    return None


def reasons(config: TrainConfig, choices: Choices, budget: Budget, *, fits: bool) -> dict[str, str]:
    """Why each key is what it is."""
    keys = "stream_weights", "gradient_checkpointing", "optim_memory"
    asked = {key: getattr(config, key) for key in keys}
    if not fits:
        open_to = "auto: the way that takes least memory, and it does not fit"
    elif budget.card is None:
        open_to = "auto: the memory of this device is the host's, so nothing is moved"
    else:
        open_to = f"auto: the quickest way that fits into {budget.device / 1e9:.1f} GB"
    return {key: open_to if value == "auto" else "asked for" for key, value in asked.items()}


def lines(plan: Plan) -> Iterator[str]:
    """`Plan.table`."""
    estimate, budget = plan.estimate, plan.budget
    shared = budget.card is None
    yield f"{'GB':<14} {'device':>9} {'host':>9}"
    for owner, size in estimate.device.items():
        if size or estimate.host[owner]:
            yield f"{owner:<14} {gb(size):>9} {gb(estimate.host[owner]):>9}"
    yield f"{'in all':<14} {gb(plan.device_bytes):>9} {gb(plan.host_bytes):>9}"
    host = "" if shared or budget.host is None else gb(budget.host)
    yield f"{'there is':<14} {gb(budget.device):>9} {host or ('' if shared else 'unknown'):>9}"
    yield f"device         {budget.name}: {budget.how}"
    if shared:
        yield "               device and host are one memory here: both columns share what there is"
    yield f"temporaries    {'by XLA, compiled' if plan.compiled else 'estimated from the program'}"
    for key, why in plan.reasons.items():
        yield f"{key}={getattr(plan.choices, key)} ({why})"
    if plan.choices.resident:
        yield f"pages of optimizer state on the device: {plan.choices.resident}"
    if plan.bound is not None:
        parts = ", ".join(f"{name} {value:.3g}" for name, value in plan.bound.seconds.items())
        yield f"step           at least {plan.bound.step_seconds:.3g} s (a bound): {parts}"
        yield f"bottleneck     {plan.bound.bottleneck}"
        if plan.bound.hidden_from is not None:
            needed = f"{plan.bound.hidden_from:,} tokens a micro batch on"
            have = f"{plan.micro.tokens:,}"
            yield f"streaming      hidden behind computing from {needed}; here {have}"
    yield from (f"note           {note}" for note in plan.notes)
    yield "it fits" if plan.fits else "it does not fit. What would help, the cheapest first:"
    for change in plan.changes:
        yield f"  {change.change:<34} {saved(change)}: {change.why}"


def saved(change: Change) -> str:
    """`-3.2 GB device, +1.0 GB host`."""
    sides = ((change.saves_device_bytes, "device"), (change.saves_host_bytes, "host"))
    return ", ".join(f"{-size / 1e9:+.2f} GB {side}" for size, side in sides if size)


def gb(size: int) -> str:
    """Bytes in GB, 1e9."""
    return f"{size / 1e9:,.3f}"
