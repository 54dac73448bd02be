"""Batches of a dataset, epoch after epoch, from a position that can be saved and gone back to."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from qlora_jax.data.dataset import Dataset, shuffled
from qlora_jax.errors import ConfigMismatch, InputError

Batch = dict[str, np.ndarray]


class Loader:
    """An endless iterator over batches; the order of an epoch is a function of (seed, epoch).

        loader = Loader(dataset, batch_size=4, seed=42)
        batch = next(loader)        # int32 (4, S): input_ids, labels, positions, segment_ids
        saved = loader.state()      # the batch that comes next
        loader.restore(saved)

    The rows that an epoch leaves for its last batch are followed by rows of padding (segment 0,
    labels -100), so that no batch has a shape of its own. When shuffled, a batch of the longest
    shape comes first: too little memory shows at the first step, and not hours later.

    Args:
      dataset: rows of equal length, or of at most four lengths; a batch has that of its longest.
      batch_size: rows of a batch.
      seed: of the shuffling, 0 or more.
      shuffle: another order each epoch; else the dataset's own.
      drop_last: leave out the batch that would not be full.

    Raises:
      InputError: a batch size or a seed out of range, or no full batch with `drop_last`.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        *,
        seed: int,
        shuffle: bool = True,
        drop_last: bool = False,
    ):
        if batch_size < 1:
            raise InputError("DATA-BATCH", "batch_size", f"{batch_size}", "1 or more")
        if seed < 0:
            raise InputError("DATA-SEED", "shuffle_seed", f"{seed}", "0 or more")
        if drop_last and len(dataset) < batch_size:
            found = f"{batch_size} with drop_last, and the dataset has {len(dataset)} rows"
            raise InputError("DATA-BATCH", "batch_size", found, hint="a smaller batch_size")
        self.dataset, self.batch_size, self.seed = dataset, batch_size, seed
        self.shuffle, self.drop_last = shuffle, drop_last
        self.number, self.position = 0, 0  # the epoch, and its batches given so far
        self.order = self.batches(0)

    def __len__(self) -> int:
        """Batches of an epoch."""
        full, rest = divmod(len(self.dataset), self.batch_size)
        return full + (rest > 0 and not self.drop_last)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        rows = self.order[self.position]
        self.position += 1
        if self.position == len(self.order):
            self.number, self.position = self.number + 1, 0
            self.order = self.batches(self.number)
        return self.dataset.batch(rows, self.batch_size)

    def epoch(self, number: int) -> Iterator[Batch]:
        """The batches of one epoch from its start; the loader's own position stays."""
        return (self.dataset.batch(rows, self.batch_size) for rows in self.batches(number))

    def batches(self, epoch: int) -> list[np.ndarray]:
        """The rows of each batch of an epoch, by index."""
        rows = np.arange(len(self.dataset))
        if self.shuffle:
            rows = rows[shuffled(len(rows), self.seed, epoch)]
        size = self.batch_size
        batches = [rows[at * size : (at + 1) * size] for at in range(len(self))]
        if self.shuffle:
            lengths = [max(self.dataset.row_lengths[row] for row in batch) for batch in batches]
            batches.insert(0, batches.pop(int(np.argmax(lengths))))
        return batches

    def state(self) -> dict[str, Any]:
        """Where the loader stands, for JSON: the next batch is `position` of `epoch`."""
        return {"epoch": self.number, "position": self.position, **self.identity()}

    def identity(self) -> dict[str, Any]:
        """What the order of batches depends on."""
        return {
            "fingerprint": self.dataset.fingerprint,
            "seed": self.seed,
            "batch_size": self.batch_size,
            "shuffle": self.shuffle,
            "drop_last": self.drop_last,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go where `state` says: the batches from here on are those of the loader that saved it.

        Raises:
          ConfigMismatch: other data or another order than when the state was saved.
          InputError: not a state of a loader.
        """
        for name, value in self.identity().items():
            if state.get(name) != value:
                found = f"saved with {state.get(name)!r}, now {value!r}"
                hint = "the data and options that the run was started with"
                raise ConfigMismatch("DATA-STATE", f"data position, {name}", found, hint=hint)
        epoch, position = state.get("epoch"), state.get("position")
        if type(epoch) is not int or type(position) is not int:
            raise InputError("DATA-STATE", "data position", "epoch or position is no integer")
        if epoch < 0 or not 0 <= position < len(self):
            found = f"epoch {epoch}, position {position}"
            raise InputError("DATA-STATE", "data position", found, f"0 to {len(self) - 1}")
        self.number, self.position = epoch, position
        self.order = self.batches(epoch)
