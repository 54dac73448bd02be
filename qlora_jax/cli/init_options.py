"""Options of `quantize` for an adapter that begins closer, written beside the 4-bit weights."""

import argparse
from collections.abc import Callable
from typing import Any

from qlora_jax.errors import InputError

# destination: keyword of `quantize_closer`
LORA = {
    "lora_r": "r",
    "lora_alpha": "alpha",
    "target_modules": "targets",
    "rank_pattern": "rank_pattern",
    "alpha_pattern": "alpha_pattern",
    "use_rslora": "use_rslora",
}
HOW = ("iterations", "seed")


def init_arguments(parser: argparse.ArgumentParser) -> None:
    """--init and what belongs to it; each is None where it was not given."""
    group = parser.add_argument_group(
        "an adapter that begins closer to MODEL (in OUT/adapter; train with model=OUT adapter=...)"
    )
    group.add_argument(
        "--init",
        metavar="HOW",
        help="pissa or loftq; pissa_niter_16 and loftq_niter_16 by a quicker decomposition of as "
        "many iterations",
    )
    group.add_argument("--iterations", type=int, metavar="N", help="of both steps (default 1)")
    group.add_argument("--lora-r", type=int, metavar="R", help="rank (default 64)")
    group.add_argument("--lora-alpha", type=float, metavar="X", help="default: the rank, scale 1")
    group.add_argument("--use-rslora", action="store_true", default=None, help="alpha / sqrt(r)")
    group.add_argument(
        "--target-modules", metavar="NAMES", help="q_proj,v_proj (default all-linear)"
    )
    group.add_argument(
        "--rank-pattern", type=pair(int), action="append", metavar="PATTERN=R", help="repeatable"
    )
    group.add_argument(
        "--alpha-pattern", type=pair(float), action="append", metavar="PATTERN=X", help="repeatable"
    )
    group.add_argument("--seed", type=int, metavar="N", help="of ..._niter_N (default 0)")


def pair(number: Callable[[str], Any]) -> Callable[[str], tuple[str, Any]]:
    """The type of `PATTERN=NUMBER`, for argparse."""

    def read(text: str) -> tuple[str, Any]:
        pattern, equals, value = text.rpartition("=")
        try:
            return (pattern, number(value)) if equals and pattern else refuse(text)
        except ValueError:
            return refuse(text)

    def refuse(text: str):
        raise argparse.ArgumentTypeError(f"{text!r} (expected PATTERN=NUMBER)")

    return read


def refuse_idle(args: argparse.Namespace) -> None:
    """Without --init the others have no effect, nor a seed without random directions.

    Raises:
      InputError: INIT-OPTION.
    """
    given = [name for name in (*LORA, *HOW) if getattr(args, name) is not None]
    if args.init is None and given:
        option = f"--{given[0].replace('_', '-')}"
        found, hint = "is given and has no effect: there is no --init", "--init loftq"
        raise InputError("INIT-OPTION", option, found, "", hint)
    if args.seed is not None and "_niter_" not in (args.init or ""):
        found, hint = f"is given and has no effect with {args.init}", f"--init {args.init}_niter_16"
        raise InputError("INIT-OPTION", "--seed", found, "", hint)


def lora_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The options of the adapter as keywords of `quantize_closer`."""
    given = {LORA[name]: value for name in LORA if (value := getattr(args, name)) is not None}
    if (alpha := given.get("alpha")) is not None and alpha.is_integer():
        given["alpha"] = int(alpha)
    if (targets := given.get("targets")) not in (None, "all-linear"):
        given["targets"] = targets.split(",")
    for key in ("rank_pattern", "alpha_pattern"):
        if key in given:
            given[key] = dict(given[key])
    return given


def how_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The options of the method as keywords of `Closer`."""
    return {name: value for name in HOW if (value := getattr(args, name)) is not None}
