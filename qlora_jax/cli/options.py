"""Options that several commands share, so that they are spelled and explained in one way."""

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qlora_jax.inference.sampling import Sampling

DTYPES = ("bfloat16", "float32", "float16")
KINDS = ("nf4", "fp4", "int4")
CONFIG_HELP = "a YAML file of settings; README lists the keys"


class Once(argparse.Action):
    """An option that may come once; argparse itself lets the last one win in silence."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        """Takes the value.

        Raises:
          ArgumentError: it was given before.
        """
        if getattr(namespace, self.dest) is not None:
            raise argparse.ArgumentError(
                self, f"comes twice: {getattr(namespace, self.dest)} first"
            )
        setattr(namespace, self.dest, values)


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
        choices=("auto", "none", *KINDS),
        default="auto",
        help="auto: as the adapter was trained, the first of several, or as stored if it does not "
        "say; without one nf4; a 4-bit model always as stored",
    )
    group.add_argument(
        "--block-size", type=int, default=64, metavar="N", help="weights a scale (default 64)"
    )
    group.add_argument("--no-double-quant", action="store_true", help="scales stay float32")
    group.add_argument(
        "--compute-dtype",
        choices=("auto", *DTYPES),
        default="auto",
        help="of activations; auto: as the adapter was trained, or as stored if it does not say; "
        "without one bfloat16",
    )
    group.add_argument(
        "--any-base", action="store_true", help="take an adapter of another base all the same"
    )


def sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """How tokens are chosen, and what decoding keeps in memory."""
    group = parser.add_argument_group("sampling (greedy by default)")
    group.add_argument("--temperature", type=float, default=0.0, metavar="X", help="0 is greedy")
    group.add_argument(
        "--top-k", type=int, default=0, metavar="N", help="keep the k likeliest; 0 is off"
    )
    group.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        metavar="X",
        help="keep this much probability, over 0 (default 1, all)",
    )
    group.add_argument(
        "--min-p",
        type=float,
        default=0.0,
        metavar="X",
        help="the least, relative to the likeliest; 0 is off",
    )
    group.add_argument(
        "--repetition-penalty",
        type=float,
        default=1.0,
        metavar="X",
        help="over 1 avoids what was said",
    )
    group.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="the same seed gives the same text (default 0)",
    )
    memory = parser.add_argument_group("memory and speed")
    memory.add_argument(
        "--decode-weights",
        choices=("auto", "packed", "dense"),
        default="auto",
        help="dense: dequantized once; packed: at every token; auto: dense on a CPU with room",
    )
    memory.add_argument(
        "--cache-dtype",
        choices=("auto", "bfloat16", "float32", "float16", "int8"),
        default="auto",
        help="of keys and values (default: the model's)",
    )


def sampling_of(args: argparse.Namespace) -> "Sampling":
    """The options of `sampling_arguments` that choose tokens."""
    from qlora_jax.inference.sampling import Sampling

    return Sampling(args.temperature, args.top_k, args.top_p, args.min_p, args.repetition_penalty)


def how(args: argparse.Namespace) -> dict[str, Any]:
    """The options of `base_arguments` as keywords of `open_as_trained`."""
    return {
        "kind": args.quantization,
        "block_size": args.block_size,
        "double_quant": not args.no_double_quant,
        "dtype": args.compute_dtype,
    }


def dtype_argument(parser: argparse.ArgumentParser, what: str, whose: str = "source") -> None:
    """--dtype of what is written; None is the source's own."""
    parser.add_argument("--dtype", choices=DTYPES, help=f"of {what} (default: the {whose}'s own)")


def shard_argument(parser: argparse.ArgumentParser) -> None:
    """--shard-size of a folder's weights."""
    parser.add_argument(
        "--shard-size",
        type=byte_size,
        metavar="SIZE",
        help="most bytes in a file of weights, such as 2GB or 500MB (default 5GB)",
    )


def sharding(args: argparse.Namespace) -> dict[str, int]:
    """--shard-size as the keyword of what writes, which knows the default."""
    return {} if args.shard_size is None else {"shard_bytes": args.shard_size}


def written(out: str, form: str) -> str:
    """The line that says what was written, and how large it is."""
    path = Path(out)
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return f"written    {out} ({form}): {size(sum(file.stat().st_size for file in files))}"


def size(nbytes: int) -> str:
    """Bytes in the largest unit that leaves a 1 before the point; 1 GB is 1e9 bytes."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if nbytes >= scale:
            return f"{nbytes / scale:.2f} {unit}"
    return f"{nbytes / 1e3:.2f} kB"


def byte_size(text: str) -> int:
    """`2GB` as bytes, for argparse; units as in transformers: 1 GB is 1e9 bytes, 1 GiB 2^30."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([kmgt]i?)b", text.lower(), re.ASCII)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} (expected a size such as 2GB or 500MB)")
    number, unit = match.groups()
    if len(number) > 15:  # not exact as a float, or too large for one
        raise argparse.ArgumentTypeError(f"{text[:20]!r}... (expected at most 15 digits)")
    base = 1024 if unit.endswith("i") else 1000
    count = int(float(number) * base ** (1 + "kmgt".index(unit[0])))
    if count < 1:
        raise argparse.ArgumentTypeError(f"{text!r} (expected more than 0 bytes)")
    return count


def positive(text: str) -> int:
    """A whole number above 0, for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} (expected 1 or more)")
    return number
