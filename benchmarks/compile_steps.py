"""Compiles whole training steps for GPUs that are not there, and reads how much memory they take.

    make compile-gpu                                  every GPU, into benchmarks/results/
    python -m benchmarks.compile_steps --subset       the GPU that has a bar; nothing is written

The model is known by shape alone: no weight exists. A step is the gradients of one micro batch
(train/step.py), which is where the memory goes; the optimizer's update is a page at a time. The
exit code is 1 when the step takes more temporary memory than it may, holds a dense weight that is
larger than one layer's largest matrix, or when one of its kernels spills.
"""

import argparse
import concurrent.futures
import itertools
import json
import math
import multiprocessing
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp

from benchmarks import aot, bars
from pallas_kernels.gpu import KNOWN
from qlora_jax.adapters.init import init_lora
from qlora_jax.models.config import ModelConfig
from qlora_jax.models.decoder import Decoder
from qlora_jax.models.families import linear_shapes, weight_shapes
from qlora_jax.quantization.policy import QuantizationConfig
from qlora_jax.quantization.tensor import quantize
from qlora_jax.train.step import gradients
from qlora_jax.weight_names import LAYERS

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "compiled_steps.json"
MODELS = {"Llama-3.1-8B": ROOT / "configs" / "shapes" / "llama3.1-8b" / "config.json"}
RANK = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--subset", action="store_true", help="only GPUs that have a bar")
    parser.add_argument("--gpu", choices=KNOWN, help="this GPU alone; nothing is written")
    parser.add_argument("--seq-len", type=int, default=2048, help="tokens of the one row")
    parser.add_argument("--buffers", type=int, default=0, help="print the largest temporaries")
    args = parser.parse_args()
    gpus = [args.gpu] if args.gpu else list(bars.STEP_TEMPORARIES if args.subset else KNOWN)
    tasks = [(gpu, name, args.seq_len, args.buffers) for gpu in gpus for name in MODELS]
    spawn = multiprocessing.get_context("spawn")
    # A process of its own for each GPU, as in compile_gpu; it takes 1 GB.
    with concurrent.futures.ProcessPoolExecutor(2, mp_context=spawn, max_tasks_per_child=1) as pool:
        entries, failures = zip(*pool.map(compile_step, tasks), strict=True)
    print("Compiled, not run; bytes of the gradients of one micro batch.")
    for entry in entries:
        sizes = ", ".join(f"{key} {entry[key] / 1e9:.3f} GB" for key in SIZES)
        print(f"{entry['gpu']:8} {entry['model']} at {entry['seq_len']} tokens: {sizes}")
    if not (args.subset or args.gpu):
        RESULTS.write_text("[\n" + ",\n".join(map(json.dumps, entries)) + "\n]\n")
    if failures := [*itertools.chain(*failures), *bars.missed_by_steps(entries)]:
        print("\nFAILED", *failures, sep="\n", file=sys.stderr)
        sys.exit(1)


SIZES = ("argument_bytes", "temp_bytes", "host_bytes")


def compile_step(task: tuple[str, str, int, int]) -> tuple[dict, list[str]]:
    """(entry of compiled_steps.json, failures) of one GPU, model and number of tokens."""
    gpu, name, length, buffers = task
    aot.load_plugin()  # before the model's code asks jax for its devices
    config = ModelConfig.from_dict(json.loads(MODELS[name].read_text()), str(MODELS[name]))
    model = jax.eval_shape(lambda: empty_model(config))
    spec, params = adapter_shapes(model)
    ids = jax.ShapeDtypeStruct((1, length), jnp.int32)
    batch = dict.fromkeys(("input_ids", "labels", "positions", "segment_ids"), ids)

    def step(params, model, batch):
        return gradients(params, model, batch, spec=spec, remat="full")

    with aot.dumped() as folder:
        compiled = aot.lower(KNOWN[gpu], step, params, model, batch).compile()
        kernels = aot.dumps(folder, ".ptxas")
        spills = [size for path in kernels if (size := aot.spilled(path.read_text()))]
    memory = compiled.memory_analysis()
    entry = {
        "gpu": gpu,
        "model": name,
        "seq_len": length,
        "argument_bytes": memory.argument_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "host_bytes": memory.host_argument_size_in_bytes + memory.host_temp_size_in_bytes,
    }
    text = compiled.as_text()
    print(*largest_results(text, buffers), sep="\n", end="\n" if buffers else "")
    failures = [f"{gpu}: a kernel of the step spills {size} bytes" for size in spills]
    failures += [f"{gpu}: {line}" for line in dense_copies(text, config)]
    if not kernels:
        failures.append(f"{gpu}: no kernel of ours is in the step")
    return entry, failures


def empty_model(config: ModelConfig) -> Decoder:
    """The decoder, NF4 and double-quantized, out of zeros; for jax.eval_shape alone."""
    how, weights = QuantizationConfig(), {}
    for name, shape in weight_shapes(config).items():
        lead = (config.num_hidden_layers,) if name.startswith(LAYERS) else ()
        weight = jnp.zeros((*lead, *shape), jnp.bfloat16)
        weights[name] = jax.vmap(quantize)(weight) if how.covers(name) else weight
    return Decoder.from_weights(config, weights)


def adapter_shapes(model: Decoder):
    """(spec, params as shapes) of an adapter on all linears."""
    found = []

    def params():
        lora = init_lora(model, key=jax.random.key(0), r=RANK, alpha=RANK)
        found.append(lora.spec)
        return lora.params

    shapes = jax.eval_shape(params)
    return found[0], shapes


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


def dense_copies(hlo: str, config: ModelConfig) -> list[str]:
    """Each array of a weight's shape, of one layer or of several, that is too large to be there.

    The most that a step may hold dense is one layer's largest matrix.
    """
    largest = max(math.prod(shape) for shape in linear_shapes(config).values())
    matrices = {tuple(sorted(s)) for s in weight_shapes(config).values() if len(s) == 2}
    layers = {config.num_hidden_layers * math.prod(shape) for shape in matrices}
    return [
        f"the step holds {dtype}{list(shape)}, a dense weight larger than a layer's largest"
        for dtype, shape in sorted(set(results(hlo)))
        if dtype in ("bf16", "f16", "f32") and math.prod(shape) > largest
        if tuple(sorted(shape[-2:])) in matrices or math.prod(shape) in layers
    ]


def largest_results(hlo: str, count: int) -> list[str]:
    """Lines that name the largest arrays of a program."""
    sized = {(BYTES.get(d, 4) * math.prod(s), f"{d}{list(s)}") for d, s in results(hlo)}
    return [f"{size / 1e6:10.1f} MB  {shape}" for size, shape in sorted(sized)[: -count - 1 : -1]]


if __name__ == "__main__":
    main()
