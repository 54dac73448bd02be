"""Opens a model and its tokenizer from a folder or a GGUF file, and quantizes it on the way in."""

from pathlib import Path
from typing import TYPE_CHECKING

import jax

from pallas_kernels.nf4_matmul import preferred_layout
from qlora_jax.checkpoints.gguf import GGUF
from qlora_jax.checkpoints.load import OnWeight, Progress, Source, load_weights
from qlora_jax.checkpoints.shards import Shards
from qlora_jax.errors import InputError
from qlora_jax.models import Decoder, ModelConfig
from qlora_jax.placement import HOST, has_host_memory, memory_kinds
from qlora_jax.quantization.policy import QuantizationConfig
from qlora_jax.weight_names import STREAMED
from qlora_jax.workflows.hub import local_path, why_missing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def open_source(path: str | Path) -> Shards | GGUF:
    """The checkpoint at `path`: a Hugging Face folder, 4-bit or not, a GGUF file, or a Hub id.

    Raises:
      InputError: nothing is there, or what is there is neither; HUB-... as in workflows/hub.py.
    """
    given, path = path, local_path(path)
    if path.is_dir():
        return Shards(path)
    if path.suffix == ".gguf" and path.exists():
        return GGUF(path)
    if path.exists():
        raise InputError(
            "MODEL-FORMAT",
            path,
            "is a file",
            "a Hugging Face folder or a .gguf file",
            f"the folder that it lies in: {path.absolute().parent}",
        )
    raise InputError(
        "MODEL-MISSING",
        path,
        "missing: no such folder or file",
        "a Hugging Face folder, a .gguf file, or an id of the Hub such as Qwen/Qwen3-0.6B",
        why_missing(given),
    )


def load(
    path: str | Path,
    *,
    quantization: str | QuantizationConfig | None = "nf4",
    double_quant: bool = True,
    block_size: int = 64,
    dtype: str = "bfloat16",
    stream_weights: str = "off",
    progress: Progress | None = None,
    on_weight: OnWeight | None = None,
) -> tuple[Decoder, "PreTrainedTokenizerFast"]:
    """A frozen model and its tokenizer.

        model, tok = load("SmolLM2-135M-Instruct.gguf", quantization="nf4")

    Weights are read, quantized and dropped one at a time, so that loading needs the packed result
    and little more. A checkpoint that is 4-bit already is taken bit for bit.

    Args:
      path: a Hugging Face folder, one that `qlora-jax quantize` or bitsandbytes wrote, a .gguf,
        or an id of the Hub, `org/name` or `org/name@revision`: see workflows/hub.py.
      quantization: nf4, fp4 or int4; a QuantizationConfig; None keeps every weight dense.
      double_quant: quantize the block scales too (with a name in `quantization`).
      block_size: weights that share a scale (with a name in `quantization`).
      dtype: of the activations and the dense weights: bfloat16, float32 or float16.
      stream_weights: off, on (the layers' weights live in pinned host memory, and each comes to the
        device when its layer is computed) or all (embeddings and head too).
      progress: called after each tensor with (bytes done, bytes in all, name).
      on_weight: called with each weight that is quantized: its name, dense, and QuantizedTensor;
        see quantization/report.py.

    Raises:
      InputError: whatever is wrong with the files, in one line.
    """
    from qlora_jax.data.tokenizer import load_tokenizer

    if isinstance(quantization, str):
        quantization = QuantizationConfig(quantization, block_size, double_quant)
    with open_source(path) as source:
        model = load_model(
            source,
            quantization=quantization,
            dtype=dtype,
            stream_weights=stream_weights,
            progress=progress,
            on_weight=on_weight,
        )
        metadata = source.metadata if isinstance(source, GGUF) else None
        tokenizer = load_tokenizer(source.path, metadata, vocab_size=model.config.vocab_size)
    return model, tokenizer


def load_model(
    source: Source,
    *,
    quantization: QuantizationConfig | None,
    dtype: str = "bfloat16",
    stream_weights: str = "off",
    progress: Progress | None = None,
    on_weight: OnWeight | None = None,
) -> Decoder:
    """The model of an opened checkpoint; see `load`."""
    refuse_streaming(stream_weights)
    config = ModelConfig.from_dict(source.config, str(source.path))
    weights = load_weights(
        source,
        config,
        quantization,
        dtype=dtype,
        layout=preferred_layout(),
        stream_weights=stream_weights,
        progress=progress,
        on_weight=on_weight,
    )
    return Decoder.from_weights(config, weights, dtype)


def refuse_streaming(stream_weights: str) -> None:
    """Streaming is known by name, and the backend has host memory that the device can address.

    Raises:
      InputError: STREAM-NAME, STREAM-HOST.
    """
    if stream_weights not in STREAMED:
        expected = f"one of {', '.join(STREAMED)}"
        raise InputError("STREAM-NAME", "stream_weights", f"is {stream_weights!r}", expected)
    if stream_weights != "off" and not has_host_memory():
        raise InputError(
            "STREAM-HOST",
            f"stream_weights={stream_weights}",
            f"the device {jax.devices()[0]} cannot address memory of kind {HOST}",
            f"a backend that has it; this one has {', '.join(memory_kinds())}",
            "stream_weights=off",
        )
