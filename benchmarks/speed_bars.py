"""How fast nf4_matmul must be on a GPU, as data, and which bars a measurement reaches."""

import dataclasses
import math
from collections.abc import Iterable, Iterator
from typing import Any


@dataclasses.dataclass(frozen=True)
class Bar:
    """One target of the chosen backend.

    Attributes:
      text: for the table.
      fewest, most: the rows of x for which it stands.
      rival: of whom the time is divided by ours, the faster of those whose names begin so; None
        for the share of the device's memory bandwidth.
      at_least: what the ratio or the share must be.
    """

    text: str
    fewest: int
    most: float
    rival: str | None
    at_least: float


BARS = (
    Bar("75% of bandwidth", 1, 16, None, 0.75),
    Bar("3x bf16", 1, 16, "bf16", 3.0),
    Bar("1.3x bitsandbytes", 1, 16, "bitsandbytes", 1.3),
    Bar("as fast as bf16", 64, 512, "bf16", 1.0),
    Bar("as fast as bitsandbytes", 64, 512, "bitsandbytes", 1.0),
    Bar("95% of bf16", 2048, math.inf, "bf16", 0.95),
)


def judged(rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """For each product, and each bar that stands for it: the value, and whether it holds.

    `holds` is None where the rival, or the bandwidth of the device, is not known.
    """
    for key, group in by_product(rows).items():
        ours = next((row for row in group if row["chosen"] and row["seconds"]), None)
        for bar in BARS:
            if ours is not None and bar.fewest <= ours["m"] <= bar.most:
                value = reached(bar, ours, group)
                yield {
                    **dict(zip(PRODUCT, key, strict=True)),
                    "contender": ours["contender"],
                    "bar": bar.text,
                    "against": bar.rival or "bandwidth",
                    "at_least": bar.at_least,
                    "value": value,
                    "holds": None if value is None else value >= bar.at_least,
                }


PRODUCT = ("model", "projection", "m", "n", "k", "direction")


def by_product(rows: Iterable[dict[str, Any]]) -> dict[tuple, list[dict[str, Any]]]:
    """The rows of each nf4_matmul."""
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        if row["op"] == "nf4_matmul":
            groups.setdefault(tuple(row[key] for key in PRODUCT), []).append(row)
    return groups


def reached(bar: Bar, ours: dict[str, Any], group: list[dict[str, Any]]) -> float | None:
    """The value that is held against `bar.at_least`."""
    if bar.rival is None:
        return ours["bandwidth_share"]
    rivals = [
        row["seconds"]
        for row in group
        if row["contender"].startswith(bar.rival) and row["seconds"] is not None
    ]
    return min(rivals) / ours["seconds"] if rivals else None
