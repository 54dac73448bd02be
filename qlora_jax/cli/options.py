"""Options that several commands share, so that they are spelled and explained in one way."""

import argparse
from typing import Any

DTYPES = ("bfloat16", "float32", "float16")
CONFIG_HELP = "a YAML file of settings; README lists the keys"


def config_arguments(parser: argparse.ArgumentParser) -> None:
    """A configuration file, and settings that win over it."""
    parser.add_argument("config", help=CONFIG_HELP)
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="a setting that wins over the file's"
    )


def base_arguments(parser: argparse.ArgumentParser) -> None:
    """How a base model is opened."""
    group = parser.add_argument_group("how the model is opened")
    group.add_argument(
        "--quantization",
        choices=("auto", "none", "nf4", "fp4", "int4"),
        default="auto",
        help="auto: as the adapter was trained, else nf4; a 4-bit model as it is stored",
    )
    group.add_argument(
        "--block-size", type=int, default=64, metavar="N", help="weights a scale (default 64)"
    )
    group.add_argument("--no-double-quant", action="store_true", help="scales stay float32")
    group.add_argument(
        "--compute-dtype",
        choices=("auto", *DTYPES),
        default="auto",
        help="of activations; auto: as the adapter was trained, else bfloat16",
    )
    group.add_argument(
        "--any-base", action="store_true", help="take an adapter of another base all the same"
    )


def how(args: argparse.Namespace) -> dict[str, Any]:
    """The options of `base_arguments` as keywords of `open_as_trained`."""
    return {
        "kind": args.quantization,
        "block_size": args.block_size,
        "double_quant": not args.no_double_quant,
        "dtype": args.compute_dtype,
    }


def dtype_argument(parser: argparse.ArgumentParser, what: str) -> None:
    """--dtype of what is written."""
    parser.add_argument(
        "--dtype", choices=DTYPES, default="bfloat16", help=f"of {what} (default bfloat16)"
    )


def positive(text: str) -> int:
    """A whole number above 0, for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} (expected 1 or more)")
    return number
