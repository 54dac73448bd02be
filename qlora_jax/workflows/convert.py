"""A checkpoint in another form: dense to 4 bits, or 4-bit and GGUF to dense; its tokenizer too.

One weight is in memory at a time, and the next one is read meanwhile.
"""

import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qlora_jax.checkpoints.atomic import refuse_existing
from qlora_jax.checkpoints.bnb4bit import is_4bit
from qlora_jax.checkpoints.load import Loader, Progress, Source, load_weights, source_dtype
from qlora_jax.checkpoints.merged import save_merged
from qlora_jax.checkpoints.quantized import save_quantized
from qlora_jax.checkpoints.write_shards import SHARD_BYTES, Content
from qlora_jax.errors import InputError
from qlora_jax.models import ModelConfig
from qlora_jax.quantization.policy import QuantizationConfig
from qlora_jax.quantization.report import Report, WeightError, measure
from qlora_jax.quantization.tensor import QuantizedTensor
from qlora_jax.workflows.companions import companions_of, has_tokenizer
from qlora_jax.workflows.open import open_source
from qlora_jax.workflows.run_folder import as_json


def quantize_checkpoint(
    path: str | Path,
    out: str | Path,
    quantization: QuantizationConfig | None = None,
    *,
    dtype: str | None = None,
    report: bool = False,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> tuple[Report | None, bool]:
    """Writes a 4-bit checkpoint in bitsandbytes' format, which opens in seconds; never overwrites.

    transformers opens it too, unless the kind is int4: see `save_quantized`. Peak memory is about
    two dense tensors.

    Args:
      path: a dense Hugging Face folder or a .gguf file.
      out: a path where nothing is yet.
      quantization: the code, the block size, double quantization; by default the paper's.
      dtype: of the weights that stay dense: bfloat16, float32 or float16; None: the source's own.
      report: measure what each weight lost; quantization.json and quantization.png lie in `out`.
      shard_bytes: more than this is split into shards with an index.
      progress: called after each tensor with (bytes done, bytes in all, name).

    Returns:
      The report, if asked for, and whether a tokenizer was copied.

    Raises:
      InputError: OUT-EXISTS, W4-REQUANTIZE for a 4-bit model, and what is wrong with the files.
      StorageError: OUT-FULL, OUT-WRITE, OUT-VERIFY.
    """
    refuse_existing(out)
    errors: list[WeightError] = []
    with open_source(path) as source:
        refuse_4bit(source)
        loader = loader_of(
            source,
            quantization or QuantizationConfig(),
            dtype,
            progress=progress,
            on_weight=(lambda *weight: errors.append(measure(*weight))) if report else None,
        )
        more = report_files(lambda: Report(tuple(errors))) if report else {}
        copied = write_4bit(loader, out, shard_bytes, more)
    return Report(tuple(errors)) if report else None, copied


def bnb_checkpoint(
    path: str | Path,
    out: str | Path,
    *,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> bool:
    """Writes any model as bitsandbytes' 4-bit folder: a 4-bit one bit for bit, others quantized.

    Args: as of `quantize_checkpoint`.

    Returns:
      Whether a tokenizer was copied.

    Raises:
      InputError: as `quantize_checkpoint`, and W4-INT4 for a source that bitsandbytes cannot read.
    """
    refuse_existing(out)
    with open_source(path) as source:
        how = None if is_4bit(source.config, str(path)) else QuantizationConfig()
        loader = loader_of(source, how, dtype, progress=progress)
        if any(state.kind == "int4" for state in loader.states.values()):
            found, hint = "holds int4, which bitsandbytes does not read", "--format hf"
            raise InputError("W4-INT4", path, found, "nf4 or fp4", hint)
        return write_4bit(loader, out, shard_bytes)


def write_4bit(
    loader: Loader,
    out: str | Path,
    shard_bytes: int,
    more: Mapping[str, Content] | None = None,
    finish: Callable[[Path], None] | None = None,
) -> bool:
    """A loader's weights, 4-bit and dense, with the tokenizer and `more` beside them.

    Args:
      finish: as for `save_quantized`.

    Returns:
      Whether a tokenizer was copied.
    """
    files = companions_of(loader.source)
    save_quantized(
        loader.plan(),
        loader.weights(),
        loader.source.config,
        out,
        extra_files={**files, **(more or {})},
        shard_bytes=shard_bytes,
        finish=finish,
    )
    return has_tokenizer(files)


def loader_of(
    source: Source, quantization: QuantizationConfig | None, dtype: str | None, **calls: Any
) -> Loader:
    """The weights of a source, in its own dtype where none is named."""
    config = ModelConfig.from_dict(source.config, str(source.path))
    return Loader(source, config, quantization, dtype or source_dtype(source), **calls)


def refuse_4bit(source: Source) -> None:
    """Quantizing twice loses twice.

    Raises:
      InputError: W4-REQUANTIZE.
    """
    if is_4bit(source.config, str(source.path)):
        found, hint = "is quantized already", "the dense model"
        raise InputError("W4-REQUANTIZE", source.path, found, "dense weights", hint)


def report_files(report: Callable[[], Report]) -> dict[str, Content]:
    """The report as JSON and as a plot, by file name; it is asked for when it is complete."""

    def plot() -> bytes:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "quantization.png")
            report().plot(path)
            return path.read_bytes()

    return {
        "quantization.json": lambda: as_json(report().to_json()),
        "quantization.png": plot,
    }


def dense_checkpoint(
    path: str | Path,
    out: str | Path,
    *,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> bool:
    """Writes a 4-bit, GGUF or dense model as a dense Hugging Face folder; never overwrites.

    Args: as of `quantize_checkpoint`.

    Returns:
      Whether a tokenizer was copied.
    """
    refuse_existing(out)
    with open_source(path) as source:
        loader = loader_of(source, None, dtype, progress=progress)
        files = companions_of(source)
        save_merged(
            loader.model_config,
            dense_weights(loader),
            source.config,
            out,
            dtype=loader.dtype.name,
            extra_files=files,
            shard_bytes=shard_bytes,
        )
    return has_tokenizer(files)


def dense_weights(loader: Loader) -> Iterator[tuple[str, np.ndarray]]:
    """Every weight by Hugging Face's name, one dense one in memory at a time."""
    for name, weight in loader.weights():
        if isinstance(weight, QuantizedTensor):
            weight = np.asarray(weight.dequantize("float32"))
        yield name, weight
        del weight  # before the one behind the next is read


def parameters(
    path: str | Path, dtype: str | None, progress: Progress | None = None
) -> dict[str, Any]:
    """A model's weights by stacked name, for `save_orbax`: 4-bit ones stay as they are."""
    with open_source(path) as source:
        config = ModelConfig.from_dict(source.config, str(path))
        dtype = dtype or source_dtype(source)
        return load_weights(source, config, None, dtype, progress=progress)
