"""Opens a model whose layers stay on disk, which may be larger than memory."""

import jax

from pallas_kernels.nf4_matmul import preferred_layout
from qlora_jax.checkpoints.bnb4bit import is_4bit
from qlora_jax.checkpoints.layer_files import LayerFiles
from qlora_jax.checkpoints.load import Loader, Source, in_layout
from qlora_jax.checkpoints.shards import Shards
from qlora_jax.errors import InputError
from qlora_jax.models import Decoder, ModelConfig
from qlora_jax.models.layerwise import LayerwiseDecoder
from qlora_jax.quantization.policy import QuantizationConfig
from qlora_jax.quantization.tensor import QuantizedTensor
from qlora_jax.weight_names import LAYERS


def open_from_disk(
    source: Source, quantization: QuantizationConfig | None, dtype: str
) -> LayerwiseDecoder:
    """The model of an opened checkpoint: its ends in memory, its layers where they are.

    The folder is opened once more, and that stays open as long as the model is used.

    Args:
      source: a folder that is 4-bit already, or a dense one that stays dense.
      quantization: what a 4-bit one must be; None takes it as it is stored.
      dtype: of the activations and the dense weights.

    Raises:
      InputError: STREAM-DISK, it would be quantized, or taken out of a GGUF's blocks, at every
        pass; and as `Loader`.
    """
    refuse_work(source, quantization)
    own = Shards(source.path)
    try:
        config = ModelConfig.from_dict(own.config, str(own.path))
        loader = Loader(own, config, quantization, dtype)
        layout = preferred_layout()
        ends = {}
        for name in loader.table:
            if name.startswith(LAYERS):
                continue
            weight = loader.stacked(name)
            if isinstance(weight, QuantizedTensor):
                weight = in_layout(weight, layout)
            ends[name] = jax.block_until_ready(jax.device_put(weight))
    except BaseException:
        own.close()
        raise
    return LayerwiseDecoder(Decoder(config, ends, dtype), LayerFiles(loader, layout))


def refuse_work(source: Source, quantization: QuantizationConfig | None) -> None:
    """What is read at every pass is what is multiplied by."""
    folder = isinstance(source, Shards)
    if folder and (quantization is None or is_4bit(source.config, str(source.path))):
        return
    if quantization is None:
        hint = f"qlora-jax export {source.path} FOLDER --format hf, and model=FOLDER"
    else:
        hint = f"qlora-jax quantize {source.path} FOLDER{flags(quantization)}, and model=FOLDER"
    raise InputError(
        "STREAM-DISK",
        f"{source.path}: stream_weights=disk",
        "is dense, and would be quantized at every pass" if folder else "is a GGUF file",
        "a 4-bit folder, or a dense one with load_in_4bit=false",
        hint,
    )


def flags(how: QuantizationConfig) -> str:
    """What `qlora-jax quantize` must be told beside its defaults."""
    default = QuantizationConfig()
    flags = {
        f" --kind {how.kind}": how.kind != default.kind,
        f" --block-size {how.block_size}": how.block_size != default.block_size,
        " --no-double-quant": not how.double_quant,
        " --quantize-lm-head": how.quantize_lm_head,
    }
    return "".join(flag for flag, told in flags.items() if told)
