"""Combines adapters of one base into one adapter, with weights that are given or fitted.

    qlora-jax compose out/a=0.7 out/b=0.4 -o out/both --model BASE
    qlora-jax compose out/a out/b -o out/small --model BASE --method svd --svd-rank 8
    qlora-jax compose out/a out/b -o out/fitted --model BASE --fit held_out.txt

cat is the exact weighted sum; the others are PEFT's. --fit finds the weights on one half of a file
of held-out text, and tells on the other half what they are worth.
"""

import argparse
import math
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_jax.cli.inspect import table
from qlora_jax.cli.options import base_arguments, how, positive, written
from qlora_jax.errors import InputError

if TYPE_CHECKING:
    from qlora_jax.adapters.adapter import Adapter
    from qlora_jax.workflows.fit_weights import FittedWeights

METHODS = "cat, svd, linear, magnitude_prune, ties, dare_linear, dare_ties"

HEAD = ("on the other half", "loss", "perplexity")


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declares adapters with their weights, method and output."""
    parser.add_argument(
        "adapters",
        nargs="+",
        metavar="PATH[=WEIGHT]",
        help="an adapter's folder and its weight, 1 where none is given",
    )
    parser.add_argument("-o", "--out", required=True, metavar="OUT", help="a new folder")
    parser.add_argument(
        "--model", required=True, metavar="BASE", help="the base: a folder, a .gguf file, a Hub id"
    )
    parser.add_argument(
        "--method",
        default="cat",
        metavar="NAME",
        help=f"{METHODS} (default cat, the exact sum, whose ranks add up); all but cat and svd "
        "take adapters of equal ranks",
    )
    parser.add_argument(
        "--svd-rank",
        type=int,
        metavar="R",
        help="svd: the largest rank of a matrix (default: the largest that is put in); or --energy",
    )
    parser.add_argument(
        "--energy",
        type=float,
        metavar="X",
        help="svd: the least rank that keeps this share of the squared singular values, at most 1",
    )
    parser.add_argument(
        "--density",
        type=float,
        metavar="X",
        help="ties, magnitude_prune, dare_...: the share of entries that is kept, over 0 and "
        "at most 1 (default 0.5)",
    )
    parser.add_argument(
        "--sign",
        default="total",
        metavar="NAME",
        help="ties, dare_ties: total or frequency, what elects an entry's sign (default total)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="dare_...: which entries are kept (default 0)",
    )
    group = parser.add_argument_group("weights that are fitted (method cat)")
    group.add_argument(
        "--fit",
        metavar="DATA",
        help="held-out text or rows; the search begins at the given weights, or at 1 / n each",
    )
    group.add_argument(
        "--fit-per-layer", action="store_true", help="a weight for each adapter and layer"
    )
    group.add_argument(
        "--free", action="store_true", help="weights may be negative, given ones too"
    )
    group.add_argument(
        "--fit-tokens",
        type=positive,
        metavar="N",
        help="at most so many tokens of each half of DATA (default 2048)",
    )
    group.add_argument(
        "--seq-len", type=positive, metavar="N", help="tokens a window or row (default 256)"
    )
    base_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Combines, saves, and prints what was done."""
    given = dict(weighted(args.adapters))
    refuse_unused(args)

    from qlora_jax.adapters.compose import compose
    from qlora_jax.adapters.method import Method
    from qlora_jax.checkpoints.atomic import refuse_existing
    from qlora_jax.cli.progress import bar
    from qlora_jax.data.rows import missing
    from qlora_jax.workflows.adapter_folder import save_adapter
    from qlora_jax.workflows.composition import (
        open_adapters,
        open_base,
        provenance,
        refuse_other_bases,
    )

    method = Method(args.method, args.svd_rank, args.energy, args.density, args.sign, args.seed)
    weights = {path: 1.0 if weight is None else weight for path, weight in given.items()}
    refuse_existing(args.out)
    refuse_other_bases(list(given), args.any_base)
    if args.fit and not Path(args.fit).exists():
        raise missing(args.fit, "held-out text or rows")
    with bar("loading the base") as progress:
        model, tokenizer, choice = open_base(
            args.model, list(given), tokenizer=bool(args.fit), progress=progress, **how(args)
        )
    print(f"base       {args.model}: {choice.reason}")
    adapters = open_adapters(list(given), model, any_base=args.any_base)
    fitted = None
    if args.fit:
        fitted = fit(args, model, tokenizer, adapters, given)
        weights = fitted.weights
    both = compose(adapters, weights, method=method.name, **method.options)
    save_adapter(
        args.out, both, model, tokenizer, extra=provenance(weights, method, fitted, args.fit)
    )
    print("\n".join(report(adapters, weights)))
    options = "".join(f", {name} {value}" for name, value in method.options.items())
    print(f"{method.name:<10} {ranks(both)}{options}")
    print(written(args.out, "PEFT's layout"))


