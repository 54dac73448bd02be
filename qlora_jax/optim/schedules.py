"""Learning-rate schedules by their Hugging Face names, with transformers' formulas.

    step    0   1   2   3   4   5   6   7   8   9   10      10 steps, warmup_ratio 0.2
    linear  0  .5   1 .88 .75 .62  .5 .38 .25 .12   0       times learning_rate

The first step of a warmup has learning rate 0, as in transformers.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from qlora_jax.errors import InputError, nearest

POLYNOMIAL_END = 1e-7  # transformers' lr_end
INVERSE_SQRT_TIMESCALE = 10_000  # transformers' timescale without a warmup

Step = jax.Array | int
Factor = Callable[[Step], jax.Array]


@functools.cache  # equal schedules are one function: see `adamw`
def schedule(
    name: str, learning_rate: float, total_steps: int, warmup_ratio: float = 0.0
) -> optax.Schedule:
    """The learning rate as a function of the step, counted from 0; float32, can be traced.

    Args:
      name: a key of `SCHEDULES`. `constant` has no warmup, whatever `warmup_ratio`: so in
        transformers, where `constant_with_warmup` has one.
      learning_rate: the largest value.
      total_steps: optimizer steps of the run.
      warmup_ratio: warmup steps / total_steps, rounded up.

    Raises:
      InputError: an unknown name, or one that this project does not have.

    Source: `transformers.get_scheduler` with its defaults; `TrainingArguments.get_warmup_steps`.
    """
    refuse_unknown(name, "lr_scheduler")
    if name == "polynomial" and learning_rate <= POLYNOMIAL_END:
        expected = f"more than {POLYNOMIAL_END}, where polynomial ends"
        raise InputError("OPT-SCHEDULE", "learning_rate", f"{learning_rate}", expected)
    warmup = math.ceil(total_steps * warmup_ratio)
    decay = SCHEDULES[name](learning_rate, total_steps, warmup)

    def at(step: Step) -> jax.Array:
        factor = decay(step)
        if name != "constant":
            factor = jnp.where(step < warmup, step / max(1, warmup), factor)
        return jnp.asarray(learning_rate * factor, jnp.float32)

    return at


def refuse_unknown(name: str, where: str) -> None:
    """Raises the error for a name that is not in `SCHEDULES`."""
    if name in SCHEDULES:
        return
    if name in ELSEWHERE:
        raise InputError("OPT-SCHEDULE", where, f"{name} is not supported: {ELSEWHERE[name]}")
    near = nearest(name, SCHEDULES)
    hint = f"did you mean {near[0]}" if near else ""
    raise InputError("OPT-SCHEDULE", where, f"unknown {name!r}", ", ".join(SCHEDULES), hint)


def constant(learning_rate: float, total: int, warmup: int) -> Factor:
    """1."""
    return lambda step: jnp.float32(1.0)


def linear(learning_rate: float, total: int, warmup: int) -> Factor:
    """From 1 to 0 at the last step."""
    return lambda step: jnp.maximum(0.0, (total - step) / max(1, total - warmup))


def cosine(learning_rate: float, total: int, warmup: int) -> Factor:
    """(1 + cos(pi x)) / 2: half a wave from 1 to 0 at the end, behind which it rises again."""
    # As cos(pi x / 2)^2, which is the same but loses no digits near 0.
    return lambda step: jnp.cos(0.5 * jnp.pi * progress(step, total, warmup)) ** 2


def cosine_with_restarts(learning_rate: float, total: int, warmup: int) -> Factor:
    """One such half wave (transformers' num_cycles is 1), and 0 from its end on."""
    wave = cosine(learning_rate, total, warmup)
    return lambda step: jnp.where(progress(step, total, warmup) >= 1.0, 0.0, wave(step))


def polynomial(learning_rate: float, total: int, warmup: int) -> Factor:
    """A line from 1 to 1e-7 / learning_rate (transformers' power is 1)."""
    end = POLYNOMIAL_END / learning_rate
    left = linear(learning_rate, total, warmup)
    return lambda step: (1.0 - end) * left(step) + end


def inverse_sqrt(learning_rate: float, total: int, warmup: int) -> Factor:
    """sqrt(timescale / (step - warmup + timescale)); the timescale is the warmup, or 10,000."""
    timescale = warmup or INVERSE_SQRT_TIMESCALE
    # In the warmup, where another branch is taken, the root's argument is kept positive.
    return lambda step: 1.0 / jnp.sqrt(jnp.maximum(step - warmup + timescale, 1) / timescale)


def progress(step: Step, total: int, warmup: int) -> jax.Array:
    """The part of the steps behind the warmup that is done: 0 to 1."""
    return (step - warmup) / max(1, total - warmup)


SCHEDULES = {
    "constant": constant,
    "constant_with_warmup": constant,
    "linear": linear,
    "cosine": cosine,
    "cosine_with_restarts": cosine_with_restarts,
    "polynomial": polynomial,
    "inverse_sqrt": inverse_sqrt,
}

ELSEWHERE = {
    "reduce_lr_on_plateau": "it needs the evaluation loss inside the schedule",
    "cosine_with_min_lr": "it needs an option that the config does not have",
    "cosine_warmup_with_min_lr": "it needs options that the config does not have",
    "warmup_stable_decay": "it needs options that the config does not have",
    "greedy": "it needs the loss inside the schedule",
}
