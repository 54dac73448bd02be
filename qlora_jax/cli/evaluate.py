"""Loss and perplexity of a model on a file, and of each adapter beside it."""

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_jax.cli.options import base_arguments, how, positive

if TYPE_CHECKING:
    from qlora_jax.evaluation.perplexity import PerplexityResult

HEAD = ("model", "loss", "perplexity", "against the base")


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the model, the data and the adapters."""
    parser.add_argument("model", help="a model's folder, a .gguf file, or a Hub id")
    parser.add_argument(
        "--data",
        required=True,
        metavar="FILE",
        help="rows (.jsonl, .json, .csv, .parquet), or plain text (.txt, .md), which is cut into "
        "windows",
    )
    parser.add_argument(
        "--adapter",
        action="append",
        metavar="PATH",
        default=[],
        help="an adapter's folder; may come again",
    )
    parser.add_argument(
        "--seq-len",
        type=positive,
        metavar="N",
        help="tokens a window or row (default 1024, or the model's)",
    )
    parser.add_argument(
        "--batch-size", type=positive, default=1, metavar="N", help="rows at a time (default 1)"
    )
    parser.add_argument(
        "--train-on",
        choices=("assistant", "completion", "all"),
        default="assistant",
        help="which tokens of a chat count (default assistant)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    base_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Prints a row a model."""
    from qlora_jax.cli.progress import bar, counter
    from qlora_jax.data.rows import missing
    from qlora_jax.evaluation.perplexity import perplexity
    from qlora_jax.workflows.adapter_folder import load_adapter
    from qlora_jax.workflows.evaluation_data import evaluation_data
    from qlora_jax.workflows.open_as_trained import open_as_trained

    if not Path(args.data).exists():
        raise missing(args.data, "a data file or a text")
    first = args.adapter[0] if args.adapter else None
    with bar("loading the model") as progress:
        model, tokenizer, choice = open_as_trained(
            args.model, first, progress=progress, **how(args)
        )
    data = evaluation_data(args.data, tokenizer, model, args.seq_len, args.train_on)
    adapters = {path: load_adapter(path, model, any_base=args.any_base) for path in args.adapter}
    results = {}
    for name, adapter in {"base": None, **adapters}.items():
        with counter(f"evaluating {name}") as progress:
            results[name] = perplexity(
                model, data, adapter=adapter, batch_size=args.batch_size, progress=progress
            )
    if args.json:
        print(json.dumps(as_json(results), indent=2))
        return
    targets = results["base"].targets
    print(f"{Path(args.data).name}: {targets:,} predicted tokens; base {choice.reason}")
    print("\n".join(table(results)))


def as_json(results: dict[str, "PerplexityResult"]) -> dict[str, dict[str, float]]:
    """By model: loss, perplexity, targets."""
    return {
        name: {"loss": r.mean_nll, "perplexity": r.perplexity, "targets": r.targets}
        for name, r in results.items()
    }


def table(results: dict[str, "PerplexityResult"]) -> Iterator[str]:
    """The base first, each adapter's difference beside it."""
    from qlora_jax.cli.inspect import table as aligned

    base = results["base"].mean_nll
    rows = [
        (
            name,
            f"{result.mean_nll:.4f}",
            f"{result.perplexity:,.2f}",
            "" if name == "base" else f"{100 * math.expm1(result.mean_nll - base):+.1f}%",
        )
        for name, result in results.items()
    ]
    return aligned([HEAD, *rows])
