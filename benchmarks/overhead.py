"""What streamed layers and a paged optimizer cost a training step, beside the resident one.

    python -m benchmarks.overhead --model PATH --record

Two ways at a time live in one process and take turns, a b, b a, step by step, with nothing else
between them: what a third leaves in the caches costs more than what is measured. Told are the
quartiles of each round's ratio. `--record` writes results/overhead.json; other options are those of
train_step.py.
"""

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import train_step
from benchmarks.machine import described
from benchmarks.timing import rounds, summary

RESULTS = Path(__file__).parent / "results" / "overhead.json"
# (what it is, beside what, the most that it may take of it)
PAIRS = {
    "layers streamed": ({"stream_weights": "on"}, {}, 1.10),
    "optimizer paged": ({"optim_memory": "host"}, {}, 1.02),
    "layers streamed, remat full": (
        {"stream_weights": "on", "remat": "full"},
        {"remat": "full"},
        1.10,
    ),
}


def main() -> None:
    parser = train_step.parser(__doc__)
    parser.set_defaults(dtype="float32", steps=20)
    parser.add_argument("--record", action="store_true", help="write results/overhead.json")
    args = parser.parse_args()
    found = {
        "model": Path(args.model).name,
        "batch": f"{args.batch} x {args.seq_len}",
        "rank": args.rank,
        "dtype": args.dtype,
        "rounds": args.steps,
        "ratios": {name: compared(args, *pair) for name, pair in PAIRS.items()},
    }
    if args.record:
        RESULTS.write_text(json.dumps({**described(), **found}, indent=2) + "\n")
    print(json.dumps(found))


def compared(
    args: argparse.Namespace, way: dict[str, Any], base: dict[str, Any], bar: float
) -> dict[str, float]:
    """Quartiles of one way's seconds over the other's in the same round, and both medians."""
    both = rounds({"way": timed(args, way), "base": timed(args, base)}, args.steps)
    ratios = summary([a / b for a, b in zip(both["way"], both["base"], strict=True)])
    medians = {name: statistics.median(values) for name, values in both.items()}
    return {
        **ratios._asdict(),
        "bar": bar,
        "seconds": medians["way"],
        "beside_seconds": medians["base"],
    }


def timed(args: argparse.Namespace, way: dict[str, Any]) -> Callable[[], float]:
    """A warm step, which tells its seconds."""
    step = train_step.training(argparse.Namespace(**vars(args) | way))
    for _ in range(train_step.WARM_UP):
        step()
    return functools.partial(seconds_of, step)


def seconds_of(step: Callable[[], float]) -> float:
    """Of one step."""
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
