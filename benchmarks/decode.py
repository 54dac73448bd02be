"""Times decoding, token by token: with and without adapters, for one row and for many.

    python benchmarks/decode.py --model PATH --new-tokens 128 --json

The last line is one line of JSON. All contenders take turns, a few tokens each, so that what else
the machine does falls on all of them; an overhead is the median, over the turns, of how much longer
one took than the other in the same turn.

    tokens_per_second     one row, without an adapter
    adapter_overhead      one row with an adapter, r = 16 on all linears, not merged
    batch8_overhead       8 rows with 8 different adapters, against 8 rows with one
    unused_overhead       the same 8 adapters of 32 that are loaded, against 8 of 8

    peer                  how many times as fast as the peer's generate, for one row and for 8

--peer COMMAND is a program as peers.py describes it: transformers' generate on the same weights.
--record writes results/decode.json.
"""

import argparse
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

if not __package__:  # run as a file
    sys.path.insert(0, str(Path(__file__).parent.parent))

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.machine import described
from benchmarks.peers import Bitsandbytes
from benchmarks.timing import rounds
from qlora_jax.adapters import Adapter, AdapterStack, init_lora, stack_adapters
from qlora_jax.adapters.stack import Which
from qlora_jax.inference.decode import advance, started
from qlora_jax.inference.sampling import GREEDY
from qlora_jax.inference.weights import ForDecoding, for_decoding
from qlora_jax.models import Decoder
from qlora_jax.quantization.policy import QuantizationConfig
from qlora_jax.workflows.open import load_model, open_source

RESULTS = Path(__file__).parent / "results" / "decode.json"
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
    """Times, and prints what came of it."""
    args = arguments()
    result = measured(args)
    if args.record:
        RESULTS.write_text(json.dumps({**described(), **result}, indent=2) + "\n")
    if args.json:
        print(json.dumps(result))
    else:
        for name, value in result.items():
            print(f"{name:24} {value}")


def measured(args: argparse.Namespace) -> dict[str, Any]:
    """The medians, the overheads, and what they are of."""
    with open_source(args.model) as source:
        model = load_model(source, quantization=QuantizationConfig(), dtype=args.dtype)
    fast = for_decoding(model, args.decode_weights)
    print(f"weights {fast.reason}", file=sys.stderr)
    runs = {
        name: functools.partial(run.seconds_of_a_token, args.turn)
        for name, run in rows_of(model, fast, args).items()
    }
    compiled = advance._cache_size()
    Run(fast, trained(model, args.rank, 1000), None, 1, args.new_tokens)  # an adapter is swapped
    compiled = advance._cache_size() - compiled
    turns = -(-args.new_tokens * args.repetitions // args.turn)
    with Bitsandbytes(args.peer, double=True) if args.peer else nullcontext() as peer:
        peers = {rows: generates(peer, args, rows) for rows in (1, args.batch)}
        seconds = rounds(runs | peers[1] | peers[args.batch], turns)
    return summary(seconds) | {
        "peer": peer and against(seconds, peers) | {"versions": peer.versions},
        "compiled_by_a_swap": compiled,
        "decode_weights": fast.reason,
        "model": Path(args.model).name,
        "new_tokens": args.new_tokens,
        "turns": turns,
        "dtype": args.dtype,
        "rank": args.rank,
        "batch": args.batch,
        "loaded": args.loaded,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }


def generates(
    peer: Bitsandbytes | None, args: argparse.Namespace, rows: int
) -> dict[str, Callable[[], float]]:
    """The peer's contenders for so many rows, warm."""
    if peer is None:
        return {}
    names = peer.prepare(op="generate", path=args.peer_model, tokens=args.turn, rows=rows)
    for name in names:
        peer.run(name)
    return {name: functools.partial(peer.run, name) for name in names}


def against(seconds: dict[str, list[float]], peers: dict[int, dict[str, Any]]) -> dict[str, float]:
    """How many times as fast as the peer's faster dtype in the same turn, without an adapter."""

    def times(own: str, names: Iterable[str]) -> float:
        return min(1 + overhead(seconds, name, own) for name in names)

    one, batch = peers.values()
    return {"times_as_fast": times("base", one), "batch_times": times("batch base", batch)}


def overhead(seconds: dict[str, list[float]], one: str, other: str) -> float:
    """The median of how much longer one took than the other in the same turn, a fraction."""
    pairs = zip(seconds[one], seconds[other], strict=True)
    return statistics.median(a / b for a, b in pairs) - 1


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


def summary(seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Medians, and how much longer one contender took than another in the same turn."""
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "tokens_per_second": 1 / medians["base"],
        "adapter_overhead": overhead(seconds, "adapter", "base"),
        "batch8_overhead": overhead(seconds, "batch different", "batch shared"),
        "unused_overhead": overhead(seconds, "batch of loaded", "batch different"),
        "milliseconds_a_token": {name: 1e3 * median for name, median in medians.items()},
        "fastest_milliseconds": {name: 1e3 * min(values) for name, values in seconds.items()},
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True, help="a Hugging Face folder or a .gguf file")
    parser.add_argument("--new-tokens", type=int, default=128, help="of a text")
    parser.add_argument("--repetitions", type=int, default=3, help="texts of each contender")
    parser.add_argument("--turn", type=int, default=8, help="tokens of a contender at a time")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--decode-weights", default="auto", choices=("auto", "packed", "dense"))
    parser.add_argument("--rank", type=int, default=16, help="LoRA rank, on all linears")
    parser.add_argument("--batch", type=int, default=8, help="rows of a batch")
    parser.add_argument("--loaded", type=int, default=32, help="adapters in memory")
    parser.add_argument("--peer", metavar="COMMAND", help="see peers.py")
    parser.add_argument("--peer-model", metavar="PATH", help="the model as the peer reads it")
    parser.add_argument("--record", action="store_true", help="write results/decode.json")
    parser.add_argument("--json", action="store_true", help="print one line of JSON, the last")
    return parser.parse_args()


if __name__ == "__main__":
    main()
