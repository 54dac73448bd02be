"""An adapter merged into its 4-bit base and back into 4 bits, one layer in memory at a time.

An adapter changes a weight by less than the gap between two codes, so rounding the merged weight to
its nearest code undoes most of what was trained. Choosing the codes for the outputs on a text keeps
more of it (quantization/compensated.py).
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pallas_kernels.quantize.api import DoubleQuantized
from qlora_jax.adapters.adapter import Adapter, check_finite
from qlora_jax.adapters.merge import as_dtype, merged_config, merged_linear, with_saved
from qlora_jax.adapters.spec import module_path
from qlora_jax.checkpoints.bnb4bit import UNKNOWN, QuantState
from qlora_jax.checkpoints.names import hugging_face_names
from qlora_jax.checkpoints.safetensors_header import Spec
from qlora_jax.errors import InputError
from qlora_jax.models import Decoder, ModelConfig
from qlora_jax.models.families import linear_shapes, weight_shapes
from qlora_jax.models.moments import TextInLayers
from qlora_jax.quantization.compensated import InputCosts, quantize_compensated
from qlora_jax.quantization.in_pieces import quantize_in_pieces
from qlora_jax.quantization.tensor import QuantizedTensor
from qlora_jax.weight_names import HEAD, LAYERS
from qlora_jax.workflows.texts import Text

METHODS = ("requantize", "compensated")
# Called with each weight that is quantized again: name, W + scale B A in float32, what became of
# it, and the moments of its inputs where they are known.
OnMerged = Callable[[str, np.ndarray, QuantizedTensor, np.ndarray | None], None]


@dataclasses.dataclass(frozen=True)
class Into4Bits:
    """How a merged weight becomes 4-bit again.

    Attributes:
      method: `requantize`, every weight to its nearest code; or `compensated`, codes and scales
        chosen for the outputs on `calibration`.
      calibration: a text like those that the model is for, not one that it is judged on; for
        `compensated` only.
    """

    method: str = "requantize"
    calibration: Text | None = None

    def __str__(self) -> str:
        if self.calibration is None:
            return f"{self.method}: each weight to its nearest code"
        text = self.calibration
        return f"{self.method}: for the outputs on {text.name}, {text.ids.size:,} tokens"

    def to_json(self) -> dict[str, Any]:
        """What qlora_jax.json says."""
        text = {"calibration": self.calibration.to_json()} if self.calibration else {}
        return {"method": self.method, **text}


def merged_4bit(
    model: Decoder,
    adapter: Adapter,
    how: Into4Bits,
    *,
    dtype: str | None = None,
    on_merged: OnMerged | None = None,
) -> Iterator[tuple[str, np.ndarray | QuantizedTensor]]:
    """The weights of the merged model by Hugging Face name, each made when it is asked for.

    What the adapter does not touch stays as it is, bit for bit; what it does is quantized again in
    the base's own kind, block size and double quantization.

    Args:
      model: the base, 4-bit, left as it is.
      adapter: what is merged; it is checked whole before the first weight comes out.
      how: by which method.
      dtype: of the weights that stay dense; the model's by default.
      on_merged: called with each weight that is quantized again.

    Raises:
      InputError: LORA-FINITE, MERGE-FINITE, MERGE-METHOD, MERGE-4BIT for a base that is not 4-bit,
        MERGE-CALIBRATION for a text that is missing or too short, MERGE-BLOCKS.
    """
    refuse_unfit(model, how)
    check_finite(adapter)
    text = TextInLayers(model, adapter, how.calibration.ids) if how.calibration else None
    return merge_each(model, adapter, text, jnp.dtype(dtype or model.dtype), on_merged)


def merge_each(
    model: Decoder,
    adapter: Adapter,
    text: TextInLayers | None,
    dtype: np.dtype,
    on_merged: OnMerged | None,
) -> Iterator[tuple[str, np.ndarray | QuantizedTensor]]:
    """`merged_4bit` once its arguments are checked."""
    weights, _ = with_saved(model, adapter)
    for name, own in weights.items():
        if not name.startswith(LAYERS):
            yield name, written(name, own, dtype)
    stacked = {
        name.removeprefix(LAYERS): own for name, own in weights.items() if name.startswith(LAYERS)
    }
    for layer in range(model.config.num_hidden_layers):
        held = {inner: one_layer(own, layer) for inner, own in stacked.items()}
        moments = {} if text is None else text.moments(held)
        costs: dict[int, InputCosts] = {}
        for inner, own in held.items():
            name, target = module_path(layer, inner), inner.removesuffix(".weight")
            merged = merged_linear(adapter, target, layer, own)
            if merged is None or not isinstance(own, QuantizedTensor):
                held[inner] = own if merged is None else merged
                yield name, written(name, held[inner], dtype)
                continue
            wide = as_dtype(name, merged, np.dtype(np.float32))
            inputs = moments.get(target)
            if inputs is not None and id(inputs) not in costs:  # q, k and v have the same
                costs[id(inputs)] = InputCosts.of(inputs, own.block_size)
            packed = quantized_as(own, wide, costs.get(id(inputs)))
            if on_merged:
                on_merged(name, wide, packed, inputs)
            held[inner] = jax.tree.map(jnp.asarray, packed.prepack(own.layout))
            yield name, packed
        if text is not None:
            text.advance(held)


def one_layer(own: Array | QuantizedTensor, layer: int) -> Array | QuantizedTensor:
    """One layer of a stacked weight."""
    return jax.tree.map(lambda leaf: leaf[layer], own)


def written(
    name: str, own: Array | QuantizedTensor, dtype: np.dtype
) -> np.ndarray | QuantizedTensor:
    """A weight as it is written: 4-bit as it is, with NumPy leaves and in bitsandbytes' order."""
    if isinstance(own, QuantizedTensor):
        return jax.tree.map(np.asarray, own.unpack())
    return as_dtype(name, own, dtype)


