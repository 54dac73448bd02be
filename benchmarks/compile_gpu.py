"""Compiles every kernel for GPUs that are not there, and reads what came out.

    make compile-gpu                                  all of it, into benchmarks/results/
    python -m benchmarks.compile_gpu --subset         the cases that have a bar; nothing is written
    python -m benchmarks.compile_gpu --only hopper --gpu h100 --m 256     one kernel, in detail

Registers, spills, shared memory and instructions are the compiler's; times are paper (roofline.py).
Nothing is run. The exit code is 1 when a kernel misses a bar (bars.py).
"""

import argparse
import concurrent.futures
import functools
import itertools
import json
import math
import multiprocessing
import os
import sys
from pathlib import Path

import jax
import jax.numpy as jnp

from benchmarks import bars, mosaic, roofline, sass
from pallas_kernels.backends import Unsupported
from pallas_kernels.dequantize import mosaic as dequantize
from pallas_kernels.gpu import KNOWN, Gpu
from pallas_kernels.nf4_matmul.api import GPU_BACKENDS
from pallas_kernels.nf4_matmul.cases import CASES
from pallas_kernels.nf4_matmul.weight import Weight

RESULTS = Path(__file__).parent / "results" / "compiled.json"
WARPGROUP = 128  # threads
CHUNK = 8  # sizes that a process compiles


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--subset", action="store_true", help="only the cases that have a bar")
    parser.add_argument("--only", choices=bars.BACKENDS, help="this backend alone, in detail")
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


Size = tuple[int | None, int, int]  # (m, n, k); m is None where a matrix is dequantized alone


def all_sizes() -> list[Size]:
    """Of every case, those that models share once."""
    products = [(case.m, case.n, case.k) for case in CASES]
    return list(dict.fromkeys([*products, *((None, n, k) for _, n, k in products)]))


def subset_sizes() -> list[Size]:
    """Of what the bars ask for."""
    return [(m, bars.SQUARE, bars.SQUARE) for m in (*bars.RATIOS, None)]


