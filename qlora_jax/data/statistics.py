"""What a dataset holds and what became of its rows, in numbers that are printed before a run."""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Any

from qlora_jax.data.packing import TokenSequence


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Counts of rows, sequences and tokens.

    rows = kept + invalid + dropped_long + dropped_untrained: every row is in one of them.

    Attributes:
      rows: read from the source; `split` gives each part its own.
      kept: rows with at least one sequence in the dataset.
      invalid: malformed rows, skipped because the caller said so.
      dropped_long: rows over max_seq_length, dropped whole by overlong=drop.
      dropped_untrained: rows of which overlong=truncate or split left no trained token.
      pieces_untrained: pieces of divided rows, left out for want of a trained token.
      truncated: rows cut at max_seq_length and kept.
      divided: rows cut into several sequences.
      sequences, tokens, trained_tokens: what is trained on; a trained token is a counted target.
      batch_rows, batch_tokens: rows of batches, and their tokens with padding.
      longest: tokens of the longest sequence.
      histogram: (shortest, longest, sequences) by powers of two of the length.
      notes: what was decided from the data, a sentence each.
      rejected: the message of each malformed row, with its file and line.
    """

    rows: int
    kept: int
    invalid: int
    dropped_long: int
    dropped_untrained: int
    pieces_untrained: int
    truncated: int
    divided: int
    sequences: int
    tokens: int
    trained_tokens: int
    batch_rows: int
    batch_tokens: int
    longest: int
    histogram: tuple[tuple[int, int, int], ...]
    notes: tuple[str, ...]
    rejected: tuple[str, ...]

    @property
    def trained_percent(self) -> float:
        """Trained tokens, in percent of all."""
        return 100 * self.trained_tokens / self.tokens

    @property
    def packing_efficiency(self) -> float:
        """Tokens that are not padding, 0 to 1."""
        return self.tokens / self.batch_tokens

    def to_json(self) -> dict[str, Any]:
        """Every number, by name."""
        derived = {
            "trained_percent": self.trained_percent,
            "packing_efficiency": self.packing_efficiency,
        }
        return dataclasses.asdict(self) | derived

    def lines(self) -> list[str]:
        """The same for people, a sentence a line; what did not happen is not said."""
        lines = [
            f"rows {self.rows:,}, kept {self.kept:,}",
            f"sequences {self.sequences:,} in {self.batch_rows:,} rows of batches, "
            f"{100 * self.packing_efficiency:.1f}% filled",
            f"tokens {self.tokens:,}, trained {self.trained_tokens:,} "
            f"({self.trained_percent:.1f}%), longest sequence {self.longest:,}",
        ]
        events = (
            (self.invalid, "malformed rows skipped"),
            (self.truncated, "rows truncated at max_seq_length"),
            (self.divided, "rows split at max_seq_length"),
            (self.dropped_long, "rows dropped: longer than max_seq_length"),
            (self.dropped_untrained, "rows dropped: cut at max_seq_length, no trained token left"),
            (self.pieces_untrained, "pieces of split rows dropped: no trained token"),
        )
        return [*lines, *(f"{count:,} {what}" for count, what in events if count), *self.notes]


def histogram(lengths: Sequence[int]) -> tuple[tuple[int, int, int], ...]:
    """How many lengths lie in 1-1, 2-3, 4-7, 8-15 ...: (shortest, longest, count), none left out.

    lengths 1 3 9  ->  (1, 1, 1) (2, 3, 1) (4, 7, 0) (8, 15, 1)
    """
    powers = Counter(length.bit_length() - 1 for length in lengths)
    span = range(min(powers), max(powers) + 1)
    return tuple((1 << power, (2 << power) - 1, powers[power]) for power in span)


def measure(
    sequences: Sequence[TokenSequence],
    row_lengths: Sequence[int],
    events: Counter,
    notes: Sequence[str] = (),
    rejected: Sequence[str] = (),
) -> Statistics:
    """Statistics of the sequences and the rows that hold them; `events` counts the fields' names.

    Args:
      sequences: at least one.
      row_lengths: tokens of each row of batches, padding too.
      events: rows, invalid, dropped_long ... by the names of `Statistics`; absent is 0.
    """
    lengths = [len(sequence.ids) for sequence in sequences]
    counted = ("rows", "invalid", "dropped_long", "dropped_untrained", "pieces_untrained")
    counted += ("truncated", "divided")
    return Statistics(
        **{name: events[name] for name in counted},
        kept=len({sequence.where for sequence in sequences}),
        sequences=len(sequences),
        tokens=sum(lengths),
        trained_tokens=sum(sequence.targets for sequence in sequences),
        batch_rows=len(row_lengths),
        batch_tokens=sum(row_lengths),
        longest=max(lengths),
        histogram=histogram(lengths),
        notes=tuple(notes),
        rejected=tuple(rejected),
    )