def quantized_as(
    like: QuantizedTensor, w: Float[np.ndarray, "out in"], costs: InputCosts | None
) -> QuantizedTensor:
    """A matrix in 4 bits as another one is stored, by what errors cost where that is known."""
    how = {"kind": like.kind, "double_quant": isinstance(like.absmax, DoubleQuantized)}
    if costs is None:
        packed = quantize_in_pieces(np.ascontiguousarray(w), block_size=like.block_size, **how)
    else:
        packed = quantize_compensated(w, costs, **how)
    return dataclasses.replace(packed, dtype=like.dtype)


def refuse_unfit(model: Decoder, how: Into4Bits) -> None:
    """Refuses what cannot be merged into 4 bits in this way; also asked before minutes of work.

    Raises:
      InputError: MERGE-4BIT, MERGE-METHOD, MERGE-CALIBRATION, MERGE-BLOCKS.
    """
    packed, text = packed_linears(model), how.calibration
    if not packed:
        found, hint = "the base is not 4-bit", "--quantization nf4, or a merge without --bits"
        raise InputError("MERGE-4BIT", "merge: bits", found, "a 4-bit base", hint)
    if how.method not in METHODS:
        expected = f"one of {', '.join(METHODS)}"
        raise InputError("MERGE-METHOD", "merge: method", repr(how.method), expected)
    if (how.method == "compensated") != (text is not None):
        found = f"{how.method} {'with' if text else 'without'} a calibration text"
        expected = "one with compensated, only"
        raise InputError("MERGE-CALIBRATION", "merge: calibration", found, expected)
    if text is None:
        return
    widest = max(own.shape[1] for own in packed.values())
    if text.ids.size < widest:
        found = f"{text.ids.size:,} tokens to calibrate on"
        expected = f"at least {widest:,}, the inputs of the widest linear"
        raise InputError("MERGE-CALIBRATION", text.name, found, expected, "a longer text")
    for name, own in packed.items():
        if not own.by_rows:
            found = f"blocks of {own.block_size} do not fill the rows of {own.shape[1]} weights"
            raise InputError("MERGE-BLOCKS", name, found, "whole blocks", "the method requantize")


def packed_linears(model: Decoder) -> dict[str, QuantizedTensor]:
    """The 4-bit weights of the layers, by stacked name."""
    names = [f"{LAYERS}{name}.weight" for name in linear_shapes(model.config)]
    held = model.weights()
    return {name: held[name] for name in names if isinstance(held[name], QuantizedTensor)}


def plan_4bit(model: Decoder, adapter: Adapter, dtype: str) -> dict[str, QuantState | Spec]:
    """What each weight of the merged model is in the folder, by Hugging Face name."""
    weights, _ = with_saved(model, adapter)
    shapes = weight_shapes(merged_config(model.config, adapter))
    names = hugging_face_names(shapes, model.config.num_hidden_layers)
    plan: dict[str, QuantState | Spec] = {}
    for name, stacked in names.items():
        own = weights[stacked]
        if isinstance(own, QuantizedTensor):
            offset = UNKNOWN if isinstance(own.absmax, DoubleQuantized) else None
            plan[name] = QuantState(own.kind, own.block_size, own.dtype, own.shape, offset)
        else:
            plan[name] = jnp.dtype(dtype), tuple(shapes[stacked])
    return plan


def config_4bit(
    config: Mapping[str, Any], merged: ModelConfig, plan: Mapping[str, QuantState | Spec]
) -> dict[str, Any]:
    """config.json of the merged model: tied only if it still is, a dense head named as one."""
    told = dict(config.get("quantization_config") or {})
    if HEAD in plan and not isinstance(plan[HEAD], QuantState):
        told.pop("llm_int8_skip_modules", None)
    kept = {"quantization_config": told} if "quantization_config" in config else {}
    return {**config, **kept, "tie_word_embeddings": merged.tie_word_embeddings}
