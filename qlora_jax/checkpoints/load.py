"""Loads a model's weights: checked, quantized and stacked, one tensor in memory at a time."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.nf4_matmul.layout import prepack
from qlora_jax.checkpoints.aligned import aligned_empty
from qlora_jax.checkpoints.bnb4bit import QuantState, is_4bit, is_beside, read_packed, read_states
from qlora_jax.checkpoints.finite import EXPONENTS, check_finite
from qlora_jax.checkpoints.names import LAYERS, TIED, name_table
from qlora_jax.errors import InputError, listed
from qlora_jax.models.config import ModelConfig
from qlora_jax.models.families import weight_shapes
from qlora_jax.quantization.policy import QuantizationConfig
from qlora_jax.quantization.tensor import QuantizedTensor, quantize

EMBEDDINGS = "model.embed_tokens.weight"

Progress = Callable[[int, int, str], None]  # tensors done, tensors in all, name
OnWeight = Callable[[str, np.ndarray, QuantizedTensor], None]


@runtime_checkable
class Source(Protocol):
    """Where weights come from, by Hugging Face's names: `Shards`, `GGUF`."""

    path: Any
    config: dict[str, Any]

    def names(self) -> list[str]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def dtype(self, name: str) -> str: ...
    def read(self, name: str) -> np.ndarray: ...


def load_weights(
    source: Source,
    model_config: ModelConfig,
    quantization: QuantizationConfig | None = None,
    dtype: str = "bfloat16",
    *,
    layout: str = "bnb",
    progress: Progress | None = None,
    on_weight: OnWeight | None = None,
) -> dict[str, jax.Array | QuantizedTensor]:
    """All weights of a model by stacked name, layers along a leading axis L.

    Names and shapes are checked before anything is read. Peak memory is the result and about two
    dense tensors. A 4-bit source enters as it is stored, never quantized again.

    Args:
      source: `Shards` or `GGUF`.
      model_config: gives the expected names and shapes.
      quantization: which weights become 4-bit, and how; None leaves a dense source dense.
      dtype: of the weights that stay dense.
      layout: the code order that the kernels of this backend want, "bnb" or "halves".
      progress: called after each tensor with (done, total, name).
      on_weight: called with each weight that is quantized: Hugging Face name, dense (out, in),
        QuantizedTensor.

    Raises:
      InputError: W-UNKNOWN, W-MISSING, W-DOUBLE, W-SHAPE, W-DTYPE, W-TIED, W-FINITE (tensor and
        first index), W4-... for a 4-bit source, and what the source raises.
    """
    loader = Loader(source, model_config, quantization, dtype, progress, on_weight)
    result = {}
    for stacked in loader.table:
        weight = loader.weight(stacked)
        if isinstance(weight, QuantizedTensor):
            weight = in_layout(weight, layout)
        result[stacked] = jax.device_put(weight)
    return jax.block_until_ready(result)


