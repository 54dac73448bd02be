"""What is in a model or an adapter: layers, shapes, bits per parameter, names for targets.

No weight is read. Names and shapes are checked as when the model is loaded.
"""

import argparse
import json
import textwrap
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from qlora_jax.cli.options import size
from qlora_jax.errors import printable

if TYPE_CHECKING:
    from qlora_jax.workflows.description import Description

HEAD = ("weight", "layers", "shape", "stored as", "bits", "size")
WIDTH = 100


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the path and --json."""
    parser.add_argument(
        "path", help="a model (folder, .gguf, Hub id), an adapter's folder, or one that Orbax wrote"
    )
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
    yield from pairs(found.facts)
    yield f"weights in {in_short(found.files)}"
    if not found.kind.startswith("Orbax"):
        yield f"tokenizer: {', '.join(found.tokenizer) or 'none'}"
    if found.made:
        yield "qlora_jax.json:"
        yield from outline(found.made)
    yield ""
    yield from table([HEAD, *rows(found)])
    yield ""
    bits = found.bits_per_parameter
    yield f"{found.parameters:,} parameters, {size(found.nbytes)}, {bits:.2f} bits each"
    if found.targets:
        yield f"target_modules: {', '.join(found.targets)}"


def in_short(files: list[str]) -> str:
    """One name, or how many and the first and last."""
    return files[0] if len(files) == 1 else f"{len(files)} files, {files[0]} to {files[-1]}"


def pairs(facts: dict[str, Any]) -> Iterator[str]:
    """`key value, key value, ...` in lines that a terminal holds."""
    text = ", ".join(f"{key} {in_words(value)}" for key, value in facts.items())
    yield from textwrap.wrap(text, WIDTH, break_long_words=False, break_on_hyphens=False)


def outline(facts: dict[str, Any], indent: str = "  ") -> Iterator[str]:
    """A line a fact; an outline of an object that holds more than plain values."""
    for key, value in facts.items():
        if isinstance(value, list) and any(isinstance(one, dict) for one in value):
            yield f"{indent}{key}:"
            yield from (f"{indent}  {in_words(one)}" for one in value)
        elif isinstance(value, dict) and any(isinstance(v, dict | list) for v in value.values()):
            yield f"{indent}{key}:"
            yield from outline(value, f"{indent}  ")
        else:
            yield f"{indent}{key}: {in_words(value)}"


def in_words(value: Any) -> str:
    """A fact as text: a list or an object without quotes and braces."""
    if isinstance(value, dict):
        return " ".join(f"{key}={in_words(inner)}" for key, inner in value.items())
    return " ".join(map(in_words, value)) if isinstance(value, list) else str(value)


def rows(found: "Description") -> Iterator[tuple[str, ...]]:
    """One row a weight."""
    for weight in found.weights:
        shape = " x ".join(map(str, weight.shape))
        bits = f"{8 * weight.nbytes / max(1, weight.parameters):.2f}"
        yield weight.name, str(weight.layers), shape, weight.stored, bits, size(weight.nbytes)


def table(cells: list[tuple[str, ...]]) -> Iterator[str]:
    """Columns as wide as their widest cell, whole names even through a pipe."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        yield "  ".join(
            f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)
        ).rstrip()
