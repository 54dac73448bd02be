"""From rows to a dataset: long rows, the account of every row, splits, fingerprints."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_jax.data import load_dataset
from qlora_jax.data.statistics import histogram
from qlora_jax.errors import InputError
from tests.data.small_tokenizer import byte_level

TOKENIZER = byte_level()


def texts(*lengths: int) -> list[dict]:
    """Rows of so many tokens, EOS counted."""
    return [{"text": "x" * (length - 1)} for length in lengths]


def load(rows, max_seq_length=8, **options):
    return load_dataset(rows, TOKENIZER, max_seq_length=max_seq_length, **options)


def lengths(dataset) -> list[int]:
    return [len(sequence.ids) for sequence in dataset.sequences]


@pytest.mark.parametrize(
    ("policy", "left", "counts"),
    [
        ("truncate", [5, 8, 8, 8], {"truncated": 2}),
        ("drop", [5, 8], {"dropped_long": 2}),
        ("split", [5, 8, 2, 8, 8, 8], {"divided": 2, "pieces_untrained": 1}),
    ],
)
def test_long_rows(policy, left, counts):
    """The 17th token of the third row would be a piece of its own, with nothing to predict it."""
    dataset = load(texts(5, 10, 8, 17), overlong=policy)
    statistics = dataset.statistics
    assert lengths(dataset) == left
    names = ("truncated", "dropped_long", "divided", "pieces_untrained", "dropped_untrained")
    expected = dict.fromkeys(names, 0) | counts
    assert {name: getattr(statistics, name) for name in names} == expected
    assert statistics.rows == 4
    assert statistics.kept == 4 - statistics.dropped_long


def test_a_long_row_as_an_error():
    with pytest.raises(InputError) as caught:
        load(texts(5, 1234), overlong="error", skip_invalid=True)
    assert str(caught.value) == (
        "error[DATA-LONG]: row 2: the row has 1,234 tokens (expected at most 8). "
        "Try: overlong=truncate, drop or split, or a larger max_seq_length."
    )


@pytest.mark.parametrize("policy", ["truncate", "split"])
def test_a_row_without_a_trained_token_after_the_cut_is_dropped(policy):
    rows = [{"prompt": "p" * 15, "completion": "c"}, {"prompt": "p", "completion": "c"}]
    cut = load(rows, max_seq_length=15, overlong="truncate")
    assert lengths(cut) == [3]
    assert cut.statistics.dropped_untrained == 1
    told = "1 rows dropped: cut at max_seq_length, no trained token left"
    assert told in cut.statistics.lines()
    # Split at 15: the second piece is the completion, whose first token nothing predicts.
    split = load(rows, max_seq_length=15, overlong="split")
    assert lengths(split) == [2, 3]
    assert split.sequences[0].targets == 1


def test_a_dataset_of_which_nothing_is_left():
    rows = [{"prompt": "p" * 20, "completion": "c"}, {"prompt": "p", "completion": ""}]
    with pytest.raises(InputError) as caught:
        load(rows, skip_invalid=True)
    assert str(caught.value) == (
        "error[DATA-EMPTY]: dataset: empty: none of 2 rows is left (1 malformed; 1 all labels "
        "masked: no trained token within max_seq_length=8) (expected at least one row). "
        "Try: a larger max_seq_length."
    )
    with pytest.raises(InputError, match="none of 0 rows is left"):
        load([])
    with pytest.raises(InputError, match="1 longer than max_seq_length=8"):
        load(texts(9), overlong="drop")


@given(
    st.lists(st.integers(2, 30) | st.none(), min_size=1, max_size=20),
    st.sampled_from(["truncate", "drop", "split"]),
    st.booleans(),
)
def test_every_row_is_accounted_for_and_split_loses_no_token(sizes, policy, packing):
    rows = [{"text": ""} if size is None else texts(size)[0] for size in sizes]
    rows.append({"text": "kept"})
    dataset = load(rows, overlong=policy, packing=packing, skip_invalid=True)
    s = dataset.statistics
    assert s.rows == s.kept + s.invalid + s.dropped_long + s.dropped_untrained == len(rows)
    assert s.invalid == len(s.rejected) == sizes.count(None)
    assert s.tokens == sum(lengths(dataset))
    assert s.batch_tokens == sum(dataset.row_lengths)
    if policy == "split":
        assert s.tokens == sum(size for size in sizes if size) + 5 - s.pieces_untrained
    labels = 0
    for row in range(len(dataset)):
        batch = dataset.batch([row], 1)
        assert batch["input_ids"].shape == (1, dataset.row_lengths[row])
        labels += (batch["labels"] != -100).sum()
    assert labels == s.trained_tokens


def test_statistics_of_a_small_dataset():
    rows = [{"prompt": "pp", "completion": "cccc"}, {"prompt": "p", "completion": "c"}]
    statistics = load(rows, max_seq_length=10).statistics
    assert (statistics.tokens, statistics.trained_tokens) == (10, 7)
    assert statistics.trained_percent == 70
    assert statistics.packing_efficiency == 1
    assert statistics.lines()[:3] == [
        "rows 2, kept 2",
        "sequences 2 in 1 rows of batches, 100.0% filled",
        "tokens 10, trained 7 (70.0%), longest sequence 7",
    ]
    assert json.loads(json.dumps(statistics.to_json()))["histogram"] == [[2, 3, 1], [4, 7, 1]]
    assert load(rows, max_seq_length=10, packing=False).statistics.packing_efficiency == 0.5


def test_histogram():
    assert histogram([1, 3, 9]) == ((1, 1, 1), (2, 3, 1), (4, 7, 0), (8, 15, 1))
    assert "lengths 1 3 9  ->  (1, 1, 1) (2, 3, 1) (4, 7, 0) (8, 15, 1)" in histogram.__doc__


def test_a_batch_has_the_length_of_its_longest_row_and_padding_rows():
    dataset = load(texts(3, 20, 100), max_seq_length=128, packing=False)
    assert dataset.row_lengths == (16, 32, 128)
    batch = dataset.batch([0, 1], 3)
    assert {name: values.shape for name, values in batch.items()} == dict.fromkeys(
        ("input_ids", "labels", "positions", "segment_ids"), (3, 32)
    )
    assert batch["segment_ids"].sum(1).tolist() == [3, 20, 0]
    assert (batch["labels"][2] == -100).all()


def test_split_keeps_the_pieces_of_a_row_together():
    dataset = load([{"text": chr(97 + i) * 20} for i in range(10)], overlong="split")
    train, validation = dataset.split(0.3, seed=1)
    kept = [{s.where for s in part.sequences} for part in (train, validation)]
    assert [len(rows) for rows in kept] == [7, 3]
    assert not kept[0] & kept[1]
    assert len(train.sequences) + len(validation.sequences) == len(dataset.sequences) == 30
    assert [part.statistics.rows for part in (train, validation)] == [7, 3]
    again = dataset.split(3, seed=1)
    assert [part.fingerprint for part in again] == [train.fingerprint, validation.fingerprint]
    assert dataset.split(3, seed=2)[1].fingerprint != validation.fingerprint


@pytest.mark.parametrize("size", [0, -0.5, 10, 2.5, float("nan"), float("inf")])
def test_a_split_with_an_empty_side_is_refused(size):
    with pytest.raises(InputError, match=r"val_size.*1 to 9 of the 10 rows"):
        load(texts(*[5] * 10)).split(size)


def test_the_fingerprint_knows_ids_masks_and_arrangement():
    rows = [{"prompt": "p", "completion": "cc"}]
    base = load(rows)
    assert base.fingerprint == load(rows).fingerprint
    assert len(base.fingerprint) == 64
    others = [
        load([{"prompt": "p", "completion": "cd"}]),
        load([{"prompt": "pc", "completion": "c"}]),
        load(rows, train_on="all"),
        load(rows, packing=False),
        load(rows, max_seq_length=9),
        load(rows + rows),
    ]
    assert len({dataset.fingerprint for dataset in [base, *others]}) == 7


def test_options_are_checked():
    with pytest.raises(InputError, match=r"train_on: unknown 'assistent'.*Try: assistant"):
        load(texts(5), train_on="assistent")
    with pytest.raises(InputError, match=r"overlong: unknown 'cut'"):
        load(texts(5), overlong="cut")
    with pytest.raises(InputError, match=r"max_seq_length: 1 \(expected at least 2\)"):
        load(texts(5), max_seq_length=1)


def test_progress_and_types():
    seen = []
    dataset = load(texts(3, 4, 5), progress=seen.append)
    assert seen == [1, 2, 3]
    assert {s.ids.dtype for s in dataset.sequences} == {np.dtype(np.int32)}
