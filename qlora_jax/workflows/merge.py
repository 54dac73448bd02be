"""An adapter merged into its base, as a new model in memory; neither is changed."""

import jax
import jax.numpy as jnp
import numpy as np

from qlora_jax.adapters.adapter import Adapter
from qlora_jax.adapters.merge import merged_config, merged_weights
from qlora_jax.checkpoints.aligned import aligned_empty
from qlora_jax.checkpoints.bnb4bit import is_4bit
from qlora_jax.checkpoints.load import Source
from qlora_jax.checkpoints.names import split
from qlora_jax.errors import InputError
from qlora_jax.models import Decoder
from qlora_jax.models.families import weight_shapes
from qlora_jax.quantization.tensor import QuantizedTensor, stack
from qlora_jax.weight_names import LAYERS
from qlora_jax.workflows.merge_4bit import Into4Bits, merged_4bit


def merge(
    model: Decoder,
    adapter: Adapter,
    *,
    base: str = "dequantized",
    source: Source | None = None,
    dtype: str | None = None,
    into: Into4Bits | None = None,
) -> Decoder:
    """A model that answers as `model` with `adapter` does, made one matrix at a time.

        dense = merge(model, run.lora)
        packed = merge(model, run.lora, into=Into4Bits("compensated", text))

        W + scale * B A        in float32, then rounded to `dtype`
        m/n (W + scale * B A)  with DoRA, see adapters/dora.py

    Args:
      model: the base; unchanged, so that there is nothing to unmerge.
      adapter: what is merged.
      base: `dequantized`, the weights that the adapter was trained on, or `original`, those of
        `source`, which changes answers.
      source: an opened checkpoint (workflows/open.py), for `base="original"`.
      dtype: of the result, into 4 bits of what stays dense; the model's by default.
      into: back into 4 bits, and how, see workflows/merge_4bit.py; None: a dense model.

    Raises:
      InputError: the adapter is not finite, a merged weight is too large for `dtype`, or
        MERGE-ORIGINAL.
    """
    refuse_packed(source)
    if into is not None:
        refuse_original(base)
        return merge_into_4bit(model, adapter, into, dtype or model.dtype)
    dtype, config = dtype or model.dtype, merged_config(model.config, adapter)
    stacked: dict[str, np.ndarray] = {}
    for name, shape in weight_shapes(config).items():
        lead = (config.num_hidden_layers,) if name.startswith(LAYERS) else ()
        stacked[name] = aligned_empty((*lead, *shape), jnp.dtype(dtype))
    pairs = merged_weights(model, adapter, base=base, source=source, dtype=dtype)
    for name, weight in pairs:
        whole, layer = split(name)
        stacked[whole][... if layer is None else layer] = weight
    # Popped, so that host and device never hold the whole model twice.
    weights = {name: jnp.asarray(stacked.pop(name)) for name in list(stacked)}
    return Decoder.from_weights(config, weights, dtype)


def merge_into_4bit(model: Decoder, adapter: Adapter, into: Into4Bits, dtype: str) -> Decoder:
    """`merge` of weights that are 4-bit again."""
    config, layouts = merged_config(model.config, adapter), {}
    layers: dict[str, list[np.ndarray | QuantizedTensor]] = {}
    for name, weight in merged_4bit(model, adapter, into, dtype=dtype):
        layers.setdefault(split(name)[0], []).append(weight)
    for name, own in model.weights().items():
        layouts[name] = own.layout if isinstance(own, QuantizedTensor) else ""
    weights = {}
    for name in list(layers):
        own = layers.pop(name)
        if isinstance(own[0], QuantizedTensor):
            whole = stack(own) if name.startswith(LAYERS) else own[0]
            whole = whole.prepack(layouts[name])
        else:
            whole = np.stack(own) if name.startswith(LAYERS) else own[0]
        weights[name] = jax.tree.map(jnp.asarray, whole)
    return Decoder.from_weights(config, weights, dtype)


def refuse_original(base: str) -> None:
    """Into 4 bits goes what the adapter was trained on.

    Raises:
      InputError: MERGE-BASE.
    """
    if base != "dequantized":
        found = f"base={base!r} and back into 4 bits"
        hint = "a dense merge, and qlora-jax quantize of it"
        raise InputError("MERGE-BASE", "merge: base", found, "'dequantized' with 4 bits", hint)


def refuse_packed(source: Source | None) -> None:
    """A 4-bit checkpoint has no original weights.

    Raises:
      InputError: MERGE-ORIGINAL.
    """
    if source is not None and is_4bit(source.config, str(source.path)):
        found, expected = "is 4-bit, and the original weights are not in it", "the dense model"
        hint = "--base dequantized, or --model with the dense model"
        raise InputError("MERGE-ORIGINAL", source.path, found, expected, hint)
