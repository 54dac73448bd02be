"""Packing loses no token and leaks none, and the rows of its docstring are what it makes."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_jax.data.packing import TokenSequence, best_fit, make_row, row_lengths

CAPACITY = 16


def sequence(ids, trained) -> TokenSequence:
    return TokenSequence(np.array(ids, np.int32), np.array(trained, bool), "row")


sequences = st.lists(
    st.lists(st.tuples(st.integers(0, 99), st.booleans()), min_size=1, max_size=CAPACITY).map(
        lambda pairs: sequence(*zip(*pairs, strict=True))
    ),
    min_size=1,
    max_size=30,
)


def test_the_rows_of_the_docstring():
    pair = [sequence([5, 6, 7, 8], [0, 0, 1, 1]), sequence([9, 4, 3], [1, 1, 1])]
    row = make_row(pair, 9)
    drawn = [line.split() for line in make_row.__doc__.splitlines()]
    drawn = {
        words[0]: [int(word) for word in words[1:]]
        for words in drawn
        if words[:1] != [] and words[0] in row
    }
    assert drawn.keys() == row.keys()
    for name, values in row.items():
        assert values.dtype == np.int32
        assert values.tolist() == drawn[name], name


def test_the_rows_of_best_fit():
    assert best_fit([5, 3, 6, 2], 8) == [(2, 3), (0, 1)]
    assert "lengths 5 3 6 2, capacity 8  ->  rows (2, 3) (0, 1)" in best_fit.__doc__


@given(sequences)
def test_nothing_is_lost_leaked_or_mislabelled(items):
    rows = best_fit([len(item.ids) for item in items], CAPACITY)
    assert sorted(index for row in rows for index in row) == list(range(len(items)))
    for row in rows:
        made = make_row([items[index] for index in row], CAPACITY)
        used = made["segment_ids"] > 0
        for segment, index in enumerate(row, 1):
            ids, trained, _ = items[index]
            here = made["segment_ids"] == segment
            assert made["input_ids"][here].tolist() == ids.tolist()
            assert made["positions"][here].tolist() == list(range(len(ids)))
            expected = [token if t else -100 for token, t in zip(ids, trained, strict=True)]
            assert made["labels"][here].tolist() == [-100, *expected[1:]]
        assert (np.diff(made["segment_ids"][used]) >= 0).all()  # each segment is in one piece
        assert not made["input_ids"][~used].any()
        assert not made["positions"][~used].any()
        assert (made["labels"][~used] == -100).all()


@given(st.lists(st.integers(1, CAPACITY), min_size=1, max_size=60))
def test_rows_hold_what_fits_and_are_few(lengths):
    rows = best_fit(lengths, CAPACITY)
    filled = [sum(lengths[index] for index in row) for row in rows]
    assert max(filled) <= CAPACITY
    fewest = math.ceil(sum(lengths) / CAPACITY)
    assert len(rows) <= 2 * fewest  # no two rows together fit into one
    assert rows == best_fit(lengths, CAPACITY)


def best_fit_by_search(lengths, capacity):
    """The same by looking at every row: the fullest that fits, the one last touched of equals."""
    rows, stack = [], []  # stack: rows in the order in which they were last touched
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        space = {row: capacity - sum(lengths[i] for i in rows[row]) for row in stack}
        fitting = [row for row in stack if space[row] >= lengths[index]]
        if fitting:
            fullest = min(space[row] for row in fitting)
            row = [row for row in fitting if space[row] == fullest][-1]
            stack.remove(row)
        else:
            row = len(rows)
            rows.append([])
        rows[row].append(index)
        stack.append(row)
    return [tuple(row) for row in rows]


@given(st.lists(st.integers(1, CAPACITY), min_size=1, max_size=40))
def test_best_fit_is_what_a_search_finds(lengths):
    assert best_fit(lengths, CAPACITY) == best_fit_by_search(lengths, CAPACITY)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="sequence 1 has 9 tokens; a row holds 1 to 8"):
        best_fit([3, 9], 8)
    with pytest.raises(ValueError, match="4 tokens in a row of 3"):
        make_row([sequence([1, 2, 3, 4], [1] * 4)], 3)


@given(st.integers(2, 5000))
def test_few_row_lengths(longest):
    lengths = row_lengths(longest)
    assert lengths[-1] == longest
    assert len(lengths) <= 4
    assert lengths == sorted(set(lengths))
    for shorter, longer in itertools.pairwise(lengths):
        assert 2 * shorter >= longer


def test_row_lengths_of_a_usual_limit():
    assert row_lengths(2048) == [256, 512, 1024, 2048]
    assert row_lengths(20) == [16, 20]
