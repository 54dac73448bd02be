"""One problem measured: every contender is made, checked, and timed in turn with the others."""

import functools
import sys
from collections.abc import Callable
from math import inf, isfinite
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import timing
from benchmarks.contenders import Contender, Problem
from benchmarks.peers import Bitsandbytes, PeerError
from pallas_kernels.backends import Unsupported
from pallas_kernels.gpu import Gpu

# The most that a single number may be off, over the sum of its own size and the root mean square of
# all: five times what all roundings come to in the mean square, since millions are looked at. A
# number that is wrong, or was never written, is off by about 0.5.
WORST = 0.04


def measure(
    problem: Problem, device: Gpu, repetitions: int, calls: int | None, peer: Bitsandbytes | None
) -> list[dict[str, Any]]:
    """One row a contender, with all keys; what was refused, wrong or failed says so."""
    size = nbytes(jax.eval_shape(problem.weight, 0))
    calls = calls or timing.calls(size, device.l2_bytes)
    weights = [problem.weight(seed) for seed in range(calls)]
    exact = jax.jit(problem.exact)(problem.x, weights[0])
    rows, runs = [], {}
    for contender in problem.contenders:
        row = blank(problem, contender.name, contender.ours, calls)
        try:
            run, known = ready(problem, contender, weights, exact)
        except Unsupported as refusal:
            reason = str(refusal).removeprefix(f"{contender.name}: ")
            row |= {"outcome": "refused", "reason": reason}
        except Exception as error:  # a compiler's or the device's: the others go on
            row |= {"outcome": "failed", "reason": short(error)}
        else:
            row |= known
            if row["outcome"] == "timed":
                runs[contender.name] = functools.partial(timing.seconds_of_a_call, run)
        rows.append(row)
    if peer and problem.op in ("nf4_matmul", "dequantize"):
        rows += peer_rows(problem, peer, calls, size, runs)
    seconds = timing.in_turn(runs, repetitions)
    for row in rows:
        if row["contender"] in seconds:
            row |= timed(problem, row, seconds[row["contender"]], device)
        say(problem, row)
    return rows


def ready(
    problem: Problem, contender: Contender, weights: list[Any], exact: Any
) -> tuple[Callable[[], list], dict[str, Any]]:
    """The program that has run once, and what its first result says.

    Raises:
      Unsupported: the contender does not take this problem.
    """
    kept = jax.eval_shape(contender.store, weights[0])
    jax.eval_shape(contender.call, problem.x, kept)  # refuses before anything is stored
    kept = [contender.store(weight) for weight in weights]
    run = timing.program(contender.call, problem.x, kept)
    result = run()[0]
    return run, {"weight_bytes": nbytes(kept[0]), **compared(result, exact, problem.allowed)}


def blank(problem: Problem, name: str, ours: bool, calls: int) -> dict[str, Any]:
    """A row of which nothing is known yet."""
    case = problem.case
    return {
        "op": problem.op,
        "model": case.model,
        "projection": case.projection,
        "m": None if problem.op == "dequantize" else case.m,
        "n": case.n,
        "k": case.k,
        "direction": problem.direction,
        "contender": name,
        "ours": ours,
        "chosen": ours and name == problem.chosen,
        "outcome": "timed",
        "reason": None,
        "error": None,
        "worst": None,
        "calls": calls,
        "cold": None,
        "weight_bytes": None,
        "seconds": None,
        "low": None,
        "high": None,
        "bandwidth_share": None,
        "flops_share": None,
    }


def compared(found: Any, exact: Any, allowed: float) -> dict[str, Any]:
    """How far a result is from the exact one, and whether that makes it wrong."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(exact), strict=True)
    errors = [[float(value) for value in differences(a, b)] for a, b in pairs]
    error, worst = (max(values, key=order) for values in zip(*errors, strict=True))
    known = {"error": in_json(error), "worst": in_json(worst)}
    if error <= allowed and worst <= WORST:
        return known
    reason = f"off by {error:.1e} (allowed {allowed:.1e}), a single number by {worst:.1e}"
    return {**known, "outcome": "wrong", "reason": reason}


def in_json(number: float) -> float | None:
    """JSON has no NaN and no infinity."""
    return number if isfinite(number) else None


def order(number: float) -> float:
    """NaN is the largest."""
    return number if isfinite(number) else inf


@jax.jit
def differences(found: jax.Array, exact: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(norm of the difference over the norm, the largest of a number, see WORST)."""
    difference = found.astype(jnp.float32) - exact
    size = jnp.sqrt(jnp.mean(exact**2))
    return (
        jnp.sqrt(jnp.mean(difference**2)) / size,
        (jnp.abs(difference) / (size + jnp.abs(exact))).max(),
    )


def timed(
    problem: Problem, row: dict[str, Any], seconds: timing.Timing, device: Gpu
) -> dict[str, Any]:
    """Seconds, and what share they are of the device's peaks."""
    moved = row["weight_bytes"] + problem.moved
    return {
        **dict(zip(("seconds", "low", "high"), seconds, strict=True)),
        "cold": row["calls"] * row["weight_bytes"] >= 2 * device.l2_bytes,
        "bandwidth_share": share(moved, seconds.median, device.bandwidth),
        "flops_share": share(problem.flops, seconds.median, device.flops),
    }


def share(amount: float, seconds: float, peak: float) -> float | None:
    """Of the peak; None when there is nothing to count, or the peak is not known."""
    return amount / seconds / peak if amount and peak else None


def peer_rows(
    problem: Problem,
    peer: Bitsandbytes,
    calls: int,
    weight_bytes: int,
    runs: dict[str, Callable[[], float]],
) -> list[dict[str, Any]]:
    """bitsandbytes' rows; what it can run is added to `runs`."""
    case = problem.case
    request = {"op": problem.op, "direction": problem.direction, "calls": calls}
    rows = []
    try:
        for name in peer.prepare(**request, m=case.m, n=case.n, k=case.k):
            peer.run(name)
            rows.append(blank(problem, name, False, calls) | {"weight_bytes": weight_bytes})
            runs[name] = functools.partial(peer.run, name)
    except PeerError as error:
        row = blank(problem, "bitsandbytes", False, calls)
        rows.append(row | {"outcome": "failed", "reason": short(error)})
    return rows


def nbytes(tree: Any) -> int:
    """Of all arrays; those of 4 bits hold two numbers a byte."""
    return sum(
        array.size // 2 if array.dtype == jnp.uint4 else array.size * array.dtype.itemsize
        for array in jax.tree.leaves(tree)
    )


def short(error: Exception) -> str:
    """An error in one line."""
    first = next((line for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {first[:200]}"


def say(problem: Problem, row: dict[str, Any]) -> None:
    """A line on stderr as it goes; one run takes many minutes."""
    what = row["reason"] or ("" if row["seconds"] is None else f"{row['seconds'] * 1e6:.1f} us")
    if what:
        text = f"{problem.op} {problem.case} {problem.direction}, {row['contender']}: {what}"
        print(text, file=sys.stderr)
