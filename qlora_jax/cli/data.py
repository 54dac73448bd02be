"""Shows what a run would train on: rows as ids and text, which tokens are trained, lengths.

No weight is read. Trained tokens are green and bold on a terminal.
"""

import argparse
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from qlora_jax.cli.options import config_arguments, positive
from qlora_jax.errors import printable

if TYPE_CHECKING:
    from rich.text import Text

    from qlora_jax.data.dataset import Dataset
    from qlora_jax.data.packing import TokenSequence

WIDTH = 40  # characters of the longest bar
TRAINED = "bold green"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the configuration, -n and --show-mask."""
    config_arguments(parser)
    parser.add_argument("-n", type=positive, default=3, help="sequences shown (default 3)")
    parser.add_argument(
        "--show-mask", action="store_true", help="a line a token: place, id, trained or not, text"
    )


def run(args: argparse.Namespace) -> None:
    """Prints the first sequences, a histogram of lengths, and what became of the rows."""
    from rich.console import Console

    from qlora_jax.train.config import TrainConfig
    from qlora_jax.workflows.training import data_of

    config = TrainConfig.from_yaml(args.config, args.overrides, required=("model", "dataset"))
    data, eval_data, notes, tokenizer = data_of(config)
    console = Console()
    for sequence in data.sequences[: args.n]:
        console.print(shown(sequence, tokenizer, args.show_mask), highlight=False, soft_wrap=True)
    print("\n".join(histogram(data)))
    print()
    print("\n".join(map(printable, [*notes, *summary(data, exact=eval_data is None)])))
    if eval_data is not None:
        print("evaluation data:")
        print("\n".join(map(printable, summary(eval_data, exact=False))))


def shown(sequence: "TokenSequence", tokenizer: Any, show_mask: bool) -> "Text":
    """One sequence: where it is from, its ids, and its text or its tokens."""
    from rich.text import Text

    trained = int(sequence.trained.sum())
    head = f"{printable(sequence.where)}: {len(sequence.ids)} tokens, {trained} trained\n"
    text = Text()
    text.append(head, style="dim")
    pairs = list(zip(sequence.ids.tolist(), sequence.trained.tolist(), strict=True))
    if show_mask:
        text.append("   place       id  trained  text\n")
        for place, (index, counts) in enumerate(pairs):
            word = printable(tokenizer.decode([index]))
            row = f"{place:>8} {index:>8}  {'yes' if counts else '-':<7}  {word}\n"
            text.append(row, style=TRAINED if counts else "")
        return text
    text.append(f"ids  {' '.join(map(str, sequence.ids.tolist()))}\n", style="dim")
    for ids, counts in runs(pairs):
        lines = map(printable, tokenizer.decode(ids).split("\n"))
        text.append("\n".join(lines), style=TRAINED if counts else "")
    text.append("\n")
    return text


def runs(pairs: list[tuple[int, bool]]) -> Iterator[tuple[list[int], bool]]:
    """Neighbours of one kind together, so that a character of several tokens stays whole."""
    start = 0
    for place in range(1, len(pairs) + 1):
        if place == len(pairs) or pairs[place][1] != pairs[start][1]:
            yield [index for index, _ in pairs[start:place]], pairs[start][1]
            start = place


def histogram(data: "Dataset") -> Iterator[str]:
    """A bar a power of two."""
    rows = data.statistics.histogram
    most = max(count for _, _, count in rows)
    yield "length in tokens   sequences"
    for low, high, count in rows:
        yield f"{f'{low:,} to {high:,}':>16}   {count:>9,} {'#' * round(WIDTH * count / most)}"


def summary(data: "Dataset", exact: bool) -> Iterator[str]:
    """What became of the rows; if it is known, cut and masked ones are counted even when none is.

    The parts of a split dataset no longer know which of their rows were cut.
    """
    found = data.statistics
    yield from found.lines()
    if exact and not found.truncated:
        yield "0 rows truncated"
    if exact and not found.dropped_untrained:
        yield "0 rows dropped: all labels masked"
