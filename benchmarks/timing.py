"""Times calls on a device: many in one program, contenders in turn, the median told.

A kernel of 5 us is shorter than the launch of a program, so a program holds a call for each of
several weights, one after the other. The weights together are larger than the L2 cache: each is
read from device memory, as in a model that has just gone through its other layers.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

FEWEST, MOST = 4, 64  # calls a program; compiling one takes a while


class Timing(NamedTuple):
    """Seconds a call, or ratios of them: the median and the quartiles."""

    median: float
    low: float
    high: float


def calls(nbytes: int, l2_bytes: int) -> int:
    """How many weights of `nbytes` to take turns with: three times what the L2 cache holds."""
    return max(FEWEST, min(MOST, -(-3 * l2_bytes // nbytes)))


def program(call: Callable[[Any, Any], Any], x: Any, weights: Sequence[Any]) -> Callable[[], list]:
    """A function without arguments: `call(x, weight)` for each weight, in one program.

    All results are given back, and a call begins after the one before, so that XLA can neither
    leave calls out nor merge them.
    """
    call = jax.jit(call)

    @jax.jit
    def all_of_them(x, weights):
        results = []
        for weight in weights:
            x, weight = jax.lax.optimization_barrier((x, weight))
            y = call(x, weight)
            x, y = jax.lax.optimization_barrier((x, y))
            results.append(y)
        return results

    return lambda: all_of_them(x, weights)


def seconds_of_a_call(run: Callable[[], list]) -> float:
    """One run of a program, from a quiet device to its results, divided by its calls."""
    start = time.perf_counter()
    results = jax.block_until_ready(run())
    return (time.perf_counter() - start) / len(results)


def in_turn(runs: dict[str, Callable[[], float]], repetitions: int) -> dict[str, Timing]:
    """`rounds`, and their summaries."""
    return {name: summary(values) for name, values in rounds(runs, repetitions).items()}


def rounds(runs: dict[str, Callable[[], float]], repetitions: int) -> dict[str, list[float]]:
    """Each of `runs`, already warm, `repetitions` times, in `order`."""
    seconds = {name: [] for name in runs}
    names = list(runs)
    for i in range(repetitions):
        for at in order(len(names), i):
            seconds[names[at]].append(runs[names[at]]())
    return seconds


def order(count: int, turn: int) -> list[int]:
    """Who comes when in a turn: 0 1 3 2, then 1 2 0 3, and so on.

    Over `count` turns each comes once in each place, and where `count` is even each comes once
    behind each other one, whose traces in the caches it finds (E. J. Williams, 1949).
    """
    steps = [(place + 1) // 2 if place % 2 else -(place // 2) for place in range(count)]
    return [(turn + step) % count for step in steps]


def summary(values: Sequence[float]) -> Timing:
    """Median and quartiles; of a single value, that value."""
    if len(values) == 1:
        return Timing(values[0], values[0], values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Timing(median, low, high)
