"""A checked merge: the written model is opened again and must answer as base + adapter does."""

import dataclasses
import itertools
import os
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qlora_jax.adapters.adapter import Adapter
from qlora_jax.adapters.merge import merged_config, merged_weights
from qlora_jax.checkpoints.load import Source, source_dtype
from qlora_jax.checkpoints.merged import save_merged
from qlora_jax.checkpoints.shards import Shards
from qlora_jax.checkpoints.write_shards import SHARD_BYTES
from qlora_jax.errors import Note, StorageError
from qlora_jax.models import Decoder
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
    """

    largest: float
    mean: float
    same_choice: float
    tolerance: float

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
      model: the base that the adapter was trained on; not changed.
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
    pairs = merged_weights(model, adapter, base=base, source=source, dtype=dtype)
    shape = merged_config(model.config, adapter)
    save_merged(
        shape, pairs, config, out, dtype=dtype, extra_files=extra_files, shard_bytes=shard_bytes
    )
    check = compare(model, adapter, Path(out), ids, tolerance or TOLERANCES[dtype])
    if not check.passed:
        failed = Path(out).rename(free_name(f"{Path(out)}.failed"))
        raise StorageError(
            "MERGE-CHECK",
            out,
            f"the merged model's logits differ by {check.largest:.3g} from base + adapter",
            f"at most {check.tolerance:.3g}",
            f"--dtype float32, --base dequantized or a larger --tolerance; see {failed}",
        )
    return check


def free_name(name: str) -> str:
    """`name`, or `name-2` and so on when that is taken: nothing is ever overwritten."""
    names = (name if count == 1 else f"{name}-{count}" for count in itertools.count(1))
    return next(free for free in names if not os.path.lexists(free))


def compare(
    model: Decoder, adapter: Adapter, folder: Path, ids: np.ndarray, tolerance: float
) -> MergeCheck:
    """The logits of both in float32, row by row, so that the rounding of the weights is all."""
    with Shards(folder) as written, warnings.catch_warnings():
        warnings.simplefilter("ignore", Note)  # the base's, which were told
        merged = load_model(written, quantization=None, dtype=source_dtype(written))
    merged, wide = (  # weights as they are, which costs no copy of them in float32
        Decoder.from_weights(own.config, own.weights(), "float32") for own in (merged, model)
    )
    logits = jax.jit(lambda model, ids, adapter: model(ids, adapter=adapter))
    largest, total, same, count = 0.0, 0.0, 0, 0
    for row in ids:
        expected = logits(wide, row[None], adapter)[0]
        found = logits(merged, row[None], None)[0]
        difference = jnp.abs(found - expected)
        largest = float(jnp.maximum(largest, difference.max()))  # keeps a NaN
        total += float(difference.mean()) * len(row)
        same += int((found.argmax(-1) == expected.argmax(-1)).sum())
        count += len(row)
    return MergeCheck(largest, total / count, same / count, tolerance)
