"""A checked merge: the written model is opened again and must answer as base + adapter does.

The base is that which was merged into. Merging into the original weights of a base that was trained
on in 4 bits changes answers however well it is done: by how much is measured apart, and told. So
does merging back into 4 bits, which is why perplexity is measured too.
"""

import contextlib
import dataclasses
import itertools
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qlora_jax.adapters.adapter import Adapter
from qlora_jax.adapters.merge import merged_config, merged_weights
from qlora_jax.adapters.residual import residual_adapter, residual_pair
from qlora_jax.adapters.spec import check_rank
from qlora_jax.checkpoints.atomic import refuse_existing, write_file
from qlora_jax.checkpoints.load import Source, source_dtype
from qlora_jax.checkpoints.merged import save_merged
from qlora_jax.checkpoints.names import split
from qlora_jax.checkpoints.peft import EXTRA
from qlora_jax.checkpoints.quantized import save_quantized
from qlora_jax.checkpoints.shards import Shards
from qlora_jax.checkpoints.write_shards import SHARD_BYTES
from qlora_jax.errors import InputError, Note, StorageError
from qlora_jax.models import Decoder
from qlora_jax.quantization.report import Report, WeightError, measure
from qlora_jax.quantization.tensor import QuantizedTensor
from qlora_jax.weight_names import LAYERS
from qlora_jax.workflows.adapter_folder import save_adapter
from qlora_jax.workflows.answers import TOKENS, answers
from qlora_jax.workflows.merge import refuse_original, refuse_packed
from qlora_jax.workflows.merge_4bit import Into4Bits, config_4bit, merged_4bit, plan_4bit
from qlora_jax.workflows.merge_report import REPORT, MergeCheck, Residual, compared, provenance
from qlora_jax.workflows.open import load_model
from qlora_jax.workflows.run_folder import as_json
from qlora_jax.workflows.texts import Text, random_ids

# Largest logit difference that passes, by the dtype of the merged weights. In float32 only the
# order of sums differs; bfloat16 rounds every merged weight to 8 bits, float16 to 11.
TOLERANCES = {"float32": 1e-2, "float16": 0.25, "bfloat16": 2.0, "4bit": 50.0}
# By which part of it the perplexity may grow.
GROWTH = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 0.05, "4bit": 0.25}


