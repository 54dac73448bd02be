"""Compiles whole training steps for GPUs that are not there, and reads how much memory they take.

    make compile-gpu                                  every case, into benchmarks/results/
    python -m benchmarks.compile_steps --subset       the cases that have a bar; nothing is written
    python -m benchmarks.compile_steps --model Llama-3-70B --gpu rtx4090 --seq-len 4096
        --stream-weights on --remat offload --buffers 20        one case, its largest arrays
    python -m benchmarks.compile_steps --markdown     the table of what was compiled before

The model is known by shape alone: no weight exists. A step is the gradients of one micro batch
(train/step.py), compiled, and AdamW's update, whose state is in host memory, added as the planner
adds it (qlora_jax/memory/estimate.py).
The exit code is 1 when a case takes more memory than its bar, when a program holds a dense weight
that is larger than one layer's largest matrix, when streamed layers do not come over while others
compute (host_copies.py), or when one of its kernels spills.
"""

import argparse
import concurrent.futures
import dataclasses
import itertools
import json
import math
import multiprocessing
import re
import sys
from pathlib import Path

from benchmarks import bars, host_copies, mosaic, step_table
from pallas_kernels.gpu import KNOWN
from qlora_jax.memory import aot
from qlora_jax.memory.budget import of_absent
from qlora_jax.memory.choices import Choices
from qlora_jax.memory.compiled import compiled_gradients, with_sizes
from qlora_jax.memory.estimate import Estimator
from qlora_jax.memory.planner import micro_of
from qlora_jax.memory.program import Micro
from qlora_jax.memory.shapes import nbytes
from qlora_jax.models.config import ModelConfig
from qlora_jax.models.families import linear_shapes, weight_shapes
from qlora_jax.train.config import TrainConfig
from qlora_jax.weight_names import LAYERS

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "compiled_steps.json"
SHAPES = {"Llama-3.1-8B": "llama3.1-8b", "Llama-3-70B": "llama3-70b"}
MODELS = {name: ROOT / "configs/shapes" / folder / "config.json" for name, folder in SHAPES.items()}
RANK = 16


@dataclasses.dataclass(frozen=True)
class Case:
    """One row of `length` tokens, r = 16 on all linears, and where things live."""

    gpu: str
    model: str
    length: int
    stream_weights: str = "off"
    remat: str = "full"


PLACEMENTS = ("off", "full"), ("on", "full"), ("on", "offload"), ("all", "offload")


def all_cases() -> list[Case]:
    """What the table shows: all placements on one GPU, and on the others what they are for."""
    sizes = ("Llama-3.1-8B", (512, 2048, 4096)), ("Llama-3-70B", (1024, 4096))
    cases = [
        Case("rtx4090", model, length, *placement)
        for model, lengths in sizes
        for length in lengths
        for placement in PLACEMENTS
    ]
    others = [gpu for gpu in KNOWN if gpu != "rtx4090"]
    for gpu in others:
        cases += [Case(gpu, "Llama-3.1-8B", 2048), Case(gpu, "Llama-3-70B", 4096)]
    return cases


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--subset", action="store_true", help="only cases that have a bar")
    parser.add_argument("--markdown", action="store_true", help="compile nothing, print the table")
    parser.add_argument("--model", choices=MODELS, help="one case; nothing is written")
    parser.add_argument("--gpu", choices=KNOWN, default="rtx4090", help="with --model")
    parser.add_argument("--seq-len", type=int, default=2048, help="with --model")
    parser.add_argument("--stream-weights", default="off", help="with --model")
    parser.add_argument("--remat", default="full", help="with --model")
    parser.add_argument("--buffers", type=int, default=0, help="print the largest temporaries")
    args = parser.parse_args()
    if args.markdown:
        print(step_table.markdown(json.loads(RESULTS.read_text())))
        return
    cases = [
        case for case in all_cases() if not args.subset or bars.of_step(*dataclasses.astuple(case))
    ]
    if args.model:
        where = args.stream_weights, args.remat
        cases = [Case(args.gpu, args.model, args.seq_len, *where)]
    entries, failures = compile_all(cases, args.buffers)
    print("Compiled, not run: a step's peak, AdamW's state in host memory.")
    print(*map(step_table.line, entries), sep="\n")
    if not (args.subset or args.model):
        RESULTS.write_text("[\n" + ",\n".join(map(json.dumps, entries)) + "\n]\n")
    if failures := [*failures, *bars.missed_by_steps(entries)]:
        print("\nFAILED", *failures, sep="\n", file=sys.stderr)
        sys.exit(1)


def compile_all(cases: list[Case], buffers: int) -> tuple[list[dict], list[str]]:
    """(entries of compiled_steps.json, failures); a process for each case, as in compile_gpu."""
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(2, mp_context=spawn, max_tasks_per_child=1) as pool:
        found = pool.map(compile_step, cases, itertools.repeat(buffers))
        entries, failures = zip(*found, strict=True)
    return list(entries), list(itertools.chain(*failures))


