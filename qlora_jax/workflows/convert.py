"""A checkpoint in another form: dense to 4 bits, or 4-bit and GGUF to dense; its tokenizer too."""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from qlora_jax.checkpoints.bnb4bit import is_4bit
from qlora_jax.checkpoints.load import load_weights
from qlora_jax.checkpoints.merged import save_merged
from qlora_jax.checkpoints.names import LAYERS, layer_names, name_table
from qlora_jax.checkpoints.quantized import save_quantized
from qlora_jax.errors import InputError
from qlora_jax.models import ModelConfig
from qlora_jax.models.families import weight_shapes
from qlora_jax.quantization.policy import QuantizationConfig
from qlora_jax.quantization.report import Report, measure
from qlora_jax.quantization.tensor import QuantizedTensor
from qlora_jax.workflows.companions import companions_of, has_tokenizer
from qlora_jax.workflows.open import Source, open_source
from qlora_jax.workflows.run_folder import as_json

Progress = Callable[[int, int, str], None]


def quantize_checkpoint(
    path: str | Path,
    out: str | Path,
    quantization: QuantizationConfig | None = None,
    *,
    dtype: str = "bfloat16",
    report: bool = False,
    progress: Progress | None = None,
) -> tuple[Report | None, bool]:
    """Writes a 4-bit checkpoint in bitsandbytes' format, which opens in seconds; never overwrites.

    Peak memory is the packed result and about two dense tensors.

    Args:
      path: a dense Hugging Face folder or a .gguf file.
      out: a path where nothing is yet.
      quantization: the code, the block size, double quantization; by default the paper's.
      dtype: of the weights that stay dense: bfloat16, float32 or float16.
      report: measure what each weight lost; quantization.json and quantization.png lie in `out`.
      progress: called after each tensor with (done, total, name).

    Returns:
      The report, if asked for, and whether a tokenizer was copied.

    Raises:
      InputError: OUT-EXISTS, W4-REQUANTIZE for a 4-bit model, and what is wrong with the files.
      StorageError: OUT-FULL, OUT-WRITE, OUT-VERIFY.
    """
    refuse_taken(out)
    errors = []
    with open_source(path) as source:
        config = ModelConfig.from_dict(source.config, str(path))
        if is_4bit(source.config, str(path)):
            found, hint = "is quantized already", "the dense model"
            raise InputError("W4-REQUANTIZE", path, found, "dense weights", hint)
        weights = load_weights(
            source,
            config,
            quantization or QuantizationConfig(),
            dtype,
            progress=progress,
            on_weight=(lambda *weight: errors.append(measure(*weight))) if report else None,
        )
        files = companions_of(source)
        found = Report(tuple(errors)) if report else None
        extra = report_files(found) if found else {}
        save_quantized(weights, source.config, out, extra_files={**files, **extra})
    return found, has_tokenizer(files)


def report_files(report: Report) -> dict[str, bytes]:
    """The report as JSON and as a plot, by file name."""
    with tempfile.TemporaryDirectory() as folder:
        plot = Path(folder, "quantization.png")
        report.plot(plot)
        return {"quantization.json": as_json(report.to_json()), plot.name: plot.read_bytes()}


def dense_checkpoint(
    path: str | Path,
    out: str | Path,
    *,
    dtype: str = "bfloat16",
    progress: Progress | None = None,
) -> bool:
    """Writes a 4-bit, GGUF or dense model as a dense Hugging Face folder; never overwrites.

    Args: as of `quantize_checkpoint`.

    Returns:
      Whether a tokenizer was copied.
    """
    refuse_taken(out)
    with open_source(path) as source:
        config = ModelConfig.from_dict(source.config, str(path))
        files = companions_of(source)
        pairs = dense_weights(source, config, progress)
        save_merged(config, pairs, source.config, out, dtype=dtype, extra_files=files)
    return has_tokenizer(files)


def dense_weights(
    source: Source, config: ModelConfig, progress: Progress | None
) -> Iterator[tuple[str, np.ndarray]]:
    """Every weight by Hugging Face's name, one dense one in memory at a time."""
    shapes, layers = weight_shapes(config), config.num_hidden_layers
    if is_4bit(source.config, str(source.path)):
        weights = load_weights(source, config, None, "float32", progress=progress)
        for stacked in shapes:
            for layer, name in enumerate(layer_names(stacked, layers)):
                yield name, one_weight(weights[stacked], stacked, layer)
        return
    table = name_table(source.names(), shapes, layers, str(source.path))
    total, done = sum(map(len, table.values())), 0
    for stacked, names in table.items():
        for name, own in zip(layer_names(stacked, layers), names, strict=True):
            yield name, source.read(own)
            done += 1
            if progress:
                progress(done, total, name)


def one_weight(weight: jax.Array | QuantizedTensor, stacked: str, layer: int) -> np.ndarray:
    """One layer's weight, dense."""
    one = weight[layer] if stacked.startswith(LAYERS) else weight
    return np.asarray(one.dequantize("float32") if isinstance(one, QuantizedTensor) else one)


def refuse_taken(out: str | Path) -> None:
    """Before minutes of work: nothing is ever overwritten."""
    if Path(out).exists():
        found, hint = "exists already", "another name, or remove it first"
        raise InputError("OUT-EXISTS", out, found, "a new path", hint)


def parameters(path: str | Path, dtype: str, progress: Progress | None = None) -> dict[str, Any]:
    """A model's weights by stacked name, for `save_orbax`: 4-bit ones stay as they are."""
    with open_source(path) as source:
        config = ModelConfig.from_dict(source.config, str(path))
        return load_weights(source, config, None, dtype, progress=progress)