def checked_merge(
    model: Decoder,
    adapter: Adapter,
    out: str | Path,
    *,
    config: dict[str, Any],
    base: str = "dequantized",
    source: Source | None = None,
    dtype: str = "bfloat16",
    into: Into4Bits | None = None,
    residual_rank: int | None = None,
    tolerance: float | None = None,
    growth: float | None = None,
    text: Text | None = None,
    extra_files: Mapping[str, bytes | Path] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> MergeCheck:
    """Writes the merged model to the new folder `out` and compares its answers with base + adapter.

    Args:
      model: the base that the adapter was trained on, 4-bit or dense; not changed.
      adapter: what is merged.
      out: a path where nothing is yet.
      config: config.json of the base.
      base: `dequantized`, which the adapter was trained on, or `original`, with `source`.
      source: reads the original weights, for base="original".
      dtype: of the written weights: float32, bfloat16 or float16; into 4 bits, of those that stay
        dense.
      into: back into 4 bits, and how; the base must be 4-bit. None: a dense model.
      residual_rank: back into 4 bits: what they lost, as an adapter of this rank in the new folder
        `OUT-residual`, see adapters/residual.py.
      tolerance: largest logit difference that passes; by default one for each dtype.
      growth: by which part of it the perplexity of `text` may grow; by default one for each dtype.
      text: what both models are asked; by default random token ids from a fixed seed, which have no
        perplexity.
      extra_files: tokenizer and other files to put beside the weights.
      shard_bytes: more than this is split into shards with an index.

    Raises:
      InputError: `out` exists, the adapter is not finite, MERGE-ORIGINAL, a residual_rank of which
        nothing can come, or what `merged_4bit` refuses.
      StorageError: MERGE-CHECK when a difference is above its tolerance; the folder is then kept
        under its name with `.failed` behind it, so that nobody takes it for the result; so is what
        could not be compared, whatever the reason.
    """
    beside = Path(f"{Path(out)}-residual")
    refuse_existing(out)
    if residual_rank is not None:
        refuse_existing(beside)
        refuse_residual(model, adapter, into, residual_rank)
    refuse_packed(source)
    text = text or random_ids(model.config.vocab_size, TOKENS)
    errors: list[WeightError] = []
    pairs_left: dict[tuple[str, int], tuple[np.ndarray, np.ndarray]] = {}

    def on_merged(name, wide, written, moments=None) -> None:
        errors.append(measure(name, wide, written))
        if residual_rank is not None:
            stacked, layer = split(name)
            target = stacked.removeprefix(LAYERS).removesuffix(".weight")
            left = wide - np.asarray(written.dequantize("float32"))
            pairs_left[target, layer] = residual_pair(left, residual_rank, moments)

    how = {"dtype": dtype, "on_merged": on_merged}
    if into is None:
        pairs = merged_weights(model, adapter, base=base, source=source, **how)
    else:
        refuse_original(base)
        pairs = merged_4bit(model, adapter, into, **how)
    expected, trained = answers(model, text.ids, adapter), None
    if base == "original":
        packed = any(isinstance(own, QuantizedTensor) for own in model.weights().values())
        trained = expected if packed else None
        original = load_model(source, quantization=None, dtype=source_dtype(source))
        expected = answers(original, text.ids, adapter)
        del original
    told = {"bits": 4, **into.to_json()} if into else {}
    origin = provenance(model, adapter, into=base, **told)
    kept = {
        "extra_files": {**(extra_files or {}), EXTRA: as_json(origin)},
        "shard_bytes": shard_bytes,
    }
    shape = merged_config(model.config, adapter)
    if into is None:
        save_merged(shape, pairs, config, out, dtype=dtype, **kept)
    else:
        plan = plan_4bit(model, adapter, dtype)
        save_quantized(plan, pairs, config_4bit(config, shape, plan), out, **kept)
    with set_aside_on_failure(Path(out), beside):
        merged = reopened(Path(out))
        found = answers(merged, text.ids, None)
        kind = "4bit" if into else dtype
        check = compared(
            found,
            expected,
            trained,
            text,
            tolerance=TOLERANCES[kind] if tolerance is None else tolerance,
            growth_allowed=GROWTH[kind] if growth is None else growth,
            weights=Report(tuple(errors)),
        )
        if check.passed and residual_rank is not None:
            shapes, layers = merged.module_shapes(), merged.config.num_hidden_layers
            residual = residual_adapter(pairs_left, shapes, layers)
            save_adapter(beside, residual, merged, base_model_name=str(out))
            helped = answers(merged, text.ids, residual)
            check = dataclasses.replace(check, residual=Residual.of(beside, helped, expected, text))
        write_file(Path(out) / REPORT, as_json(check.to_json()))
    if not check.passed:
        raise failure(check, out, set_aside(Path(out)), into is not None)
    return check


def refuse_residual(model: Decoder, adapter: Adapter, into: Into4Bits | None, rank: int) -> None:
    """Refuses a residual where there is nothing that 4 bits lose.

    Raises:
      InputError: LORA-RANK, MERGE-METHOD.
    """
    check_rank(rank, "residual_rank")
    if into is None:
        found = "given for a dense result"
        raise InputError("MERGE-METHOD", "residual_rank", found, "into 4 bits beside it")
    weights = (model.weights().get(f"{LAYERS}{name}.weight") for name in adapter.spec.targets)
    if not any(isinstance(weight, QuantizedTensor) for weight in weights):
        found = "no linear that the adapter has is in 4 bits"
        raise InputError("MERGE-METHOD", "residual_rank", found, "one at least")


@contextlib.contextmanager
def set_aside_on_failure(*folders: Path) -> Iterator[None]:
    """What was written and could not be checked does not stay under its name."""
    try:
        yield
    except BaseException:
        for folder in folders:
            if folder.exists():
                set_aside(folder)
        raise


def set_aside(folder: Path) -> Path:
    """The folder's new name, with `.failed` behind it."""
    return folder.rename(free_name(f"{folder}.failed"))


def failure(check: MergeCheck, out: str | Path, failed: Path, packed: bool) -> StorageError:
    """The error for a merge that differs too much, by logits or else by perplexity."""
    if not check.largest <= check.tolerance:
        found = f"the merged model's logits differ by {check.largest:.3g} from base + adapter"
        expected, option = f"at most {check.tolerance:.3g}", "--tolerance"
    else:
        found = f"the merged model's perplexity is {check.growth:+.1%} off that of base + adapter"
        expected, option = f"at most {check.growth_allowed:+.1%}", "--perplexity-tolerance"
    better = "--method compensated" if packed else "--dtype float32"
    return StorageError(
        "MERGE-CHECK", out, found, expected, f"{better} or a larger {option}; see {failed}"
    )


def free_name(name: str) -> str:
    """`name`, or `name-2` and so on when that is taken: nothing is ever overwritten."""
    names = (name if count == 1 else f"{name}-{count}" for count in itertools.count(1))
    return next(free for free in names if not os.path.lexists(free))


def reopened(folder: Path) -> Decoder:
    """The model that was written, its weights as they are."""
    with Shards(folder) as written, warnings.catch_warnings():
        warnings.simplefilter("ignore", Note)  # the base's, which were told
        return load_model(written, quantization=None, dtype=source_dtype(written))
