"""Token sequences arranged in rows of batches, with a fingerprint of both."""

import bisect
import dataclasses
import functools
import hashlib
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from qlora_jax.data.packing import TokenSequence, best_fit, empty_rows, make_row, row_lengths
from qlora_jax.data.statistics import Statistics, measure
from qlora_jax.errors import InputError


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """Token sequences and the rows of batches that they make; `len` counts those rows.

    Attributes:
      sequences: in the source's order.
      rows: which sequences each row holds, by index.
      row_lengths: tokens of each row with its padding; at most four different ones.
      max_seq_length: tokens of the longest row.
      packing: several sequences share a row.
      statistics: what was read, kept and dropped.
    """

    sequences: tuple[TokenSequence, ...]
    rows: tuple[tuple[int, ...], ...]
    row_lengths: tuple[int, ...]
    max_seq_length: int
    packing: bool
    statistics: Statistics

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, rows: Sequence[int], size: int) -> dict[str, np.ndarray]:
        """These rows as int32 arrays (size, S), S that of the longest; rows of padding follow."""
        length = max(self.row_lengths[row] for row in rows)
        batch = empty_rows(size, length)
        for at, row in enumerate(rows):
            made = make_row((self.sequences[index] for index in self.rows[row]), length)
            for name, values in made.items():
                batch[name][at] = values
        return batch

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256, in hex, of all that batches are made of: ids, masks, packing and length."""
        digest = hashlib.sha256(f"1 {self.max_seq_length} {self.packing}".encode())
        for ids, trained, _ in self.sequences:
            digest.update(len(ids).to_bytes(8, "little"))
            digest.update(ids.astype("<i4").tobytes())
            digest.update(trained.tobytes())
        return digest.hexdigest()

    def split(self, val_size: float, seed: int = 0) -> tuple["Dataset", "Dataset"]:
        """A training and a validation dataset: rows drawn at random, a split row's pieces together.

        Args:
          val_size: a part of the rows, over 0 and below 1, or a number of rows; at least one row
            goes to either side.
          seed: the same seed draws the same rows.

        Raises:
          InputError: a `val_size` that leaves one side empty.
        """
        sources = list(dict.fromkeys(sequence.where for sequence in self.sequences))
        rows = len(sources)
        count = max(1, round(val_size * rows)) if 0 < val_size < 1 else val_size
        if not 1 <= count < rows or count != int(count):
            expected = f"over 0 and below 1, or 1 to {rows - 1} of the {rows} rows"
            raise InputError("DATA-VAL", "val_size", f"{val_size}", expected)
        drawn = {sources[at] for at in shuffled(rows, seed)[: int(count)]}
        return self.only(lambda where: where not in drawn), self.only(drawn.__contains__)

    def only(self, wanted: Callable[[str], bool]) -> "Dataset":
        """The part whose sequences come from the rows that are wanted."""
        sequences = [sequence for sequence in self.sequences if wanted(sequence.where)]
        events = Counter(rows=len({sequence.where for sequence in sequences}))
        return make_dataset(sequences, self.max_seq_length, self.packing, events)


def shuffled(length: int, *seed: int) -> np.ndarray:
    """0 .. length-1 in an order that is a function of the seed alone, on every version of numpy.

    numpy promises that a bit generator's raw numbers stay as they are, and of `permutation` not.
    """
    raw = np.random.Philox(np.random.SeedSequence(seed)).random_raw(length)
    return np.argsort(raw, kind="stable")


def make_dataset(
    sequences: Sequence[TokenSequence],
    max_seq_length: int,
    packing: bool,
    events: Counter,
    notes: Sequence[str] = (),
    rejected: Sequence[str] = (),
) -> Dataset:
    """A dataset of at least one sequence, none longer than `max_seq_length`, and its statistics."""
    lengths = [len(sequence.ids) for sequence in sequences]
    if packing:
        rows = best_fit(lengths, max_seq_length)
        padded = [max_seq_length] * len(rows)
    else:
        rows = [(index,) for index in range(len(sequences))]
        choices = row_lengths(max_seq_length)
        padded = [choices[bisect.bisect_left(choices, length)] for length in lengths]
    statistics = measure(sequences, padded, events, notes, rejected)
    return Dataset(
        tuple(sequences), tuple(rows), tuple(padded), max_seq_length, packing, statistics
    )
