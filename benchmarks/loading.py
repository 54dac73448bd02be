"""Measures quantizing a model, loading it, and opening its 4-bit checkpoint: memory and time.

    python -m benchmarks.loading --json                a random model of 1.2 billion weights
    python -m benchmarks.loading --json --model PATH   a folder or a .gguf file
    python -m benchmarks.loading --json --bnb COMMAND  beside bitsandbytes; see peers.py
    python -m benchmarks.loading --record ...          and writes results/loading.json

Each measurement has a process of its own; the last line is one line of JSON:

    seconds, baseline_rss_bytes, peak_rss_bytes   of `qlora-jax quantize`, folder to folder; the
                                                  baseline is the peak after imports and a warm-up
    load                                          the same of loading and quantizing into memory
    open_seconds                                  of opening the 4-bit folder, imports not counted
    quantize                                      weights a second of quantizing one layer's linears
                                                  alone, in turn with bitsandbytes if asked for
    conversion_over_bitsandbytes                  weights quantized a second by the whole of
                                                  `seconds` (reading, writing, verifying), over
                                                  bitsandbytes' quantizing alone
"""

import argparse
import importlib
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

if not __package__:  # run as a file
    sys.path.insert(0, str(Path(__file__).parent.parent))

RESULTS = Path(__file__).parent / "results" / "loading.json"
SPARE = 100_000_000  # bytes allowed beyond two of the largest tensors
OPENS = 3  # the median is told
ROUNDS = 5  # of ours and bitsandbytes in turn
RANDOM = "Llama-3.2-1B"  # 1.24 billion weights, the embedding 21% of them


