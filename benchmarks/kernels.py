"""Times every kernel on this machine's GPU against dense products, bitsandbytes and qwix.

    python -m benchmarks.kernels                                all of it; writes results/
    python -m benchmarks.kernels --bnb COMMAND                  with bitsandbytes, see peers.py
    python -m benchmarks.kernels --models square --tokens 1,16  a part
    python -m benchmarks.kernels --interpret h100               tiny cases, interpreted on the CPU

A kernel is compared with a float32 product first; one that is wrong is not timed, and the exit
code is 1. Times are medians of calls that take turns with each other; `calls` weights take turns
too, so that the L2 cache does not hold them (`cold` says when they are too few or small for that).
bfloat16 throughout; scales double-quantized, as in training, unless --plain-scales.
"""

import argparse
import contextlib
import datetime
import importlib.metadata
import importlib.util
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if not __package__:  # run as a file
    sys.path.insert(0, str(Path(__file__).parent.parent))

import jax

from benchmarks import contenders, measuring, speed_table
from benchmarks.peers import Bitsandbytes, PeerError
from benchmarks.speed_bars import judged
from pallas_kernels import gpu
from pallas_kernels.cross_entropy import cases as head_cases
from pallas_kernels.nf4_matmul import cases
from qlora_jax.workflows.environment import environment

RESULTS = Path(__file__).parent / "results"
OPS = ("nf4_matmul", "dequantize", "lora_matmul", "cross_entropy", "attention")
# Heads x head_dim, and those of keys and values, at lengths of a training row.
ATTENTION = cases.cases("Llama-3.1-8B", {"attention": (4096, 1024)}, (512, 2048, 4096))
TINY_ATTENTION = cases.cases("tiny", {"attention": (64, 16)}, (200,))


def main(argv: list[str] | None = None) -> int:
    """Measures, prints one table, writes one JSON file."""
    args = arguments(argv)
    # Before JAX looks for devices: leave memory to bitsandbytes, and threads to the interpreter,
    # which blocks one of XLA's in each group of threads that waits.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if args.interpret:
        os.environ.setdefault("NPROC", "8")
        jax.config.update("jax_platforms", "cpu")
    with contextlib.ExitStack() as stack:
        if args.interpret:
            stack.enter_context(interpreter(args.interpret))
        target = gpu.here()
        if target is None:
            print(f"error: JAX sees a {jax.default_backend()} and no GPU.", file=sys.stderr)
            print("Try: --interpret h100, which needs none.", file=sys.stderr)
            return 2
        peer = None
        if args.bnb:
            try:
                peer = Bitsandbytes(args.bnb, double=not args.plain_scales)
            except PeerError as error:
                print(f"error: --bnb {args.bnb}: {error}", file=sys.stderr)
                return 2
            stack.enter_context(peer)
        found = {**described(target, args), "rows": [], "bars": []}
        if peer:
            found["versions"] |= peer.versions
        out = args.out or (None if args.interpret else RESULTS / file_name(found))
        for problem in problems(args):
            found["rows"] += measuring.measure(problem, target.gpu, args.repeat, args.calls, peer)
            found["bars"] = list(judged(found["rows"]))
            if out:  # after each, so that what was measured outlives what fails
                out.write_text(json.dumps(found, indent=1) + "\n")
    speed_table.show(found)
    if out:
        print(f"written to {out}")
    return int(any(row["outcome"] in ("wrong", "failed") for row in found["rows"]))


def problems(args: argparse.Namespace) -> Iterator[contenders.Problem]:
    """All that is to be measured, each made when its turn comes."""
    double = not args.plain_scales
    all_cases = cases.TINY if args.interpret else cases.CASES

    def wanted(case: cases.Case) -> bool:
        models, tokens = args.models, args.tokens
        return (not models or case.model in models) and (not tokens or case.m in tokens)

    products = [case for case in all_cases if wanted(case)]
    if "nf4_matmul" in args.ops:
        for case in products:
            for direction in ("forward", "backward"):
                yield contenders.nf4_matmul(case, direction, double=double)
    if "dequantize" in args.ops:
        for case in {case.shape: case for case in products}.values():
            yield contenders.dequantize(case, double=double)
    if "lora_matmul" in args.ops:
        for case in products:
            if case.m >= 64:  # training
                yield contenders.lora_matmul(case, double=double)
    if "cross_entropy" in args.ops:
        for case in head_cases.TINY if args.interpret else head_cases.CASES:
            if wanted(case):
                yield contenders.head_loss(case)
    if "attention" in args.ops:
        for case in TINY_ATTENTION if args.interpret else ATTENTION:
            if wanted(case):
                yield contenders.attention(case)


@contextlib.contextmanager
def interpreter(name: str) -> Iterator[None]:
    """Within it kernels are interpreted, by the tests' own interpreter with its checks."""
    from tests.pallas_kernels import interpreted, mma_on_cpu

    mma_on_cpu.install()
    with interpreted.interpreter(name, sms=2, seconds=3600):
        yield


def described(target: gpu.Target, args: argparse.Namespace) -> dict[str, Any]:
    """The machine, the versions, and how it was measured."""
    here, device = environment(), target.gpu
    versions = {"python": here["python"], **here["packages"]}
    if importlib.util.find_spec("qwix"):
        versions["qwix"] = importlib.metadata.version("qwix")
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "gpu": device.name,
        "interpreted": target.interpret,
        "bandwidth": device.bandwidth or None,
        "flops": device.flops or None,
        "driver": here["gpu"].get("driver"),
        "versions": versions,
        "double_quantized": not args.plain_scales,
        "repetitions": args.repeat,
        "how": "seconds: median of one call; low, high: quartiles; bytes: weight, x and y once",
    }


def file_name(found: dict[str, Any]) -> str:
    """`kernels-nvidia-h100-80gb-hbm3-2026-11-24.json`."""
    name = re.sub(r"[^a-z0-9]+", "-", found["gpu"].lower()).strip("-")
    return f"kernels-{name}-{found['date']}.json"


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--ops", type=names, default=OPS, help=f"of {','.join(OPS)}")
    parser.add_argument("--models", type=names, default=(), help="of cases.py: square,Llama-3.1-8B")
    parser.add_argument("--tokens", type=numbers, default=(), help="rows of x, 1,16: only these")
    parser.add_argument("--repeat", type=int, help="programs timed; 20, interpreted 1")
    parser.add_argument("--calls", type=int, help="weights that take turns in one program")
    parser.add_argument("--plain-scales", action="store_true", help="float32 scales")
    parser.add_argument("--bnb", metavar="COMMAND", help="a program that runs bitsandbytes")
    parser.add_argument(
        "--interpret", choices=gpu.KNOWN, help="tiny cases, as this GPU, on the CPU"
    )
    parser.add_argument("--out", type=Path, help="the JSON file; by default in results/")
    args = parser.parse_args(argv)
    if unknown := set(args.ops) - set(OPS):
        parser.error(f"--ops has {', '.join(unknown)}; the ops are {', '.join(OPS)}")
    models = dict.fromkeys(case.model for case in cases.CASES + cases.TINY)
    if unknown := set(args.models) - models.keys():
        parser.error(f"--models has {', '.join(unknown)}; the models are {', '.join(models)}")
    args.repeat = args.repeat or (1 if args.interpret else 20)
    args.calls = args.calls or (2 if args.interpret else None)
    return args


def names(text: str) -> tuple[str, ...]:
    """a,b."""
    return tuple(text.split(","))


def numbers(text: str) -> tuple[int, ...]:
    """1,16."""
    return tuple(int(part) for part in text.split(","))


if __name__ == "__main__":
    sys.exit(main())
