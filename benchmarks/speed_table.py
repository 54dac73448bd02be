"""What benchmarks/kernels.py prints: a line a product, a column a contender, and the bars."""

from collections.abc import Iterator
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

KEYS = ("op", "model", "projection", "m", "n", "k", "direction")


def show(found: dict[str, Any], console: Console | None = None) -> None:
    """Prints the table, then what was refused, wrong or failed."""
    console = console or Console(width=None if Console().is_terminal else 220)
    console.print(table(found))
    for line in remarks(found["rows"]):
        console.print(line, markup=False, highlight=False)


def table(found: dict[str, Any]) -> Table:
    """Microseconds of a call; the backend that the op chooses by itself is marked *."""
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in found["rows"]:
        groups.setdefault(tuple(row[key] for key in KEYS), []).append(row)
    contenders = dict.fromkeys(row["contender"] for row in found["rows"] if row["seconds"])
    title = (
        f"{found['gpu']}, {found['date']}: microseconds a call; * is chosen by default; "
        "(L2): the cache holds the weights"
    )
    if found["interpreted"]:
        title += "\nINTERPRETED ON THE CPU: the times and the bars mean nothing"
    shown = Table(title=title, box=SIMPLE_HEAD)
    for name in ("op", "case", "direction"):
        shown.add_column(name)
    for name in (*contenders, "bandwidth", "FLOP/s"):
        shown.add_column(name, justify="right")
    shown.add_column("bars")
    for key, rows in groups.items():
        by_name = {row["contender"]: row for row in rows}
        chosen = next((row for row in rows if row["chosen"]), {})
        op, model, projection, m, n, k, direction = key
        size = "x".join(str(axis) for axis in (m, n, k) if axis is not None)
        shown.add_row(
            op,
            f"{model} {projection} {size}",
            direction,
            *(cell(by_name.get(name)) for name in contenders),
            percent(chosen.get("bandwidth_share")),
            percent(chosen.get("flops_share")),
            bars(found["bars"], key) if op == "nf4_matmul" else "",
        )
    return shown


def cell(row: dict[str, Any] | None) -> str:
    """Microseconds; `wrong` or `failed`; empty where there is nothing to tell."""
    if row is None or row["outcome"] == "refused":
        return ""
    if row["seconds"] is None:
        return row["outcome"]
    warm = "" if row["cold"] else " (L2)"
    return f"{row['seconds'] * 1e6:.1f}{'*' if row['chosen'] else ''}{warm}"


def percent(share: float | None) -> str:
    """Of the device's peak."""
    return "" if share is None else f"{100 * share:.0f}%"


def bars(judged: list[dict[str, Any]], key: tuple) -> str:
    """`ok bf16 3.46 (3), NO bandwidth 0.61 (0.75), ? bitsandbytes (1.3)`: reached, and to reach."""
    words = {True: "ok", False: "NO", None: "?"}
    mine = [bar for bar in judged if tuple(bar[name] for name in KEYS[1:]) == key[1:]]
    return ", ".join(
        f"{words[bar['holds']]} {bar['against']} "
        + ("" if bar["value"] is None else f"{bar['value']:.2f} ")
        + f"({bar['at_least']:g})"
        for bar in mine
    )


def remarks(rows: list[dict[str, Any]]) -> Iterator[str]:
    """A line for each outcome and reason, with the number of products that it stands for."""
    counts: dict[tuple, int] = {}
    for row in rows:
        if row["reason"]:
            about = "" if row["outcome"] == "refused" else f" at {row['m']}x{row['n']}x{row['k']}"
            line = (row["outcome"], f"{row['op']} {row['contender']}{about}", row["reason"])
            counts[line] = counts.get(line, 0) + 1
    for (outcome, who, reason), count in sorted(counts.items()):
        yield f"{outcome}, {who}: {reason}" + (f" ({count} products)" if count > 1 else "")
