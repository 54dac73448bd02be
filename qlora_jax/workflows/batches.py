"""Where a run's micro batches come from: our loader, or any iterable of batches."""

import itertools
import math
from collections.abc import Iterable, Iterator, Sized
from typing import Any

import numpy as np

from qlora_jax.data.dataset import Dataset
from qlora_jax.data.loader import Loader
from qlora_jax.errors import InputError


class BatchSource:
    """Epochs of micro batches, in groups of one step each; every epoch can be entered midway.

    Args:
      data: a Dataset, which is shuffled anew each epoch, or an iterable of batches, which is
        iterated again for every epoch and must then give the same batches.
    """

    def __init__(
        self, data: Dataset | Iterable[Any], batch_size: int, accumulation: int, seed: int
    ):
        self.accumulation = accumulation
        self.loader = Loader(data, batch_size, seed=seed) if isinstance(data, Dataset) else None
        self.data = data

    @property
    def fingerprint(self) -> str:
        """Of the data and its settings; empty for an iterable, which has none."""
        return self.data.fingerprint if self.loader else ""

    @property
    def packed(self) -> bool:
        """Whether a row may hold several sequences, which only segment ids keep apart."""
        return not self.loader or self.data.packing

    def inputs(self, batch: dict[str, Any]) -> dict[str, Any]:
        """What the model has to know of a batch: no segment ids unless rows are packed.

        Attention is causal and padding stands last, so no counted token sees any, with ids or
        without; and without them a GPU may use kernels that take none (models/attention.py).
        """
        if self.packed:
            return batch
        return {name: values for name, values in batch.items() if name != "segment_ids"}

    @property
    def steps_per_epoch(self) -> int | None:
        """Optimizer steps in an epoch, a shorter last one counted; None if unknown."""
        if self.loader:
            return math.ceil(len(self.loader) / self.accumulation)
        return (
            math.ceil(len(self.data) / self.accumulation) if isinstance(self.data, Sized) else None
        )

    def largest(self) -> dict[str, np.ndarray] | None:
        """A micro batch of the largest shape; None for batches of the caller's own."""
        if not self.loader:
            return None
        return self.data.batch([int(np.argmax(self.data.row_lengths))], self.loader.batch_size)

    def groups(self, epoch: int, skip: int) -> Iterator[list[dict[str, np.ndarray]]]:
        """The steps of `epoch` behind its first `skip` batches: lists of micro batches.

        No list crosses the end of an epoch, so the last one may be shorter.
        """
        batches = self.loaded(epoch, skip) if self.loader else self.iterated(skip)
        while group := list(itertools.islice(batches, self.accumulation)):
            yield group

    def loaded(self, epoch: int, skip: int) -> Iterator[dict[str, np.ndarray]]:
        for rows in self.loader.batches(epoch)[skip:]:
            yield self.data.batch(rows, self.loader.batch_size)

    def iterated(self, skip: int) -> Iterator[Any]:
        if iter(self.data) is self.data:
            raise InputError(
                "DATA-ITERATOR",
                "data",
                "an iterator, which can be read only once",
                "a list or another iterable that begins anew each epoch",
            )
        return itertools.islice(iter(self.data), skip, None)


def real_tokens(batch: Any) -> int:
    """Tokens of a batch that are not padding."""
    segments = batch.get("segment_ids")
    return int(batch["input_ids"].size if segments is None else (np.asarray(segments) > 0).sum())
