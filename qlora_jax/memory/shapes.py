"""A model, an adapter and a batch as shapes alone: what a program is traced with, without a weight.

Every leaf is a jax.ShapeDtypeStruct, so nothing is allocated, whatever the size of the model.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.quantize.api import DoubleQuantized
from pallas_kernels.quantize.reference import NESTED_BLOCK
from qlora_jax.adapters.adapter import param_shapes
from qlora_jax.adapters.spec import LoraSpec
from qlora_jax.models.config import ModelConfig
from qlora_jax.models.decoder import Decoder
from qlora_jax.models.families import module_shapes, weight_shapes
from qlora_jax.quantization.policy import QuantizationConfig
from qlora_jax.quantization.tensor import QuantizedTensor
from qlora_jax.weight_names import LAYERS

BATCH = ("input_ids", "labels", "positions", "segment_ids")  # as the loader makes it


def weights_of(
    config: ModelConfig,
    quantization: QuantizationConfig | None,
    dtype: str = "bfloat16",
    layout: str = "bnb",
) -> dict[str, Any]:
    """Every weight by its stacked name.

    Args:
      quantization: which weights are 4-bit, and how; None for a dense model.
      dtype: of the weights that are not.
      layout: the code order that the kernels want; no shape depends on it.
    """
    weights = {}
    for name, shape in weight_shapes(config).items():
        lead = (config.num_hidden_layers,) if name.startswith(LAYERS) else ()
        if quantization is not None and quantization.covers(name):
            weights[name] = quantized(shape, lead, quantization, dtype, layout)
        else:
            weights[name] = array((*lead, *shape), dtype)
    return weights


def decoder(config: ModelConfig, weights: dict[str, Any], dtype: str) -> Decoder:
    """The decoder around weights that are shapes, whose shardings it keeps."""
    places: list[int] = []

    def build(weights):
        model = Decoder.from_weights(config, weights, dtype)
        number = {id(leaf): i for i, leaf in enumerate(jax.tree.leaves(weights))}
        places[:] = [number[id(leaf)] for leaf in jax.tree.leaves(model)]
        return model

    structure = jax.tree.structure(jax.eval_shape(build, weights))
    leaves = jax.tree.leaves(weights)
    return structure.unflatten([leaves[place] for place in places])


def quantized(
    shape: tuple[int, int],
    lead: tuple[int, ...],
    how: QuantizationConfig,
    dtype: str,
    layout: str = "bnb",
) -> QuantizedTensor:
    """What `quantize` makes of a matrix (out, in) of `dtype`, stacked over `lead`."""
    out, width = shape
    by_rows = width % how.block_size == 0
    weights, blocks = out * width, -(-out * width // how.block_size)
    codes = (out, width // 2) if by_rows else (-(-weights // 2),)
    scales = (out, width // how.block_size) if by_rows else (blocks,)
    if how.double_quant:
        absmax = DoubleQuantized(
            array((*lead, *scales), "uint8"),
            array((*lead, -(-blocks // NESTED_BLOCK)), "float32"),
            array(lead, "float32"),
        )
    else:
        absmax = array((*lead, *scales), "float32")
    return QuantizedTensor(
        array((*lead, *codes), "uint8"),
        absmax,
        shape,
        dtype,
        how.block_size,
        how.kind,
        layout if by_rows else "bnb",
    )


def adapter_shapes(spec: LoraSpec, config: ModelConfig) -> dict[str, dict[str, Any]]:
    """The `params` of an adapter: float32, what is trained."""
    shapes = param_shapes(spec, module_shapes(config))
    return {
        name: {key: array(shape, "float32") for key, shape in arrays.items()}
        for name, arrays in shapes.items()
    }


def batch_shapes(rows: int, length: int) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch (rows, length) as the loader makes it."""
    return dict.fromkeys(BATCH, array((rows, length), "int32"))


def array(shape: tuple[int, ...], dtype: DTypeLike) -> jax.ShapeDtypeStruct:
    """An array that is not there."""
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))


def nbytes(tree: Any) -> int:
    """Bytes of all arrays of a tree, there or not."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
