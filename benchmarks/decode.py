"""Times decoding, token by token: with and without adapters, for one row and for many.

    python benchmarks/decode.py --model PATH --new-tokens 128 --json

The last line is one line of JSON. All contenders take turns, a few tokens each, so that what else
the machine does falls on all of them; an overhead is the median, over the turns, of how much longer
one took than the other in the same turn.

    tokens_per_second     one row, without an adapter
    adapter_overhead      one row with an adapter, r = 16 on all linears, not merged
    batch8_overhead       8 rows with 8 different adapters, against 8 rows with one
    unused_overhead       the same 8 adapters of 32 that are loaded, against 8 of 8

--peer COMMAND (with `python -m benchmarks.decode`) is a program as peers.py describes it, which
answers {"prepare": {"op": "generate", "path": PATH, "tokens": N}} with names, and {"run": NAME}
with the seconds of one token: transformers' generate on the same weights.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qlora_jax.adapters import Adapter, AdapterStack, init_lora, stack_adapters
from qlora_jax.adapters.stack import Which
from qlora_jax.inference.decode import advance, started
from qlora_jax.inference.sampling import GREEDY
from qlora_jax.inference.weights import ForDecoding, for_decoding
from qlora_jax.models import Decoder
from qlora_jax.quantization.policy import QuantizationConfig
from qlora_jax.workflows.open import load_model, open_source

PROMPT = 16  # tokens
WARM_UP = 2  # tokens


class Run:
    """One contender's run: a batch that decodes on, and begins again when it is at its end."""

    def __init__(
        self,
        fast: ForDecoding,
        adapter: Adapter | AdapterStack | None,
        which: Which,
        rows: int,
        new_tokens: int,
    ):
        self.model, self.rows, self.new_tokens = fast.model, rows, new_tokens
        self.adapter = fast.adapter(adapter, which, rows)
        self.keys = jnp.stack([jax.random.key(0)] * rows)
        self.begin()

    def begin(self) -> None:
        """The prompt, and the tokens that compile."""
        ids = np.random.RandomState(0).randint(0, self.model.config.vocab_size, (self.rows, PROMPT))
        room = self.new_tokens + WARM_UP
        self.state, self.token = started(
            self.model, self.adapter, ids.tolist(), room, self.keys, GREEDY, self.model.dtype
        )
        self.left = self.new_tokens
        self.tokens(WARM_UP)

    def tokens(self, count: int) -> None:
        """As `generate` goes on: each token's work is queued behind the one before."""
        for _ in range(count):
            self.state, self.token = advance(
                self.model, self.adapter, self.state, self.token, self.keys, GREEDY
            )
        self.token.block_until_ready()

    def seconds_of_a_token(self, count: int) -> float:
        """Of all rows together; a text that is at its end begins again, which is not timed."""
        if self.left < count:
            self.begin()
        self.left -= count
        start = time.perf_counter()
        self.tokens(count)
        return (time.perf_counter() - start) / count


def main() -> None:
    args = arguments()
    with open_source(args.model) as source:
        model = load_model(source, quantization=QuantizationConfig(), dtype=args.dtype)
    fast = for_decoding(model, args.decode_weights)
    print(f"weights {fast.reason}", file=sys.stderr)
    contenders = rows_of(model, fast, args)
    compiled = advance._cache_size()
    Run(fast, trained(model, args.rank, 1000), None, 1, args.new_tokens)  # an adapter is swapped
    runs: dict[str, Callable[[], float]] = {
        name: lambda row=row: row.seconds_of_a_token(args.turn) for name, row in contenders.items()
    }
    peer = None
    if args.peer:
        from benchmarks.peers import Bitsandbytes

        peer = Bitsandbytes(args.peer, double=True)
        for name in peer.prepare(op="generate", path=args.peer_model, tokens=args.turn):
            peer.run(name)
            runs[name] = lambda name=name: peer.run(name)
    turns = -(-args.new_tokens * args.repetitions // args.turn)
    seconds = {name: [] for name in runs}
    for turn in range(turns):
        for name, run in rotated(runs, turn):
            seconds[name].append(run())
    result = summary(seconds) | {
        "compiled_by_a_swap": advance._cache_size() - compiled,
        "decode_weights": fast.reason,
        "new_tokens": args.new_tokens,
        "turns": turns,
        "dtype": args.dtype,
        "rank": args.rank,
        "batch": args.batch,
        "loaded": args.loaded,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        **({} if peer is None else {"peer": peer.versions}),
    }
    if args.json:
        print(json.dumps(result))
    else:
        for name, value in result.items():
            print(f"{name:24} {value}")


def rows_of(model: Decoder, fast: ForDecoding, args: argparse.Namespace) -> dict[str, Run]:
    """What is compared."""
    batch, new = args.batch, args.new_tokens
    adapters = {f"{i}": trained(model, args.rank, i) for i in range(args.loaded)}
    used = list(range(batch))
    spread = [i * args.loaded // batch for i in used]
    few = stack_adapters({name: adapters[name] for name in map(str, spread)})
    return {
        "base": Run(fast, None, None, 1, new),
        "adapter": Run(fast, adapters["0"], None, 1, new),
        "batch base": Run(fast, None, None, batch, new),
        "batch shared": Run(fast, adapters["0"], None, batch, new),
        "batch different": Run(fast, few, used, batch, new),
        "batch of loaded": Run(fast, stack_adapters(adapters), spread, batch, new),
    }


def trained(model: Decoder, rank: int, seed: int) -> Adapter:
    """An adapter on all linears with nothing at rest."""
    adapter = init_lora(model, r=rank, alpha=rank, key=jax.random.key(seed))
    key = jax.random.key(seed + 1)
    return jax.tree.map(lambda leaf: 0.01 * jax.random.normal(key, leaf.shape), adapter)


def rotated(runs: dict[str, Any], first: int) -> list[tuple[str, Any]]:
    """The runs, another one first in each turn."""
    items = list(runs.items())
    first %= len(items)
    return items[first:] + items[:first]


def summary(seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Medians, and how much longer one contender took than another in the same turn."""

    def overhead(one: str, other: str) -> float:
        pairs = zip(seconds[one], seconds[other], strict=True)
        return statistics.median(a / b for a, b in pairs) - 1

    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "tokens_per_second": 1 / medians["base"],
        "adapter_overhead": overhead("adapter", "base"),
        "batch8_overhead": overhead("batch different", "batch shared"),
        "unused_overhead": overhead("batch of loaded", "batch different"),
        "milliseconds_a_token": {name: 1e3 * median for name, median in medians.items()},
        "fastest_milliseconds": {name: 1e3 * min(values) for name, values in seconds.items()},
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True, help="a Hugging Face folder or a .gguf file")
    parser.add_argument("--new-tokens", type=int, default=128, help="of a text")
    parser.add_argument("--repetitions", type=int, default=1, help="texts of each contender")
    parser.add_argument("--turn", type=int, default=4, help="tokens of a contender at a time")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--decode-weights", default="auto", choices=("auto", "packed", "dense"))
    parser.add_argument("--rank", type=int, default=16, help="LoRA rank, on all linears")
    parser.add_argument("--batch", type=int, default=8, help="rows of a batch")
    parser.add_argument("--loaded", type=int, default=32, help="adapters in memory")
    parser.add_argument("--peer", metavar="COMMAND", help="transformers' generate, see above")
    parser.add_argument("--peer-model", metavar="PATH", help="the model as the peer reads it")
    parser.add_argument("--json", action="store_true", help="print one line of JSON, the last")
    return parser.parse_args()


if __name__ == "__main__":
    main()
