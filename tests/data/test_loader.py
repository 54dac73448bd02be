"""Batches are a function of (seed, epoch), and a restored loader goes on exactly where it was."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_jax.data import Loader, load_dataset
from qlora_jax.errors import ConfigMismatch, InputError
from tests.data.small_tokenizer import byte_level

TOKENIZER = byte_level()


def dataset(rows=7, **options):
    texts = [{"text": f"{number:02d}" + "x" * (number % 5)} for number in range(rows)]
    return load_dataset(texts, TOKENIZER, max_seq_length=9, **options)


UNPACKED = dataset(packing=False)
PACKED = dataset(rows=12)


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def rows_of(batches) -> list[bytes]:
    """Every row that is no padding, as bytes."""
    return [
        ids.tobytes()
        for batch in batches
        for ids, segments in zip(batch["input_ids"], batch["segment_ids"], strict=True)
        if segments.any()
    ]


@pytest.mark.parametrize("data", [UNPACKED, PACKED])
@given(
    taken=st.integers(0, 20),
    batch_size=st.integers(1, 8),
    seed=st.integers(0, 2**64),
    shuffle=st.booleans(),
)
def test_resume_gives_the_remaining_batches(data, taken, batch_size, seed, shuffle):
    loader = Loader(data, batch_size, seed=seed, shuffle=shuffle)
    for _ in range(taken):
        next(loader)
    state = json.loads(json.dumps(loader.state()))
    resumed = Loader(data, batch_size, seed=seed, shuffle=shuffle)
    resumed.restore(state)
    for a, b in itertools.islice(zip(loader, resumed, strict=True), 12):
        assert same(a, b)
    assert loader.state() == resumed.state()


@given(batch_size=st.integers(1, 9), epoch=st.integers(0, 1000), seed=st.integers(0, 1000))
def test_an_epoch_is_every_row_once_in_batches_of_one_shape(batch_size, epoch, seed):
    loader = Loader(UNPACKED, batch_size, seed=seed)
    batches = list(loader.epoch(epoch))
    assert len(batches) == len(loader)
    assert {batch["input_ids"].shape for batch in batches} == {(batch_size, 9)}
    every = rows_of([UNPACKED.batch(range(7), 7)])
    assert sorted(rows_of(batches)) == sorted(every)
    assert all(values.dtype == np.int32 for batch in batches for values in batch.values())


def test_padding_rows_stand_behind_and_count_nothing():
    last = list(Loader(UNPACKED, 4, seed=0, shuffle=False).epoch(0))[-1]
    assert last["segment_ids"].any(1).tolist() == [True, True, True, False]
    assert (last["labels"][3] == -100).all()
    assert not last["input_ids"][3].any()


def test_drop_last_leaves_out_the_batch_that_is_not_full():
    loader = Loader(UNPACKED, 4, seed=0, drop_last=True)
    assert len(loader) == len(list(loader.epoch(0))) == 1
    assert len(rows_of(loader.epoch(0))) == 4


def test_epochs_and_seeds_differ_and_the_iterator_runs_through_them():
    loader = Loader(UNPACKED, 1, seed=5)
    orders = [tuple(rows_of(loader.epoch(epoch))) for epoch in range(20)]
    assert len(set(orders)) == 20
    assert tuple(rows_of(Loader(UNPACKED, 1, seed=6).epoch(0))) not in orders
    assert tuple(rows_of(itertools.islice(loader, 14))) == orders[0] + orders[1]
    assert (loader.state()["epoch"], loader.state()["position"]) == (2, 0)


def test_without_shuffling_the_order_is_the_dataset_s():
    loader = Loader(UNPACKED, 2, seed=0, shuffle=False)
    assert rows_of(loader.epoch(3)) == rows_of([UNPACKED.batch(range(7), 7)])


def test_the_order_is_pinned():
    """The order of a run that was saved must be found again by every later version."""
    order = np.concatenate(Loader(UNPACKED, 2, seed=42).batches(1))
    assert order.tolist() == [3, 4, 2, 5, 6, 0, 1]


def test_the_longest_shape_comes_first():
    texts = [{"text": "x" * length} for length in (5, 5, 5, 100, 5, 5, 30)]
    data = load_dataset(texts, TOKENIZER, max_seq_length=128, packing=False)
    for epoch in range(10):
        first, *rest = Loader(data, 2, seed=0).epoch(epoch)
        assert first["input_ids"].shape == (2, 128)
        assert all(batch["input_ids"].shape[1] <= 32 for batch in rest)


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("fingerprint", lambda: Loader(dataset(rows=8, packing=False), 2, seed=0)),
        ("seed", lambda: Loader(UNPACKED, 2, seed=1)),
        ("batch_size", lambda: Loader(UNPACKED, 3, seed=0)),
        ("shuffle", lambda: Loader(UNPACKED, 2, seed=0, shuffle=False)),
        ("drop_last", lambda: Loader(UNPACKED, 2, seed=0, drop_last=True)),
    ],
)
def test_a_state_of_other_data_or_order_is_refused(name, other):
    state = Loader(UNPACKED, 2, seed=0).state()
    with pytest.raises(ConfigMismatch, match=f"data position, {name}: saved with .*, now "):
        other().restore(state)


@pytest.mark.parametrize(
    "change", [{"epoch": -1}, {"position": 4}, {"position": "1"}, {"epoch": True}]
)
def test_a_state_that_is_none_is_refused(change):
    loader = Loader(UNPACKED, 2, seed=0)
    with pytest.raises(InputError, match="data position"):
        loader.restore(loader.state() | change)


def test_arguments_are_checked():
    with pytest.raises(InputError, match="batch_size: 0"):
        Loader(UNPACKED, 0, seed=0)
    with pytest.raises(InputError, match="shuffle_seed: -1"):
        Loader(UNPACKED, 1, seed=-1)
    with pytest.raises(InputError, match="8 with drop_last, and the dataset has 7 rows"):
        Loader(UNPACKED, 8, seed=0, drop_last=True)
