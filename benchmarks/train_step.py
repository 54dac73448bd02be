"""Times one QLoRA training step: gradients, clipping and AdamW, on fixed data.

    python benchmarks/train_step.py --model PATH --batch 1 --seq-len 256 --json

The last line is one line of JSON. Batch and ids are fixed by the seed, so `loss` is the same on
every run of one machine; `peak_rss_bytes` is the process's, loading and compiling included.
"""

import argparse
import json
import resource
import statistics
import time
from collections.abc import Callable

import jax
import numpy as np

from qlora_jax.adapters.init import init_lora
from qlora_jax.models.remat import POLICIES
from qlora_jax.optim.paged_adamw import paged_adamw
from qlora_jax.quantization.policy import QuantizationConfig
from qlora_jax.train.step import finish, gradients
from qlora_jax.weight_names import STREAMED
from qlora_jax.workflows.open import load_model, open_source

WARM_UP = 2


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--json", action="store_true", help="print one line of JSON, the last")
    args = options.parse_args()
    step = training(args)
    seconds, losses = [], []
    for _ in range(WARM_UP + args.steps):
        start = time.perf_counter()
        losses.append(step())
        seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds[WARM_UP:])
    result = {
        "tokens_per_second": args.batch * args.seq_len / median,
        "step_seconds": median,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "compile_seconds": seconds[0] - median,
        "dtype": args.dtype,
        "loss": losses[-1],
        "batch": args.batch,
        "seq_len": args.seq_len,
        "rank": args.rank,
        "remat": args.remat,
        "stream_weights": args.stream_weights,
        "optim_memory": args.optim_memory,
        "steps": args.steps,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }
    if args.json:
        print(json.dumps(result))
    else:
        for name, value in result.items():
            print(f"{name:18} {value}")


def training(args: argparse.Namespace) -> Callable[[], float]:
    """A model and an adapter; each call is a step on the same batch, and gives its loss."""
    with open_source(args.model) as source:
        model = load_model(
            source,
            quantization=QuantizationConfig(),
            dtype=args.dtype,
            stream_weights=args.stream_weights,
        )
    lora = init_lora(model, r=args.rank, alpha=args.rank, key=jax.random.key(0))
    optimizer = paged_adamw(2e-4, memory=args.optim_memory)
    params, state = lora.params, optimizer.init(lora.params)
    batch = fixed_batch(args.batch, args.seq_len, model.config.vocab_size)

    def step() -> float:
        nonlocal params, state
        sums = gradients(params, model, batch, spec=lora.spec, remat=args.remat)
        grads, metrics = finish(sums, max_grad_norm=0.3)
        params, state = jax.block_until_ready(optimizer.apply(params, grads, state))
        return float(metrics.loss)

    return step


def fixed_batch(rows: int, length: int, vocabulary: int) -> dict[str, np.ndarray]:
    """Random ids from a fixed seed, every one of them a target, in the loader's form."""
    ids = np.random.RandomState(0).randint(0, vocabulary, (rows, length)).astype(np.int32)
    return {
        "input_ids": ids,
        "labels": ids,
        "positions": np.broadcast_to(np.arange(length, dtype=np.int32), ids.shape),
        "segment_ids": np.ones_like(ids),
    }


def parser(description: str) -> argparse.ArgumentParser:
    """With the options of a step; the description's first line is told."""
    parser = argparse.ArgumentParser(description=description.partition("\n")[0])
    parser.add_argument("--model", required=True, help="a Hugging Face folder or a .gguf file")
    parser.add_argument("--batch", type=int, default=1, help="rows a step")
    parser.add_argument("--seq-len", type=int, default=256, help="tokens a row")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--rank", type=int, default=16, help="LoRA rank, on all linears")
    parser.add_argument("--remat", default="none", choices=POLICIES)
    parser.add_argument("--stream-weights", default="off", choices=STREAMED)
    parser.add_argument("--optim-memory", default="device", choices=("host", "device"))
    parser.add_argument("--steps", type=int, default=5, help="timed steps, at least 5")
    return parser


if __name__ == "__main__":
    main()