def shapes(m: int, n: int, k: int, direction: str):
    """(x or dy, W) as shapes."""
    like = jax.ShapeDtypeStruct
    scales = like((n * k // 64,), jnp.float32)
    weight = Weight(like((n, k // 2), jnp.uint8), scales, (n, k), "nf4", 64, "bnb")
    return like((m, k if direction == "forward" else n), jnp.bfloat16), weight


def compile_all(sizes: list[Size]) -> tuple[list[dict], list[str]]:
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
    kernels = (*bars.BACKENDS, "dequantize")
    place = kernels.index(entry["kernel"]), list(KNOWN).index(entry["gpu"])
    return *place, entry["n"], entry["k"], entry["m"] or 0, entry["direction"] == "backward"


def compile_task(task: tuple[list[Size], list[str]]) -> tuple[list, list]:
    """Some sizes for some GPUs of one capability."""
    entries, failures = [], []
    for size, gpu in itertools.product(*task):
        new, wrong = compile_size(gpu, size)
        entries, failures = entries + new, failures + wrong
    return entries, failures


def compile_size(gpu: str, size: Size) -> tuple[list, list]:
    """One size for one GPU: by all backends, forward and backward."""
    entries, failures = [], []
    kernels = [("dequantize", None)]
    if size[0] is not None:
        kernels = itertools.product(bars.BACKENDS, ("forward", "backward"))
    for kernel, direction in kernels:
        entry = {"kernel": kernel, "gpu": gpu, "direction": direction}
        entry |= dict(zip("mnk", size, strict=True))
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
    direction, target = entry["direction"], KNOWN[entry["gpu"]]
    size = [entry[axis] for axis in "mnk"]
    if direction is None:
        compiled = mosaic.kernels(target, *dequantized(*size[1:]))
    else:
        function = getattr(GPU_BACKENDS[entry["kernel"]], direction)
        compiled = mosaic.kernels(target, function, *shapes(*size, direction))
    if len(compiled) != 1:
        raise ValueError(f"{len(compiled)} kernels were compiled, not 1")
    if compiled[0].serialized:
        raise ValueError("ptxas serializes wgmma")
    return figures(target, compiled[0], direction, *size)


def dequantized(n: int, k: int):
    """(function, shapes) of a matrix (n, k), to bfloat16."""
    static = {"shape": (n, k), "kind": "nf4", "block_size": 64, "dtype": jnp.bfloat16}
    like = jax.ShapeDtypeStruct
    arrays = like((n * k // 2,), jnp.uint8), like((n * k // 64,), jnp.float32)
    return functools.partial(dequantize.dequantize_4bit, **static), *arrays


def figures(
    gpu: Gpu, kernel: mosaic.Kernel, direction: str | None, m: int | None, n: int, k: int
) -> dict:
    """The rest of an entry."""
    ideal = None
    if direction is None:
        weights = n * k / (kernel.blocks * kernel.threads)  # of a thread; there is no loop
        instructions = len(sass.parse(kernel.sass)[0]) / weights
        seconds = roofline.dequantize(gpu, instructions, n, k)
    else:
        if direction == "backward":  # contracts along n
            n, k = k, n
        code = code_of(gpu, kernel)
        instructions = code.instructions
        seconds = roofline.bound(gpu, code, m, n, k).seconds
        ideal = round(roofline.ideal_bf16(gpu, m, n, k) * 1e6, 2)
    return {
        "registers": kernel.registers,
        "spill_bytes": kernel.spill_bytes,
        "shared_bytes": kernel.shared_bytes,
        "instructions_per_weight": round(instructions, 2),
        "roofline_us": round(seconds * 1e6, 2),
        "ideal_bf16_us": ideal,
    }


def code_of(gpu: Gpu, kernel: mosaic.Kernel) -> roofline.Code:
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
        warp_mma="HMMA" in loop.counts,
        partial_bytes=4 * math.prod(map(int, sides)) if dtype == "f32" else 0,
    )


def table(entries: list[dict]) -> str:
    """The entries as text, a line each, with the time against bf16."""
    titles = ("kernel", "gpu", "direction", "m", "n", "k", "regs", "spills", "shared", "instr/w")
    rows = [(*titles, "paper us", "bf16 us", "ratio")]
    for entry in entries:
        ratio = entry["ideal_bf16_us"] and entry["roofline_us"] / entry["ideal_bf16_us"]
        rows.append([*entry.values(), ratio])
    lines = []
    for row in rows:
        cells = [
            f"{cell:.2f}" if isinstance(cell, float) else str("" if cell is None else cell)
            for cell in row
        ]
        lines.append("".join(f"{c:11}" for c in cells[:3]) + "".join(f"{c:>9}" for c in cells[3:]))
    return "\n".join(["Compiled, not run; times are paper.", *lines])


def listed(entries: list[dict]) -> str:
    """JSON, an entry a line."""
    return "[\n" + ",\n".join(json.dumps(entry) for entry in entries) + "\n]\n"


def changed(entries: list[dict]) -> list[str]:
    """Names of entries that compiled.json lacks or has with other figures."""
    recorded = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    return [bars.name(entry) for entry in entries if entry not in recorded]


def detail(backend: str, gpu: str, m: int, n: int, k: int) -> None:
    """Prints all that is known of one backend's kernels."""
    found, target = GPU_BACKENDS[backend], KNOWN[gpu]
    for direction in ("forward", "backward"):
        print(f"{backend} {gpu} {direction} M={m} N={n} K={k}: ", end="")
        try:
            compiled = mosaic.kernels(
                target, getattr(found, direction), *shapes(m, n, k, direction)
            )
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


def show_loops(kernel: mosaic.Kernel) -> None:
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


def show_roofline(gpu: Gpu, kernel: mosaic.Kernel, m: int, n: int, k: int) -> None:
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
