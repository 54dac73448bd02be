"""What is in a model or an adapter: layers, shapes, bits per parameter, names for targets."""

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING

from qlora_jax.errors import printable

if TYPE_CHECKING:
    from qlora_jax.workflows.describe import Description

HEAD = ("weight", "layers", "shape", "stored as", "bits", "size")


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the path and --json."""
    parser.add_argument("path", help="a model's folder, a .gguf file, or an adapter's folder")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> None:
    """Prints what the headers of the files say."""
    from qlora_jax.workflows.describe import describe

    found = describe(args.path)
    if args.json:
        totals = {key: getattr(found, key) for key in ("parameters", "nbytes")}
        bits = {"bits_per_parameter": round(found.bits_per_parameter, 4)}
        print(json.dumps({**asdict(found), **totals, **bits}, indent=2))
    else:
        print("\n".join(map(printable, lines(found))))


def lines(found: "Description") -> Iterator[str]:
    """The report as text: facts, a table of weights, totals."""
    yield f"{found.path}: {found.kind}"
    yield ", ".join(f"{key} {value}" for key, value in found.facts.items())
    yield ""
    yield from table([HEAD, *rows(found)])
    yield ""
    bits = found.bits_per_parameter
    yield f"{found.parameters:,} parameters, {size(found.nbytes)}, {bits:.2f} bits each"
    yield f"target_modules: {', '.join(found.targets)}"


def rows(found: "Description") -> Iterator[tuple[str, ...]]:
    """One row a weight."""
    for weight in found.weights:
        shape = " x ".join(map(str, weight.shape))
        bits = f"{8 * weight.nbytes / weight.parameters:.2f}"
        yield weight.name, str(weight.layers), shape, weight.stored, bits, size(weight.nbytes)


def size(nbytes: int) -> str:
    """Bytes in the largest unit that leaves a 1 before the point; 1 GB is 1e9 bytes."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if nbytes >= scale:
            return f"{nbytes / scale:.2f} {unit}"
    return f"{nbytes / 1e3:.2f} kB"


def table(cells: list[tuple[str, ...]]) -> Iterator[str]:
    """Columns as wide as their widest cell, whole names even through a pipe."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        yield "  ".join(
            f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)
        ).rstrip()