def main() -> None:
    """Runs all measurements and prints them."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, help="a Hugging Face folder or a .gguf file")
    parser.add_argument("--json", action="store_true", help="print one line of JSON, the last")
    parser.add_argument("--bnb", metavar="COMMAND", help="a program that runs bitsandbytes")
    parser.add_argument("--record", action="store_true", help="write results/loading.json")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        print(json.dumps(PARTS[args.part](args)))
        return
    with tempfile.TemporaryDirectory() as folder:
        args.out = Path(folder) / "nf4"
        if not args.model:
            args.model = Path(folder) / "random"
            child("random", args)
        result = child("convert", args)
        result["load"] = child("load", args)
        result["open_seconds"] = sorted(child("open", args) for _ in range(OPENS))[OPENS // 2]
        result["quantize"] = child("quantize", args)
    if args.bnb:
        rate = result["quantized_weights"] / result["seconds"]
        result["conversion_over_bitsandbytes"] = rate / result["quantize"]["bitsandbytes"]
    if args.record:
        from benchmarks.machine import described

        found = {**described(), "model": args.model.name, **result}
        RESULTS.write_text(json.dumps(found, indent=2) + "\n")
    if args.json:
        print(json.dumps(result))
    else:
        print(json.dumps(result, indent=2))


def child(part: str, args: argparse.Namespace) -> Any:
    """One part in a fresh process."""
    command = [sys.executable, __file__, "--part", part, "--model", args.model, "--out", args.out]
    if args.bnb:
        command += ["--bnb", args.bnb]
    done = subprocess.run(list(map(str, command)), check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def write_random(args: argparse.Namespace) -> None:
    """A random bfloat16 model."""
    from benchmarks import random_model

    random_model.write(random_model.SHAPES[RANDOM], args.model)


def convert(args: argparse.Namespace) -> dict[str, Any]:
    """Folder to folder: its time and memory, and how large things are."""
    from qlora_jax.quantization.policy import QuantizationConfig
    from qlora_jax.workflows.convert import quantize_checkpoint
    from qlora_jax.workflows.open import open_source

    covers = QuantizationConfig().covers
    with open_source(args.model) as source:
        counts = {name: math.prod(source.shape(name)) for name in source.names()}
        largest = max(n * item_bytes(source.dtype(name)) for name, n in counts.items())
    result = measured(lambda: quantize_checkpoint(args.model, args.out), 2 * largest + SPARE)
    packed = sum(path.stat().st_size for path in args.out.glob("*.safetensors"))
    return {
        "weights": sum(counts.values()),
        "quantized_weights": sum(count for name, count in counts.items() if covers(name)),
        **result,
        "packed_bytes": packed,
        "largest_tensor_bytes": largest,
    }


def load(args: argparse.Namespace) -> dict[str, Any]:
    """Into memory: its time and memory; the packed weights stay."""
    from qlora_jax.quantization.policy import QuantizationConfig
    from qlora_jax.workflows.open import load_model, open_source

    kept = []
    with open_source(args.model) as source:
        sizes = [math.prod(source.shape(n)) * item_bytes(source.dtype(n)) for n in source.names()]
        result = measured(
            lambda: kept.append(load_model(source, quantization=QuantizationConfig())),
            2 * max(sizes) + SPARE,
        )
    packed = sum(weight.nbytes for weight in kept[0].weights().values())
    result["allowed_rss_bytes"] += packed
    return {**result, "packed_bytes": packed}


def measured(work: Callable[[], Any], allowed: int) -> dict[str, Any]:
    """Seconds and peak memory of `work`, after a small matrix was quantized."""
    import numpy as np

    from qlora_jax.quantization.in_pieces import quantize_in_pieces

    quantize_in_pieces(np.random.default_rng(0).standard_normal((64, 64), np.float32))
    baseline, started = peak_rss(), time.perf_counter()
    work()
    seconds, peak = time.perf_counter() - started, peak_rss()
    return {
        "seconds": seconds,
        "baseline_rss_bytes": baseline,
        "peak_rss_bytes": peak,
        "grown_rss_bytes": peak - baseline,
        "allowed_rss_bytes": allowed,
    }


def open_checkpoint(args: argparse.Namespace) -> float:
    """Seconds from the call to arrays that are ready; with the tokenizer, where there is one."""
    import jax

    import qlora_jax as ql
    from qlora_jax.workflows.open import load_model, open_source

    os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"
    importlib.import_module("transformers").PreTrainedTokenizerFast  # noqa: B018 (imports it)
    jax.block_until_ready(jax.numpy.zeros(1))
    load = ql.load
    started = time.perf_counter()
    if (args.out / "tokenizer.json").exists():
        opened, _ = load(args.out)
    else:
        with open_source(args.out) as source:
            opened = load_model(source, quantization=None)
    jax.block_until_ready(list(opened.weights().values()))
    return time.perf_counter() - started


def quantize(args: argparse.Namespace) -> dict[str, Any]:
    """Weights a second of quantizing the linears of layer 0, of arrays in memory."""
    import numpy as np

    from benchmarks.peers import Bitsandbytes
    from benchmarks.timing import in_turn
    from qlora_jax.quantization.in_pieces import quantize_in_pieces
    from qlora_jax.quantization.policy import QuantizationConfig
    from qlora_jax.workflows.open import open_source

    covers = QuantizationConfig().covers
    with open_source(args.model) as source:
        names = [n for n in source.names() if n.startswith("model.layers.0.") and covers(n)]
        arrays = [np.ascontiguousarray(source.read(name)) for name in names]

    def ours() -> float:
        started = time.perf_counter()
        for array in arrays:
            quantize_in_pieces(array)
        return time.perf_counter() - started

    runs = {"ours": ours}
    with Bitsandbytes(args.bnb, double=True) if args.bnb else nullcontext() as peer:
        if peer:
            peer.prepare(op="quantize", path=str(args.model), names=names)
            runs["bitsandbytes"] = lambda: peer.run("bitsandbytes")
        for run in runs.values():
            run()  # compiles, and makes threads
        weights = sum(array.size for array in arrays)
        rates = {name: weights / timing.median for name, timing in in_turn(runs, ROUNDS).items()}
    found: dict[str, Any] = {"weights": weights, "rounds": ROUNDS, **rates}
    if peer:
        found |= {"ratio": rates["ours"] / rates["bitsandbytes"], "versions": peer.versions}
    return found


def item_bytes(dtype: str) -> int:
    """Bytes of one number."""
    return {"float32": 4, "float64": 8}.get(dtype, 2)


def peak_rss() -> int:
    """The most memory that this process held so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


PARTS = {
    "random": write_random,
    "convert": convert,
    "load": load,
    "open": open_checkpoint,
    "quantize": quantize,
}

if __name__ == "__main__":
    main()
