"""A GGUF file as a source of Hugging Face weights: one tensor at a time, dequantized as it is read.

    source = GGUF("model.gguf")
    source.config["hidden_size"], source.read("model.layers.0.mlp.up_proj.weight")

Packed bytes are read and unpacked in pieces of a few MB, so that a tensor costs its float32 size
and little more.
"""

from pathlib import Path
from typing import Any

import numpy as np

from qlora_jax.checkpoints.files import OpenFile, bytes_of
from qlora_jax.checkpoints.gguf_blocks import Block
from qlora_jax.checkpoints.gguf_config import Keys, hugging_face_config, refuse_what_is_no_model
from qlora_jax.checkpoints.gguf_header import Tensor, read_header
from qlora_jax.checkpoints.gguf_names import ARCHITECTURES, names_in_file, split_halves
from qlora_jax.checkpoints.names import layer_names, split
from qlora_jax.errors import InputError, listed
from qlora_jax.models.config import ModelConfig
from qlora_jax.models.families import weight_shapes
from qlora_jax.weight_names import LAYERS

PIECE = 4 << 20  # bytes of packed weights in memory at once
MAX_FACTORS = 1 << 16  # rotary factors, one for each pair of a head's channels


class GGUF(OpenFile):
    """A GGUF file (versions 2 and 3), checked when opened; weights have Hugging Face's names.

    Attributes:
      path: the file.
      config: what config.json of the same model says.
      metadata: the file's own keys, such as `tokenizer.ggml.tokens`.

    Raises:
      InputError: GG-... for a file that is damaged, hostile, or of an unknown architecture.
    """

    area, missing = "GG", "GG-FILE"

    def __init__(self, path: str | Path):
        self.path = Path(path)
        super().__init__(self.path, str(path))

    def read_entries(self) -> dict[str, Tensor]:
        """The file's tensors by its own names."""
        header = read_header(self.file, self.stamp[0], self.where)
        self.tensors, self.metadata = header.tensors, header.metadata
        self.spans = header.spans
        keys = Keys(self.metadata, self.where)
        refuse_what_is_no_model(keys)
        architecture = keys.architecture
        self.row = ARCHITECTURES[architecture]
        self.gguf_names = names_in_file(self.tensors, architecture, self.where)
        self.config = self.checked_config()
        return self.tensors

    def checked_config(self) -> dict[str, Any]:
        """config.json's content; every weight that it asks for is there, and no other."""
        factors = {name: self.rope_factors(name) for name in self.row.rope if name in self.tensors}
        layers = Keys(self.metadata, self.where).size(".block_count")
        if layers > len(self.tensors):  # before one name a layer is made
            found = f"claims {layers} layers, has {len(self.tensors)} tensors"
            raise InputError("GG-MISSING", self.where, found)
        config = hugging_face_config(self.metadata, self.gguf_names.keys(), factors, self.where)
        stacked = weight_shapes(ModelConfig.from_dict(config, self.where))
        shapes = {name: shape for s, shape in stacked.items() for name in layer_names(s, layers)}
        if missing := shapes.keys() - self.gguf_names.keys():
            found = f"missing weights: {listed(sorted(missing))}"
            raise InputError("GG-MISSING", self.where, found)
        if extra := self.gguf_names.keys() - shapes.keys():
            found = f"{listed(sorted(extra))} beyond a {config['model_type']} of {layers} layers"
            raise InputError("GG-UNKNOWN", self.where, found)
        for name, shape in shapes.items():
            if self.shape(name) != shape:
                where = f"{self.where}: {self.gguf_names[name]}"
                raise InputError("GG-SHAPE", where, f"has the shape {self.shape(name)}", str(shape))
        return config

    def encoded(self, key: str) -> bytes:
        """A metadata value as it lies in the file, its type included."""
        start, end = self.spans[key]
        value = np.empty(end - start, np.uint8)
        self.fill(bytes_of(value), start)
        return value.tobytes()

    def rope_factors(self, name: str) -> np.ndarray:
        """A small tensor that is no weight."""
        shape = self.tensors[name].shape
        if len(shape) != 1 or shape[0] > MAX_FACTORS:
            expected = f"(pairs of channels,), at most {MAX_FACTORS}"
            raise InputError("GG-ROPE", f"{self.where}: {name}", f"has the shape {shape}", expected)
        return self.unpacked(name, self.tensors[name]).astype(np.float32)

    def names(self) -> list[str]:
        """All weights, in the file's order."""
        return list(self.gguf_names)

    def shape(self, name: str) -> tuple[int, ...]:
        """(out, in) of a matrix, (width,) of a norm."""
        return self.tensors[self.gguf_names[name]].shape

    def dtype(self, name: str) -> str:
        """Of what `read` returns: float16 and bfloat16 as stored, all else float32."""
        dtype = self.tensors[self.gguf_names[name]].block.dtype
        return "float32" if self.is_shifted(name) else dtype.name

    def is_shifted(self, name: str) -> bool:
        """Whether the file holds a norm's weight plus the 1 that Hugging Face adds later."""
        return self.row.norm_offset != 0 and name.endswith("norm.weight")

    def read(self, name: str) -> np.ndarray:
        """The weight `name`, in Hugging Face's row order and without llama.cpp's 1 in norms.

        Raises:
          InputError: GG-NAN for a NaN or Inf, GG-CHANGED when the file changed since it was opened.
        """
        weight = self.unpacked(self.gguf_names[name], self.tensors[self.gguf_names[name]])
        if self.is_shifted(name):
            return weight.astype(np.float32) - np.float32(self.row.norm_offset)
        part = split(name)[0].removeprefix(LAYERS).rpartition(".")[0]
        if part in self.row.interleaved:
            heads = "num_attention_heads" if part.endswith("q_proj") else "num_key_value_heads"
            weight = split_halves(weight, self.config[heads])
        return weight

    def unpacked(self, gguf_name: str, tensor: Tensor) -> np.ndarray:
        """A tensor in the file's own row order."""
        block = tensor.block
        count = tensor.nbytes // block.nbytes
        out = np.empty((count, block.values), block.dtype)
        step = max(1, PIECE // block.nbytes)
        packed = np.empty((min(step, count), block.nbytes), np.uint8)
        for start in range(0, count, step):
            piece = packed[: min(step, count - start)]
            self.fill(bytes_of(piece), tensor.offset + start * block.nbytes)
            values = out[start : start + len(piece)]
            with np.errstate(invalid="ignore", over="ignore"):  # a scale that is Inf or NaN
                block.unpack(piece, values)
            self.check_finite(values, start * block.values, gguf_name, block)
        return out.reshape(tensor.shape)

    def check_finite(self, values: np.ndarray, start: int, gguf_name: str, block: Block) -> None:
        finite = np.isfinite(values)
        if not finite.all():
            index = int(np.argmin(finite.reshape(-1)))
            found = f"{values.reshape(-1)[index]} at value {start + index} ({block.name})"
            raise InputError("GG-NAN", f"{self.where}: {gguf_name}", found, "finite weights")

    def __enter__(self) -> "GGUF":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