class Loader:
    """What `load_weights` knows while it works; made only when names and shapes are right."""

    def __init__(self, source, model_config, quantization, dtype, progress, on_weight):
        self.source, self.where = source, str(source.path)
        self.quantization, self.dtype = quantization, jnp.dtype(dtype)
        self.progress, self.on_weight = progress, on_weight
        packed = is_4bit(source.config, self.where)
        self.states = read_states(source) if packed else {}
        names = [name for name in source.names() if not (packed and is_beside(name))]
        shapes = weight_shapes(model_config)
        self.table = name_table(names, shapes, model_config.num_hidden_layers, self.where)
        self.done, self.total = 0, sum(map(len, self.table.values()))
        for stacked, of_layers in self.table.items():
            for name in of_layers:
                self.check_shape(name, shapes[stacked])
            self.check_alike(of_layers)
        if quantization is not None:
            for name, state in self.states.items():
                refuse_other_quantization(state, quantization, f"{self.where}: {name}")
        if TIED in names and TIED not in shapes:
            self.check_tied()

    def check_shape(self, name: str, expected: tuple[int, ...]) -> None:
        state = self.states.get(name)
        shape = state.shape if state else tuple(self.source.shape(name))
        if shape != tuple(expected):
            where, found = f"{self.where}: {name}", f"has the shape {shape}"
            hint = "the config.json that belongs to these weights"
            raise InputError("W-SHAPE", where, found, f"shape {tuple(expected)}", hint)
        if state and name == EMBEDDINGS:
            raise InputError("W4-MIXED", f"{self.where}: {name}", "is 4-bit", "dense embeddings")
        if not state and self.source.dtype(name) not in EXPONENTS:
            where, found = f"{self.where}: {name}", f"has the dtype {self.source.dtype(name)}"
            raise InputError("W-DTYPE", where, found, f"one of {listed(EXPONENTS)}")

    def check_alike(self, names: list[str]) -> None:
        """Layers are stacked, so all of them are 4-bit in one way, or none is."""
        kinds = {kind_of(self.states.get(name)): name for name in names}
        if len(kinds) > 1:
            found = "; ".join(f"{name}: {kind}" for kind, name in kinds.items())
            raise InputError("W4-MIXED", self.where, f"layers differ: {found}", "one kind")

    def check_tied(self) -> None:
        """A tied model may still carry lm_head, if it is the embeddings."""
        head, embeddings = self.source.read(TIED), self.source.read(EMBEDDINGS)
        if not np.array_equal(head, embeddings):
            found = f"differs from {EMBEDDINGS}, though config.json says tie_word_embeddings"
            hint = 'set "tie_word_embeddings": false in config.json'
            raise InputError("W-TIED", f"{self.where}: {TIED}", found, "equal weights", hint)

    def weight(self, stacked: str) -> np.ndarray | QuantizedTensor:
        """One weight of all layers, in host memory."""
        names, layered = self.table[stacked], stacked.startswith(LAYERS)
        if names[0] in self.states:
            weight = read_packed(self.source, names, [self.states[name] for name in names])
            self.advance(stacked, len(names))
        elif self.quantization and not self.states and self.quantization.covers(stacked):
            weight = stack(self.quantized(names), len(names))
        elif not layered:
            return self.read(stacked, self.dtype)
        else:
            weight = stack((self.read(name, self.dtype) for name in names), len(names))
        return weight if layered else jax.tree.map(lambda leaf: leaf[0], weight)

    def quantized(self, names: list[str]) -> Iterator[QuantizedTensor]:
        """Each layer in 4 bits, its dense array already dropped."""
        found = {self.source.dtype(name) for name in names}
        dtype = found.pop() if len(found) == 1 else "float32"
        dtype = jnp.dtype("float32" if dtype == "float64" else dtype)
        how = self.quantization
        for name in names:
            dense = self.read(name, dtype)
            tensor = quantize(
                jax.device_put(dense),
                kind=how.kind,
                block_size=how.block_size,
                double_quant=how.double_quant,
            )
            if self.on_weight:
                self.on_weight(name, dense, tensor)
            del dense
            yield tensor

    def read(self, name: str, dtype: np.dtype) -> np.ndarray:
        """One dense weight in `dtype`, finite."""
        with np.errstate(over="ignore"):  # float16's range: reported as not finite
            array = self.source.read(name).astype(dtype, copy=False)
        check_finite(array, self.where, name)
        self.advance(name)
        return array

    def advance(self, name: str, count: int = 1) -> None:
        self.done += count
        if self.progress:
            self.progress(self.done, self.total, name)


def stack(trees: Iterator[Any], count: int) -> Any:
    """`count` trees of equal shapes as one in host memory, with one of them alive at a time."""
    stacked = None
    for i, tree in enumerate(trees):
        if stacked is None:
            stacked = jax.tree.map(
                lambda leaf: aligned_empty((count, *leaf.shape), leaf.dtype), tree
            )
        jax.tree.map(lambda whole, leaf, i=i: np.copyto(whole[i, ...], leaf), stacked, tree)
    return stacked


def in_layout(tensor: QuantizedTensor, layout: str) -> QuantizedTensor:
    """The codes in another order, where they lie: matrix by matrix in NumPy, nothing to compile."""
    if layout == "bnb" or not tensor.by_rows:
        return tensor
    for codes in tensor.codes.reshape(-1, *tensor.codes.shape[-2:]):
        codes[...] = prepack(codes, layout)
    return dataclasses.replace(tensor, layout=layout)


def kind_of(state: QuantState | None) -> str:
    """How a weight is stored, in words; equal for weights that can be stacked."""
    if state is None:
        return "dense"
    double = "single" if state.offset is None else "double"
    return f"{state.kind}, block {state.block_size}, {double} quantization, of {state.dtype}"


def refuse_other_quantization(state: QuantState, asked: QuantizationConfig, where: str) -> None:
    """A 4-bit weight cannot become another kind of 4-bit weight without loss."""
    found = (state.kind, state.block_size, state.offset is not None)
    wanted = (asked.kind, asked.block_size, asked.double_quant)
    if found != wanted:
        text = f"is quantized already: kind, block size, double quantization are {found}"
        hint = "the same settings, or the unquantized model"
        raise InputError("W4-REQUANTIZE", where, text, f"{wanted} as asked for", hint)