def compile_step(case: Case, buffers: int) -> tuple[dict, list[str]]:
    """(entry of compiled_steps.json, failures) of one case."""
    aot.load_plugin()  # before the model's code asks jax for its devices
    estimator, choices = planned(case)
    micro = estimator.micro
    with mosaic.dumped() as folder:
        compiled = compiled_gradients(micro, case.stream_weights, case.remat)
        kernels = mosaic.dumps(folder, ".ptxas")
        spills = [size for path in kernels if (size := mosaic.spilled(path.read_text()))]
    sizes = aot.sizes(compiled)
    estimate = with_sizes(estimator.estimate(choices), micro, sizes)
    entry = {
        "gpu": case.gpu,
        "model": case.model,
        "seq_len": case.length,
        "stream_weights": case.stream_weights,
        "remat": case.remat,
        "device_bytes": estimate.device_bytes,
        "host_bytes": estimate.pinned_bytes,
        "argument_bytes": sizes.argument,
        "output_bytes": sizes.output,
        "temp_bytes": sizes.temp,
    }
    text = compiled.as_text()
    print(*largest_results(text, buffers), sep="\n", end="\n" if buffers else "")
    name = bars.step_name(entry)
    failures = [f"{name}: a kernel of the step spills {size} bytes" for size in spills]
    failures += [f"{name}: {line}" for line in dense_copies(text, micro)]
    if case.stream_weights != "off":
        failures += [f"{name}: {line}" for line in streamed_wrongly(name, text, estimator)]
    if not kernels:
        failures.append(f"{name}: no kernel of ours is in the step")
    return entry, failures


def streamed_wrongly(name: str, text: str, estimator: Estimator) -> list[str]:
    """Why layers do not come from host memory while others compute; prints how they come."""
    layers = estimator.micro.shape.num_hidden_layers
    stacked = [weight for key, weight in estimator.model.items() if key.startswith(LAYERS)]
    found = host_copies.bodies(text)
    print(f"{name}:", *host_copies.report(found, layers), sep="\n  ", flush=True)
    return host_copies.faults(found, layers, nbytes(stacked) // layers)


def planned(case: Case) -> tuple[Estimator, Choices]:
    """The case as the planner sees it, the optimizer's state in host memory."""
    path = MODELS[case.model]
    shape = ModelConfig.from_dict(json.loads(path.read_text()), str(path))
    config = TrainConfig(
        lora_r=RANK, batch_size=1, gradient_accumulation_steps=1, max_seq_length=case.length
    )
    micro = micro_of(shape, config, of_absent(case.gpu))
    return Estimator(micro, config), Choices(case.stream_weights, case.remat, "host")


COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*?\{\n(.*?)^\}", re.M | re.S)
RESULT = re.compile(r"^\s*(?:ROOT )?%[\w.-]+ = (\w+)\[([\d,]+)\]\S* ([\w-]+)\(", re.M)
FUSED = re.compile(r" fusion\(.*calls=%([\w.-]+)")
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "u16": 2, "s32": 4, "u32": 4, "f32": 4}
# Names for what is in memory already.
NO_MEMORY = ("parameter", "get-tuple-element", "bitcast", "constant")


def results(hlo: str) -> list[tuple[str, tuple[int, ...]]]:
    """(dtype, shape) of every array that a compiled program writes to memory."""
    fused = set(FUSED.findall(hlo))
    found = []
    for name, body in COMPUTATION.findall(hlo):
        if name in fused:  # its values live in registers
            continue
        for dtype, sides, operation in RESULT.findall(body):
            if operation not in NO_MEMORY:
                found.append((dtype, tuple(map(int, sides.split(",")))))
    return found


def dense_copies(hlo: str, micro: Micro) -> list[str]:
    """Each array of a weight's shape, of one layer or of several, that is too large to be there.

    The most that a step may hold dense is one layer's largest matrix. The layers' inputs, which are
    kept for the backward pass, can have the shape of a stack of weights.
    """
    shape, inputs = micro.shape, (micro.rows, micro.length, micro.shape.hidden_size)
    largest = max(math.prod(sides) for sides in linear_shapes(shape).values())
    matrices = {tuple(sorted(s)) for s in weight_shapes(shape).values() if len(s) == 2}
    layers = {shape.num_hidden_layers * math.prod(sides) for sides in matrices}
    return [
        f"the step holds {dtype}{list(sides)}, a dense weight larger than a layer's largest"
        for dtype, sides in sorted(set(results(hlo)))
        if dtype in ("bf16", "f16", "f32") and math.prod(sides) > largest
        if sides != (shape.num_hidden_layers, *inputs)
        if tuple(sorted(sides[-2:])) in matrices or math.prod(sides) in layers
    ]


def largest_results(hlo: str, count: int) -> list[str]:
    """Lines that name the largest arrays of a program."""
    sized = {(BYTES.get(d, 4) * math.prod(s), f"{d}{list(s)}") for d, s in results(hlo)}
    return [f"{size / 1e6:10.1f} MB  {shape}" for size, shape in sorted(sized)[: -count - 1 : -1]]


if __name__ == "__main__":
    main()
