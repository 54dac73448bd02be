"""Loads a model's weights: checked, quantized and stacked, one tensor in memory at a time."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.nf4_matmul.layout import prepack
from qlora_jax.checkpoints.aligned import aligned_empty
from qlora_jax.checkpoints.bnb4bit import (
    UNKNOWN,
    QuantState,
    is_4bit,
    is_beside,
    read_packed,
    read_states,
)
from qlora_jax.checkpoints.finite import EXPONENTS, check_finite
from qlora_jax.checkpoints.names import hugging_face_names, name_table, split
from qlora_jax.checkpoints.safetensors_header import Spec, nbytes
from qlora_jax.errors import InputError, listed
from qlora_jax.models.config import ModelConfig
from qlora_jax.models.families import weight_shapes
from qlora_jax.placement import to_host
from qlora_jax.quantization.in_pieces import quantize_in_pieces
from qlora_jax.quantization.policy import QuantizationConfig
from qlora_jax.quantization.tensor import QuantizedTensor
from qlora_jax.weight_names import EMBEDDINGS, HEAD, LAYERS, is_streamed

Progress = Callable[[int, int, str], None]  # bytes done, bytes in all, name
OnWeight = Callable[[str, np.ndarray, QuantizedTensor], None]
Quantizer = Callable[[str, np.ndarray], QuantizedTensor]  # name, dense (out, in)


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
    stream_weights: str = "off",
    progress: Progress | None = None,
    on_weight: OnWeight | None = None,
) -> dict[str, jax.Array | QuantizedTensor]:
    """All weights of a model by stacked name, layers along a leading axis L.

    Peak memory is the result, about two dense tensors, and where an array that was read must be
    copied to get to its place, one stacked weight: the largest come first, when little is there.

    Args:
      layout: the code order that the kernels of this backend want, "bnb" or "halves".
      stream_weights: what of it lives in host memory, a key of weight_names.STREAMED.
      others: as for `Loader`.

    Raises:
      InputError: as `Loader`, W-FINITE (tensor and first index), and what the source raises.
    """
    loader = Loader(
        source, model_config, quantization, dtype, progress=progress, on_weight=on_weight
    )
    result = {}
    for stacked in sorted(loader.table, key=loader.stacked_nbytes, reverse=True):
        weight = loader.stacked(stacked)
        if isinstance(weight, QuantizedTensor):
            weight = in_layout(weight, layout)
        place = to_host if is_streamed(stacked, stream_weights) else jax.device_put
        result[stacked] = jax.block_until_ready(place(weight))
    return result


def source_dtype(source: Source) -> str:
    """The dtype of a source's dense weights: that of its embeddings; float32 for GGUF's blocks."""
    found = source.dtype(EMBEDDINGS) if EMBEDDINGS in source.names() else "float32"
    return "float32" if found == "float64" else found


class Loader:
    """The weights of a source, read when asked for; made only when names and shapes are right.

    A 4-bit source enters as it is stored, never quantized again.

    Args:
      source: `Shards` or `GGUF`.
      model_config: gives the expected names and shapes.
      quantization: which weights become 4-bit, and how; None leaves a dense source dense.
      dtype: of the weights that stay dense.
      progress: called after each tensor with (bytes done, bytes in all, name).
      on_weight: called with each weight that is quantized: Hugging Face name, dense (out, in),
        QuantizedTensor.
      quantizer: makes the 4 bits of such a weight, with `quantization`'s kind, blocks and scales;
        by default those of the weight itself.

    Attributes:
      table: stacked name -> the source's name of every layer.
      own: Hugging Face name -> the source's name, all of one layer, then the next layer.

    Raises:
      InputError: W-UNKNOWN, W-MISSING, W-DOUBLE, W-SHAPE, W-DTYPE, W-TIED; W4-... for a 4-bit
        source.
    """

    def __init__(
        self,
        source: Source,
        model_config: ModelConfig,
        quantization: QuantizationConfig | None = None,
        dtype: str = "bfloat16",
        *,
        progress: Progress | None = None,
        on_weight: OnWeight | None = None,
        quantizer: Quantizer | None = None,
    ):
        self.source, self.where = source, str(source.path)
        self.model_config = model_config
        self.quantization, self.dtype = quantization, jnp.dtype(dtype)
        self.progress, self.on_weight, self.quantizer = progress, on_weight, quantizer
        packed = is_4bit(source.config, self.where)
        self.states = read_states(source) if packed else {}
        names = [name for name in source.names() if not (packed and is_beside(name))]
        layers, self.shapes = model_config.num_hidden_layers, weight_shapes(model_config)
        self.table = name_table(names, self.shapes, layers, self.where)
        self.own = {
            name: self.table[stacked][split(name)[1] or 0]
            for name, stacked in hugging_face_names(self.shapes, layers).items()
        }
        self.done, self.total = 0, sum(map(self.nbytes, self.own.values()))
        for stacked, of_layers in self.table.items():
            for name in of_layers:
                self.check_shape(name, self.shapes[stacked])
            self.check_alike(of_layers)
        if quantization is not None:
            for name, state in self.states.items():
                refuse_other_quantization(state, quantization, f"{self.where}: {name}")
        if HEAD in names and HEAD not in self.shapes:
            self.check_tied()

    def check_shape(self, name: str, expected: tuple[int, ...]) -> None:
        state = self.states.get(name)
        shape = state.shape if state else tuple(self.source.shape(name))
        refuse_other_shape(f"{self.where}: {name}", shape, expected)
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
        same = self.source.shape(HEAD) == self.source.shape(EMBEDDINGS)
        if same:
            head, embeddings = self.source.read(HEAD), self.source.read(EMBEDDINGS)
            rows = range(0, len(head), 1024)  # not one mask for all of it
            same = all(np.array_equal(head[i : i + 1024], embeddings[i : i + 1024]) for i in rows)
        if not same:
            found = f"differs from {EMBEDDINGS}, though config.json says tie_word_embeddings"
            hint = 'set "tie_word_embeddings": false in config.json'
            raise InputError("W-TIED", f"{self.where}: {HEAD}", found, "equal weights", hint)

    def plan(self) -> dict[str, QuantState | Spec]:
        """What each weight becomes, by Hugging Face name: a 4-bit state, or dtype and shape."""
        return {name: self.planned(own) for name, own in self.own.items()}

    def planned(self, name: str) -> QuantState | Spec:
        stacked, how = split(name)[0], self.quantization
        shape = tuple(self.shapes[stacked])
        if name in self.states:
            return self.states[name]
        if not self.covers(name):
            return self.dtype, shape
        offset = UNKNOWN if how.double_quant else None
        return QuantState(how.kind, how.block_size, self.read_dtype(name).name, shape, offset)

    def covers(self, name: str) -> bool:
        """Whether a dense weight is quantized on the way in."""
        return bool(self.quantization and not self.states and self.quantization.covers(name))

    def read_dtype(self, name: str) -> np.dtype:
        """What a weight is quantized from, or stays: one dtype for all layers."""
        if not self.covers(name):
            return self.dtype
        found = {self.source.dtype(layer) for layer in self.table[split(name)[0]]}
        dtype = found.pop() if len(found) == 1 else "float32"
        return jnp.dtype("float32" if dtype == "float64" else dtype)

    def weights(self) -> Iterator[tuple[str, np.ndarray | QuantizedTensor]]:
        """(Hugging Face name, weight) of every weight, in host memory, one at a time."""
        weights = self.each(self.own.values())
        for name in self.own:
            yield name, next(weights)  # not by zip, which keeps the last one
        next(weights, None)  # the last one is done too

    def stacked(self, stacked: str) -> np.ndarray | QuantizedTensor:
        """One weight of all layers, in host memory."""
        names = self.table[stacked]
        if not stacked.startswith(LAYERS):
            (weight,) = self.each(names)
            return weight
        if names[0] in self.states:
            states = [self.states[name] for name in names]
            return read_packed(self.source, names, states, self.advance)
        return stack(self.each(names), len(names))

    def each(self, names: Iterable[str]) -> Iterator[np.ndarray | QuantizedTensor]:
        """The weights `names` of the source; each is read while the one before is quantized."""
        for name, read in one_ahead((name, self.read(name)) for name in names):
            yield self.quantized(name, read) if self.covers(name) else read
            del read  # before the one behind the next is read
            self.advance(name)

    def read(self, name: str) -> np.ndarray | QuantizedTensor:
        """One weight: packed as it is stored, or dense, cast and finite."""
        if name in self.states:
            packed = read_packed(self.source, [name], [self.states[name]])
            return jax.tree.map(lambda leaf: leaf[0], packed)
        with np.errstate(over="ignore"):  # float16's range: reported as not finite
            array = self.source.read(name).astype(self.read_dtype(name), copy=False)
        check_finite(array, self.where, name)
        return array

    def quantized(self, name: str, dense: np.ndarray) -> QuantizedTensor:
        """One weight in 4 bits."""
        if self.quantizer:
            tensor = self.quantizer(name, dense)
        else:
            tensor = quantized_as(self.quantization, dense)
        if self.on_weight:
            self.on_weight(name, dense, tensor)
        return tensor

    def stacked_nbytes(self, stacked: str) -> int:
        """Bytes of a weight of all layers as it is read."""
        return sum(map(self.nbytes, self.table[stacked]))

    def nbytes(self, name: str) -> int:
        """Bytes of a weight as it is read, scales and tables included."""
        if name in self.states:
            return sum(map(nbytes, self.states[name].specs().values()))
        return nbytes((jnp.dtype(self.source.dtype(name)), self.source.shape(name)))

    def advance(self, name: str) -> None:
        self.done += self.nbytes(name)
        if self.progress:
            self.progress(self.done, self.total, name)


def quantized_as(how: QuantizationConfig, dense: np.ndarray) -> QuantizedTensor:
    """One dense matrix in 4 bits, in host memory."""
    return quantize_in_pieces(
        dense, kind=how.kind, block_size=how.block_size, double_quant=how.double_quant
    )


def one_ahead[Item](items: Iterator[Item]) -> Iterator[Item]:
    """The items; each is made in a thread while the one before is used."""
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = thread.submit(next, items, None)
            yield item


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


def refuse_other_shape(where: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """A weight has the shape that config.json says."""
    if shape != tuple(expected):
        found, hint = f"has the shape {shape}", "the config.json that belongs to these weights"
        raise InputError("W-SHAPE", where, found, f"shape {tuple(expected)}", hint)


def refuse_other_quantization(state: QuantState, asked: QuantizationConfig, where: str) -> None:
    """A 4-bit weight cannot become another kind of 4-bit weight without loss."""
    found = (state.kind, state.block_size, state.offset is not None)
    wanted = (asked.kind, asked.block_size, asked.double_quant)
    if found != wanted:
        text = f"is quantized already: kind, block size, double quantization are {found}"
        hint = "the same settings, or the unquantized model"
        raise InputError("W4-REQUANTIZE", where, text, f"{wanted} as asked for", hint)