def weighted(texts: Sequence[str]) -> Iterator[tuple[str, float | None]]:
    """(path, weight or None) of each `PATH[=WEIGHT]`; a path may itself hold a `=`.

    Raises:
      InputError: COMPOSE-WEIGHT for one that is no finite number, COMPOSE-TWICE for a path that
        comes again.
    """
    seen = set()
    for text in texts:
        path, equals, number = text.rpartition("=")
        whole = not equals or (os.path.isdir(text) and not os.path.isdir(path))
        weight = None
        if whole:
            path = text
        else:
            weight = finite(number, text)
        if path in seen:
            found = "comes twice"
            raise InputError("COMPOSE-TWICE", path, found, "each adapter once", "one weight for it")
        seen.add(path)
        yield path, weight


def finite(number: str, text: str) -> float:
    """The weight behind the last `=` of an argument."""
    try:
        weight = float(number)
    except ValueError:
        found, hint = f"the weight is {number!r}", "PATH=0.7, or the path of a folder that is there"
        raise InputError("COMPOSE-WEIGHT", text, found, "a number", hint) from None
    if not math.isfinite(weight):
        raise InputError("COMPOSE-WEIGHT", text, f"the weight is {weight}", "a finite number")
    return weight


def refuse_unused(args: argparse.Namespace) -> None:
    """Options about fitting need --fit, and that needs a method with a gradient.

    Raises:
      InputError: COMPOSE-FIT.
    """
    if args.fit:
        if args.method != "cat":
            found, expected = f"with method {args.method}", "method cat"
            hint = "--fit with cat; its result can be made smaller by another compose, with svd"
            raise InputError("COMPOSE-FIT", "--fit", found, expected, hint)
        return
    flags = {
        "--fit-per-layer": args.fit_per_layer,
        "--free": args.free,
        "--fit-tokens": args.fit_tokens,
        "--seq-len": args.seq_len,
    }
    if given := [flag for flag, value in flags.items() if value]:
        raise InputError("COMPOSE-FIT", given[0], "has no effect without --fit", "--fit DATA")


def fit(
    args: argparse.Namespace, model, tokenizer, adapters: dict[str, "Adapter"], given: dict
) -> "FittedWeights":
    """The fitted weights; prints what they are worth."""
    from qlora_jax.cli.progress import counter
    from qlora_jax.workflows.evaluation_data import evaluation_data
    from qlora_jax.workflows.fit_weights import LENGTH, TOKENS, fit_weights

    length = args.seq_len or min(LENGTH, model.config.max_position_embeddings)
    data = evaluation_data(args.fit, tokenizer, model, length)
    start = None
    if any(weight is not None for weight in given.values()):
        start = {path: 1.0 if weight is None else weight for path, weight in given.items()}
    begun = time.perf_counter()
    with counter("fitting") as progress:
        found = fit_weights(
            model,
            adapters,
            data,
            start=start,
            per_layer=args.fit_per_layer,
            free=args.free,
            tokens=args.fit_tokens or TOKENS,
            progress=progress,
        )
    print(
        f"fitted     on {found.fitted_on:,} tokens of {Path(args.fit).name}: {found.losses} losses "
        f"and gradients, {time.perf_counter() - begun:.0f} s"
    )
    print(f"told       on {found.targets:,} others:")
    rows = [(name, f"{loss:.4f}", f"{math.exp(loss):,.2f}") for name, loss in found.rows]
    print("\n".join(f"           {row}" for row in table([HEAD, *rows])))
    name, loss = found.best_other
    if loss <= found.fitted:
        print(
            f"note       the fitted weights are not better than {name}: more text, or fewer weights"
        )
    return found


def report(adapters: dict[str, "Adapter"], weights: dict) -> Iterator[str]:
    """A row an adapter: its weight, the smallest to the largest where layers differ."""
    for path, adapter in adapters.items():
        own = weights[path]
        if isinstance(own, list):
            shown = f"{min(own):.3g} to {max(own):.3g} by layer"
        else:
            shown = f"{own:.4g}"
        yield f"adapter    {path}: weight {shown}, {ranks(adapter)}"


def ranks(adapter: "Adapter") -> str:
    """`rank 8 to 16`, and how many numbers there are."""
    spec = adapter.spec
    found = sorted({rank for name in spec.targets for rank in spec.ranks(name) if rank})
    span = f"{found[0]}" if len(found) == 1 else f"{found[0]} to {found[-1]}"
    return f"rank {span}, {adapter.num_parameters / 1e6:.2f}M parameters"
