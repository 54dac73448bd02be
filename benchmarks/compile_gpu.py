"""Compiles every kernel for GPUs that are not there, and reads what came out.

    make compile-gpu                                  all of it, into benchmarks/results/
    python -m benchmarks.compile_gpu --subset         the cases that have a bar; nothing is written
    python -m benchmarks.compile_gpu --only hopper --gpu h100 --m 256     one kernel, in detail

Registers, spills, shared memory and instructions are the compiler's; times are paper (roofline.py).
Nothing is run. The exit code is 1 when a kernel misses a bar (bars.py).
"""

import argparse
import concurrent.futures
import importlib
import importlib.util
import itertools
import json
import math
import multiprocessing
import os
import sys
from pathlib import Path

import jax
import jax.numpy as jnp

from benchmarks import aot, bars, roofline, sass
from pallas_kernels.backends import Unsupported
from pallas_kernels.gpu import KNOWN, Gpu
from pallas_kernels.nf4_matmul.cases import CASES
from pallas_kernels.nf4_matmul.weight import Weight

RESULTS = Path(__file__).parent / "results" / "compiled.json"
WARPGROUP = 128  # threads
CHUNK = 8  # sizes that a process compiles


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--subset", action="store_true", help="only the cases that have a bar")
    parser.add_argument("--only", metavar="BACKEND", help="this backend alone, in detail")
    parser.add_argument("--gpu", choices=KNOWN, default="h100", help="with --only")
    for axis, default in (("m", 256), ("n", 4096), ("k", 4096)):
        parser.add_argument(f"--{axis}", type=int, default=default, help="with --only")
    args = parser.parse_args()
    if args.only:
        detail(args.only, args.gpu, args.m, args.n, args.k)
        return
    entries, failures = compile_all(subset_sizes() if args.subset else all_sizes())
    print(table(entries))
    failures += bars.missed(entries)
    if not args.subset:
        RESULTS.write_text(listed(entries))
    elif stale := changed(entries):
        print(f"\n{RESULTS} is older than the code; {len(stale)} entries differ:", *stale, sep="\n")
    if failures:
        print("\nFAILED", *failures, sep="\n", file=sys.stderr)
        sys.exit(1)


def all_sizes() -> list[tuple[int, int, int]]:
    """(m, n, k) of every case, those that models share once."""
    return list(dict.fromkeys((case.m, case.n, case.k) for case in CASES))


def subset_sizes() -> list[tuple[int, int, int]]:
    """(m, n, k) of what the bars ask for."""
    return [(m, bars.SQUARE, bars.SQUARE) for m in bars.RATIOS]


def module(backend: str):
    """A backend of nf4_matmul; None if there is none of that name."""
    path = f"pallas_kernels.nf4_matmul.{backend}"
    return importlib.import_module(path) if importlib.util.find_spec(path) else None


