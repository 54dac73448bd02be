"""A checked merge: the written model is opened again and must answer as base + adapter does.

The base is that which was merged into. Merging into the original weights of a base that was trained
on in 4 bits changes answers however well it is done: by how much is measured apart, and told.
"""

import dataclasses
import itertools
import os
import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np

from qlora_jax.adapters.adapter import Adapter
from qlora_jax.adapters.merge import merged_config, merged_weights
from qlora_jax.checkpoints.load import Source, source_dtype
from qlora_jax.checkpoints.merged import save_merged
from qlora_jax.checkpoints.shards import Shards
from qlora_jax.checkpoints.write_shards import SHARD_BYTES
from qlora_jax.errors import Note, StorageError
from qlora_jax.models import Decoder
from qlora_jax.quantization.tensor import QuantizedTensor
from qlora_jax.workflows.merge import refuse_packed
from qlora_jax.workflows.open import load_model

# Largest logit difference that passes, by the dtype of the merged weights. In float32 only the
# order of sums differs; bfloat16 rounds every merged weight to 8 bits, float16 to 11.
TOLERANCES = {"float32": 1e-2, "float16": 0.25, "bfloat16": 2.0}
TOKENS = 64  # compared positions of each row


@dataclasses.dataclass(frozen=True)
class MergeCheck:
    """How far the merged model's logits are from base + adapter, both computed in float32.

    Attributes:
      largest: largest absolute difference of a logit.
      mean: mean absolute difference.
      same_choice: share of positions at which both rank the same token first.
      tolerance: what `largest` was allowed to be.
      from_training: largest difference from the 4-bit base that was trained on, with its adapter,
        after merging into the original weights; None otherwise.
    """

    largest: float
    mean: float
    same_choice: float
    tolerance: float
    from_training: float | None = None

    @property
    def passed(self) -> bool:
        """Whether the difference is within the tolerance; NaN is not."""
        return self.largest <= self.tolerance


def checked_merge(
    model: Decoder,
    adapter: Adapter,
    out: str | Path,
    *,
    config: dict[str, Any],
    base: str = "dequantized",
    source: Source | None = None,
    dtype: str = "bfloat16",
    tolerance: float | None = None,
    ids: np.ndarray | None = None,
    extra_files: dict[str, bytes | Path] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> MergeCheck:
    """Writes the merged model to the new folder `out` and compares its logits with base + adapter.

    Args:
      model: the base that the adapter was trained on, 4-bit or dense; not changed.
      adapter: what is merged.
      out: a path where nothing is yet.
      config: config.json of the base.
      base: `dequantized`, which the adapter was trained on, or `original`, with `source`.
      source: reads the original weights, for base="original".
      dtype: of the written weights: float32, bfloat16 or float16.
      tolerance: largest logit difference that passes; by default one for each dtype.
      ids: token ids (B, S) to compare on; by default random ones from a fixed seed.
      extra_files: tokenizer and other files to put beside the weights.
      shard_bytes: more than this is split into shards with an index.

    Raises:
      InputError: `out` exists, the adapter is not finite, or MERGE-ORIGINAL.
      StorageError: MERGE-CHECK when the difference is above the tolerance; the folder is then kept
        under its name with `.failed` behind it, so that nobody takes it for the result.
    """
    refuse_packed(source)
    if ids is None:
        random = np.random.default_rng(0)
        ids = random.integers(0, model.config.vocab_size, (2, TOKENS)).astype(np.int32)
    expected, trained = answers(model, ids, adapter), None
    if base == "original":
        packed = any(isinstance(own, QuantizedTensor) for own in model.weights().values())
        trained = expected if packed else None
        original = load_model(source, quantization=None, dtype=source_dtype(source))
        expected = answers(original, ids, adapter)
        del original
    pairs = merged_weights(model, adapter, base=base, source=source, dtype=dtype)
    shape = merged_config(model.config, adapter)
    save_merged(
        shape, pairs, config, out, dtype=dtype, extra_files=extra_files, shard_bytes=shard_bytes
    )
    found = answers(reopened(Path(out)), ids, None)
    check = compare(found, expected, trained, tolerance or TOLERANCES[dtype])
    if not check.passed:
        failed = Path(out).rename(free_name(f"{Path(out)}.failed"))
        raise StorageError(
            "MERGE-CHECK",
            out,
            f"the merged model's logits differ by {check.largest:.3g} from base + adapter",
            f"at most {check.tolerance:.3g}",
            f"--dtype float32 or a larger --tolerance; see {failed}",
        )
    return check


def free_name(name: str) -> str:
    """`name`, or `name-2` and so on when that is taken: nothing is ever overwritten."""
    names = (name if count == 1 else f"{name}-{count}" for count in itertools.count(1))
    return next(free for free in names if not os.path.lexists(free))


def reopened(folder: Path) -> Decoder:
    """The model that was written, its weights as they are."""
    with Shards(folder) as written, warnings.catch_warnings():
        warnings.simplefilter("ignore", Note)  # the base's, which were told
        return load_model(written, quantization=None, dtype=source_dtype(written))


def answers(model: Decoder, ids: np.ndarray, adapter: Adapter | None) -> list[np.ndarray]:
    """The logits (S, V) of each row, computed in float32, so that the weights' rounding is all."""
    # Weights as they are, which costs no copy of them in float32.
    wide = Decoder.from_weights(model.config, model.weights(), "float32")
    logits = jax.jit(lambda model, ids, adapter: model(ids, adapter=adapter))
    return [np.asarray(logits(wide, row[None], adapter)[0]) for row in ids]


def compare(
    found: list[np.ndarray],
    expected: list[np.ndarray],
    trained: list[np.ndarray] | None,
    tolerance: float,
) -> MergeCheck:
    """The rows' logits of the merged model against those that it should have."""
    rows = list(zip(found, expected, strict=True))
    return MergeCheck(
        largest=furthest(found, expected),
        mean=float(np.mean([np.abs(own - other).mean() for own, other in rows])),
        same_choice=float(np.mean([own.argmax(-1) == other.argmax(-1) for own, other in rows])),
        tolerance=tolerance,
        from_training=None if trained is None else furthest(found, trained),
    )


def furthest(found: list[np.ndarray], expected: list[np.ndarray]) -> float:
    """The largest difference of a logit; NaN when there is one."""
    return float(np.max([np.abs(a - b).max() for a, b in zip(found, expected, strict=True)]))
