"""An adapter into its base, one matrix in memory at a time.

Merging into the dequantized base gives the model that was trained: the adapter has learned to
correct the quantized weights, not the original ones. Merging into the original is what others do by
default, and changes answers.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from qlora_jax.adapters.adapter import Adapter, check_finite
from qlora_jax.adapters.dora import row_squares, stretch
from qlora_jax.adapters.spec import SAVED, module_path
from qlora_jax.errors import InputError
from qlora_jax.quantization.tensor import QuantizedTensor
from qlora_jax.weight_names import EMBEDDINGS, HEAD, LAYERS

OnMerged = Callable[[str, Array, np.ndarray], None]


@runtime_checkable
class Mergeable(Protocol):
    """What merging asks of a model."""

    dtype: str

    def weights(self) -> Mapping[str, Array | QuantizedTensor]:
        """Every weight by its stacked name; those of layers have a leading axis L."""


@runtime_checkable
class Originals(Protocol):
    """Where original weights come from, one at a time, by Hugging Face name."""

    def read(self, name: str) -> np.ndarray:
        """The weight `name`."""


def merge_weight(
    weight: Float[Array | np.ndarray, "out in"],
    A: Float[Array, "r in"],
    B: Float[Array, "out r"],
    scale: float,
    magnitude: Float[Array, " out"] | None = None,
) -> Float[Array, "out in"]:
    """W + scale * B A, in float32 whatever types came; DoRA's rows get their `magnitude`."""
    delta = jnp.matmul(
        jnp.asarray(B, jnp.float32),
        jnp.asarray(A, jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
    )
    merged = jnp.asarray(weight, jnp.float32) + jnp.float32(scale) * delta
    if magnitude is None:
        return merged
    return merged * stretch(magnitude, jnp.sqrt(row_squares(merged)), jnp.float32(scale))[:, None]


def merged_weights(
    model: Mergeable,
    adapter: Adapter,
    *,
    base: str = "dequantized",
    source: Originals | None = None,
    dtype: str | None = None,
    on_merged: OnMerged | None = None,
) -> Iterator[tuple[str, np.ndarray]]:
    """The weights of the merged model by Hugging Face name, each made when it is asked for.

    Args:
      model: the base, left as it is.
      adapter: what is merged; it is checked whole before the first weight comes out.
      base: `"dequantized"`, the weights that the model computes with, or `"original"`, those of
        `source`.
      source: reads the original weights; for `base="original"` only.
      dtype: of the arrays that come out; the model's by default.
      on_merged: called with each weight that the adapter changes: its name, W + scale * B A in
        float32, and what comes out.

    Raises:
      InputError: the adapter holds NaN or infinity, or a merged weight is too large for `dtype`.
    """
    if base not in ("dequantized", "original"):
        raise InputError("MERGE-BASE", "merge: base", repr(base), "'dequantized' or 'original'")
    if (base == "original") != (source is not None):
        found = f"base={base!r} {'with' if source else 'without'} a source of original weights"
        raise InputError("MERGE-BASE", "merge: base", found, "a source with 'original', only")
    check_finite(adapter)
    return merge_each(model, adapter, source, jnp.dtype(dtype or model.dtype), on_merged)


def merge_each(
    model: Mergeable,
    adapter: Adapter,
    source: Originals | None,
    dtype: np.dtype,
    on_merged: OnMerged | None,
) -> Iterator[tuple[str, np.ndarray]]:
    """`merged_weights` once its arguments are checked."""
    weights, origin = with_saved(model, adapter)
    for stacked, held in weights.items():
        inner = stacked.removeprefix(LAYERS)
        if inner == stacked:
            read = source is not None and stacked in origin
            yield stacked, as_dtype(stacked, source.read(origin[stacked]) if read else held, dtype)
            continue
        target = inner.removesuffix(".weight")
        for layer in range(layers_of(held)):
            name = module_path(layer, inner)
            weight = held[layer] if source is None else source.read(name)
            merged = merged_linear(adapter, target, layer, weight)
            written = as_dtype(name, weight if merged is None else merged, dtype)
            if on_merged and merged is not None:
                on_merged(name, merged, written)
            yield name, written


def with_saved(
    model: Mergeable, adapter: Adapter
) -> tuple[dict[str, Array | QuantizedTensor], dict[str, str]]:
    """Every weight by its stacked name, saved modules in the place of the base's.

    Returns:
      The weights, and for those that are the base's the name under which a source has them: a head
      that is tied no longer is the embedding.
    """
    spec = adapter.spec
    saved = {
        f"{SAVED[name]}.weight": adapter.params[name]["weight"] for name in spec.modules_to_save
    }
    weights = dict(model.weights())
    origin = {name: name for name in weights}
    if saved and HEAD not in weights:
        weights[HEAD], origin[HEAD] = weights[EMBEDDINGS], EMBEDDINGS
    origin = {name: own for name, own in origin.items() if name not in saved}
    return weights | saved, origin


def merged_linear(
    adapter: Adapter, target: str, layer: int, weight: Array | np.ndarray | QuantizedTensor
) -> Float[Array, "out in"] | None:
    """One linear's weight with its adapter, float32; None where it has none."""
    params, spec = adapter.params, adapter.spec
    if target not in spec.targets or not spec.ranks(target)[layer]:
        return None
    A, B = adapter.layer(target, layer)
    m = params[target]["m"][layer] if spec.use_dora else None
    return merge_weight(dense(weight), A, B, float(spec.scales(target)[layer]), m)


def merged_config[Config](config: Config, adapter: Adapter) -> Config:
    """The merged model's configuration: a saved module is not tied to the other's weight."""
    if not adapter.spec.modules_to_save:
        return config
    return dataclasses.replace(config, tie_word_embeddings=False)


def layers_of(weight: Array | QuantizedTensor) -> int:
    """The length of the leading axis."""
    return weight.lead[0] if isinstance(weight, QuantizedTensor) else len(weight)


def dense(weight: Array | np.ndarray | QuantizedTensor) -> Array | np.ndarray:
    """One matrix as an array; a 4-bit one in float32, the values that the model computes with."""
    if isinstance(weight, QuantizedTensor):
        return weight.dequantize("float32")
    return weight


def as_dtype(
    name: str, weight: Array | np.ndarray | QuantizedTensor, dtype: np.dtype
) -> np.ndarray:
    """`weight` on the host in `dtype`, refused when that makes it infinite."""
    # Overflow is looked for below and named; numpy's warning would name nothing.
    with np.errstate(over="ignore"):
        array = np.asarray(dense(weight)).astype(dtype)
    if not np.isfinite(array).all():
        found = f"not finite in {dtype.name} after merging"
        raise InputError("MERGE-FINITE", name, found, hint="bfloat16 or float32 for the result")
    return array