def shapes(m: int, n: int, k: int, direction: str):
    """(x or dy, W) as shapes."""
    like = jax.ShapeDtypeStruct
    scales = like((n * k // 64,), jnp.float32)
    weight = Weight(like((n, k // 2), jnp.uint8), scales, (n, k), "nf4", 64, "bnb")
    return like((m, k if direction == "forward" else n), jnp.bfloat16), weight


def compile_all(sizes: list[tuple[int, int, int]]) -> tuple[list[dict], list[str]]:
    """(entries of compiled.json, failures) of all backends, GPUs and directions."""
    groups = {}
    for gpu, target in KNOWN.items():
        groups.setdefault(target.capability, []).append(gpu)
    chunks = [sizes[i : i + CHUNK] for i in range(0, len(sizes), CHUNK)]
    tasks = list(itertools.product(chunks, groups.values()))
    entries, failures = [], []
    spawn = multiprocessing.get_context("spawn")
    # A process that has compiled for one capability gives the next one's kernels to the wrong
    # ptxas target (jax 0.12): each task has its own. GPUs of one share their machine code.
    with concurrent.futures.ProcessPoolExecutor(
        os.cpu_count(), mp_context=spawn, max_tasks_per_child=1
    ) as pool:
        for n, (new, wrong) in enumerate(pool.map(compile_task, tasks)):
            entries, failures = entries + new, failures + wrong
            print(f"{n + 1} of {len(tasks)} parts compiled", file=sys.stderr, flush=True)
    return sorted(entries, key=order), failures


def order(entry: dict) -> tuple:
    """Where an entry stands in compiled.json."""
    kernel, gpu = list(bars.BACKENDS).index(entry["kernel"]), list(KNOWN).index(entry["gpu"])
    return kernel, gpu, entry["n"], entry["k"], entry["m"], entry["direction"] == "backward"


def compile_task(task: tuple[list[tuple[int, int, int]], list[str]]) -> tuple[list, list]:
    """Some sizes for some GPUs of one capability: by all backends, forward and backward."""
    entries, failures = [], []
    for (m, n, k), backend, direction, gpu in itertools.product(
        task[0], bars.BACKENDS, ("forward", "backward"), task[1]
    ):
        entry = {"kernel": backend, "gpu": gpu, "direction": direction, "m": m, "n": n, "k": k}
        try:
            entries.append(entry | compile_case(entry))
        except Unsupported:
            continue
        except Exception as error:
            text = "\n".join(str(error).splitlines()[:4])
            failures.append(f"{bars.name(entry)}: {type(error).__name__}: {text}")
    return entries, failures


def compile_case(entry: dict) -> dict:
    """The figures of one entry; Unsupported if the backend does not take the case."""
    if (found := module(entry["kernel"])) is None:
        raise Unsupported("it is not written yet")
    direction, (m, n, k) = entry["direction"], (entry[axis] for axis in "mnk")
    target = KNOWN[entry["gpu"]]
    compiled = aot.kernels(target, getattr(found, direction), *shapes(m, n, k, direction))
    if len(compiled) != 1:
        raise ValueError(f"{len(compiled)} kernels were compiled, not 1")
    if compiled[0].serialized:
        raise ValueError("ptxas serializes wgmma")
    return figures(target, compiled[0], direction, m, n, k)


def figures(gpu: Gpu, kernel: aot.Kernel, direction: str, m: int, n: int, k: int) -> dict:
    """The rest of an entry."""
    code = code_of(gpu, kernel)
    if direction == "backward":  # contracts along n
        n, k = k, n
    bound = roofline.bound(gpu, code, m, n, k)
    return {
        "registers": kernel.registers,
        "spill_bytes": kernel.spill_bytes,
        "shared_bytes": kernel.shared_bytes,
        "instructions_per_weight": round(code.instructions, 2),
        "roofline_us": round(bound.seconds * 1e6, 2),
        "ideal_bf16_us": round(roofline.ideal_bf16(gpu, m, n, k) * 1e6, 2),
    }


def code_of(gpu: Gpu, kernel: aot.Kernel) -> roofline.Code:
    """The compiled kernel, as the roofline wants it."""
    if (loop := sass.main_loop(kernel.sass)) is None:
        raise ValueError("no loop of the machine code decodes weights by decode.py's permutes")
    # A kernel that moves registers between warpgroups has one that copies and decodes nothing.
    decoding = kernel.threads - (WARPGROUP if "USETMAXREG" in kernel.sass else 0)
    # Rows: tcgen05 holds a tile in tensor memory, a column a row of x; others' products tell.
    rows = kernel.tmem_columns or roofline.ceil(loop.multiply_adds, 256 * loop.weights) * 8
    *sides, dtype = kernel.result.split("x")
    return roofline.Code(
        instructions=len(loop.instructions) / loop.weights,
        half_rate=loop.half_rate / loop.weights,
        weights=decoding * loop.weights,
        rows=rows,
        blocks=kernel.blocks,
        resident=roofline.resident_blocks(
            gpu, kernel.registers, kernel.threads, kernel.shared_bytes
        ),
        partial_bytes=4 * math.prod(map(int, sides)) if dtype == "f32" else 0,
    )


def table(entries: list[dict]) -> str:
    """The entries as text, a line each, with the time against bf16."""
    head = f"{'kernel':10}{'gpu':9}{'direction':10}{'m':>5}{'n':>6}{'k':>6}{'regs':>6}{'spills':>7}"
    head += f"{'shared':>8}{'instr/w':>8}{'roofline us':>12}{'bf16 us':>9}{'ratio':>7}"
    lines = ["Compiled, not run; times are paper.", head]
    for e in entries:
        ratio = e["roofline_us"] / e["ideal_bf16_us"]
        lines.append(
            f"{e['kernel']:10}{e['gpu']:9}{e['direction']:10}{e['m']:5}{e['n']:6}{e['k']:6}"
            f"{e['registers']:6}{e['spill_bytes']:7}{e['shared_bytes']:8}"
            f"{e['instructions_per_weight']:8.2f}{e['roofline_us']:12.2f}"
            f"{e['ideal_bf16_us']:9.2f}{ratio:7.2f}"
        )
    return "\n".join(lines)


def listed(entries: list[dict]) -> str:
    """JSON, an entry a line."""
    return "[\n" + ",\n".join(json.dumps(entry) for entry in entries) + "\n]\n"


def changed(entries: list[dict]) -> list[str]:
    """Names of entries that compiled.json lacks or has with other figures."""
    recorded = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    return [bars.name(entry) for entry in entries if entry not in recorded]


def detail(backend: str, gpu: str, m: int, n: int, k: int) -> None:
    """Prints all that is known of one backend's kernels."""
    if (found := module(backend)) is None:
        sys.exit(f"there is no backend {backend}; there are {', '.join(bars.BACKENDS)}")
    target = KNOWN[gpu]
    for direction in ("forward", "backward"):
        print(f"{backend} {gpu} {direction} M={m} N={n} K={k}: ", end="")
        try:
            compiled = aot.kernels(target, getattr(found, direction), *shapes(m, n, k, direction))
        except Unsupported as reason:
            print(f"not taken: {reason}")
            continue
        for kernel in compiled:
            print(
                f"{kernel.registers} registers, {kernel.spill_bytes} bytes spilled, "
                f"{kernel.shared_bytes} of {target.shared_bytes} bytes shared, {kernel.blocks} "
                f"blocks of {kernel.threads} threads -> {kernel.result}"
                + (", wgmma SERIALIZED" if kernel.serialized else "")
            )
            show_loops(kernel)
            show_roofline(target, kernel, *((m, n, k) if direction == "forward" else (m, k, n)))


def show_loops(kernel: aot.Kernel) -> None:
    """Every loop that decodes or multiplies; the others are for copies and waiting."""
    found, main = sass.loops(kernel.sass), sass.main_loop(kernel.sass)
    if main and main not in found:
        print("  the main loop is unrolled whole")
        found.append(main)
    for loop in found:
        if not (loop.weights or loop.matrix):
            continue
        of = "main loop" if loop == main else "loop"
        print(f"  {of}: {len(loop.instructions)} instructions, {loop.matrix} matrix", end="")
        if weights := loop.weights:
            print(
                f", {weights} weights a thread: {len(loop.instructions) / weights:.2f} a weight, "
                f"{loop.half_rate / weights:.2f} at half rate",
                end="",
            )
        print("\n   ", *(f"{name} {count}" for name, count in loop.counts.most_common()))


def show_roofline(gpu: Gpu, kernel: aot.Kernel, m: int, n: int, k: int) -> None:
    code = code_of(gpu, kernel)
    bound = roofline.bound(gpu, code, m, n, k)
    ideal = roofline.ideal_bf16(gpu, m, n, k)
    parts = vars(bound).items()
    print(
        f"  paper: {bound.seconds * 1e6:.2f} us, {bound.seconds / ideal:.2f} of ideal bf16 (",
        ", ".join(f"{part} {seconds * 1e6:.2f}" for part, seconds in parts),
        f"); tile of {code.rows} rows, {code.weights} weights a step, {code.resident} resident",
        sep="",
    )


if __name__ == "__main__":
    main()
