"""Perplexity: how surprised a model is by text, over fixed windows or over a dataset's targets."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from qlora_jax.adapters.adapter import Adapter
from qlora_jax.adapters.stack import NONE, AdapterStack, Which
from qlora_jax.data.dataset import Dataset
from qlora_jax.data.loader import Loader
from qlora_jax.data.packing import empty_rows
from qlora_jax.errors import InputError, NonFinite
from qlora_jax.models.decoder import Decoder
from qlora_jax.models.layerwise import LayerwiseDecoder
from qlora_jax.train import pipeline
from qlora_jax.train.loss import Batch, loss_fn, sums_of

batch_loss = jax.jit(loss_fn, static_argnames="spec")


@jax.jit
def stack_loss(
    stack: AdapterStack, index: Int[Array, " B"], model: Decoder, batch: Batch
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """`loss_fn` of a batch whose rows have adapters of their own."""
    hidden = model.hidden(
        batch["input_ids"],
        positions=batch["positions"],
        segment_ids=batch["segment_ids"],
        adapter=stack,
        adapter_index=index,
    )
    sums, count = sums_of(hidden, model, batch["labels"], None)
    return sums.loss, count


@dataclasses.dataclass(frozen=True)
class PerplexityResult:
    """A mean over targets.

    Attributes:
      mean_nll: of -log p, in nats.
      perplexity: exp(mean_nll).
      targets: how many tokens were predicted.
    """

    mean_nll: float
    perplexity: float
    targets: int


def perplexity(
    model: Decoder | LayerwiseDecoder,
    data: Dataset | np.ndarray,
    *,
    adapter: Adapter | AdapterStack | None = None,
    adapter_index: Which = None,
    batch_size: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> PerplexityResult:
    """exp of the mean next-token negative log likelihood, every target weighing the same.

        result = perplexity(model, windows(ids, 256))       # 255 targets a window

    One program runs a shape, and no logits of a whole batch are kept (train/loss.py).

    Args:
      model: the base.
      data: windows (N, S) int32 of token ids, each token but a window's first a target; or a
        Dataset, whose own labels say what counts.
      adapter: trained on this base; None is the base alone; or a stack of several.
      adapter_index: with a stack, which of them: one for all data, or for windows one for each.
      batch_size: windows or rows at a time; the result does not depend on it but for rounding.
      progress: called with batches done and batches in all, after each.

    Raises:
      InputError: EVAL-..., windows of another shape, or nothing to predict; STACK-INDEX.
      NonFinite: a batch has a loss that is NaN or infinite.
    """
    batches, in_all = batches_of(data, batch_size, model.config.vocab_size)
    loss_of = batch_losses(model, adapter, adapter_index, data, batch_size)
    total, targets = 0.0, 0
    for number, batch in enumerate(batches, 1):
        loss, count = loss_of(batch)
        if not math.isfinite(loss):
            raise NonFinite("EVAL-NAN", f"batch {number}", f"the loss is {float(loss)}", "finite")
        total, targets = total + float(loss), targets + int(count)
        if progress:
            progress(number, in_all)
    if not targets:
        raise InputError("EVAL-EMPTY", "evaluation data", "no target to predict", "at least one")
    mean = total / targets
    return PerplexityResult(mean, float(np.exp(np.float64(mean))), targets)


def batches_of(
    data: Dataset | np.ndarray, batch_size: int, vocab_size: int
) -> tuple[Iterator[dict[str, np.ndarray]], int]:
    """(batches, how many), in the data's own order; windows are checked first.

    Raises:
      InputError: EVAL-WINDOW, EVAL-VOCAB.
    """
    if isinstance(data, Dataset):
        batch_size = min(batch_size, max(1, len(data)))
        loader = Loader(data, batch_size, seed=0, shuffle=False)
        return loader.epoch(0), len(loader)
    data = checked_windows(data, vocab_size)
    return window_batches(data, batch_size), math.ceil(len(data) / batch_size)


def batch_losses(
    model: Decoder | LayerwiseDecoder,
    adapter: Adapter | AdapterStack | None,
    which: Which,
    data: Dataset | np.ndarray,
    batch_size: int,
) -> Callable[[Batch], tuple[Array, Array]]:
    """The loss of a batch; batches come in the data's order."""
    if not isinstance(adapter, AdapterStack):
        if which is not None:
            found = "given, and the adapter is not a stack"
            raise InputError("STACK-INDEX", "adapter_index", found, "an AdapterStack")
        params, spec = ({}, None) if adapter is None else (adapter.params, adapter.spec)
        loss_of = pipeline.loss_fn if isinstance(model, LayerwiseDecoder) else batch_loss
        return lambda batch: loss_of(params, model, batch, spec=spec)
    if isinstance(model, LayerwiseDecoder):
        found = "is a stack, and the layers come one by one"
        raise InputError("STACK-KIND", "adapter", found, "one adapter at a time")
    # Rows of a dataset hold several texts: one adapter for all of them is all that can be asked.
    rows = min(batch_size, len(data)) if isinstance(data, Dataset) else len(data)
    index = np.asarray(adapter.index(which, rows))
    if isinstance(data, Dataset):
        return lambda batch: stack_loss(adapter, index, model, batch)
    batch_size = min(batch_size, rows)
    padded = np.concatenate([index, np.full(-rows % batch_size, NONE, np.int32)])
    parts = iter(padded.reshape(-1, batch_size))
    return lambda batch: stack_loss(adapter, next(parts), model, batch)


def windows(ids: Sequence[int], length: int, where: str = "text") -> np.ndarray:
    """Token ids cut into windows (N, length) int32, one after another; the rest is dropped.

    ids 1 2 3 4 5 6 7, length 3  ->  [[1 2 3] [4 5 6]]

    Args:
      ids: of one text.
      length: tokens of a window.
      where: what the text is called in an error.

    Raises:
      InputError: fewer ids than one window.
    """
    if length < 2:
        raise InputError("EVAL-WINDOW", "length", f"{length}", "at least 2")
    if len(ids) < length:
        found = f"{len(ids)} tokens"
        raise InputError("EVAL-WINDOW", where, found, f"at least one window of {length}")
    count = len(ids) // length
    return np.array(ids[: count * length], np.int32).reshape(count, length)


def checked_windows(data: np.ndarray, vocab_size: int) -> np.ndarray:
    """The windows as int32, refused when they are none."""
    data = np.asarray(data)
    if data.ndim != 2 or not len(data) or data.shape[1] < 2 or data.dtype.kind not in "iu":
        found = f"shape {data.shape} of {data.dtype}"
        raise InputError("EVAL-WINDOW", "windows", found, "integers (N, S), S at least 2")
    if data.min() < 0 or data.max() >= vocab_size:
        found = f"token ids {data.min()} to {data.max()}"
        raise InputError("EVAL-VOCAB", "windows", found, f"0 to {vocab_size - 1}")
    return data.astype(np.int32)


def window_batches(data: np.ndarray, batch_size: int) -> Iterator[dict[str, np.ndarray]]:
    """Batches of equal shape; the last one is filled up with rows that count nothing."""
    batch_size = min(batch_size, len(data))
    for start in range(0, len(data), batch_size):
        rows = data[start : start + batch_size]
        batch = empty_rows(batch_size, data.shape[1])
        for name in ("input_ids", "labels"):
            batch[name][: len(rows)] = rows
        batch["positions"][: len(rows)] = np.arange(data.shape[1])
        batch["segment_ids"][: len(rows)] = 1
        yield batch
