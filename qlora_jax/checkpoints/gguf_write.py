"""Writes a GGUF file (version 3) in bounded memory: one tensor at a time, packed piece by piece.

Names, shapes and formats are known before the first tensor, so that the header comes first and
every tensor has its place. The file appears under its name only when it has been read again.
"""

import hashlib
import math
import os
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from qlora_jax.checkpoints.atomic import new_file, refuse_too_large
from qlora_jax.checkpoints.finite import check_finite
from qlora_jax.checkpoints.gguf_header import (
    ARRAY,
    BOOL,
    MAX_NAME,
    STRING,
    U32,
    aligned,
    read_header,
)
from qlora_jax.checkpoints.gguf_pack import BY_NAME, packed
from qlora_jax.checkpoints.write_shards import write_all
from qlora_jax.errors import InputError, StorageError

I32, F32 = 5, 6
PIECE = 4 << 20  # bytes read again at once

Value = bool | int | float | str | list | bytes
Spec = tuple[str, tuple[int, ...]]  # format, and shape with rows first


def save_gguf(
    out: str | Path,
    metadata: Mapping[str, Value],
    specs: Mapping[str, Spec],
    tensors: Iterable[tuple[str, np.ndarray]],
) -> None:
    """Writes a file that llama.cpp opens; it appears whole or not at all, and overwrites nothing.

    Args:
      out: a path where nothing is yet.
      metadata: key -> value; a whole number is written as uint32, a float as float32, lists of them
        as arrays of int32 and float32; bytes are a type and a value already encoded.
      specs: tensor name -> format (F32, F16, BF16, Q8_0, Q4_0) and shape, in the file's order.
      tensors: each tensor of `specs` once, in any order and any float dtype, made one at a time.

    Raises:
      InputError: OUT-EXISTS, GG-SUFFIX, W-FINITE for a NaN or Inf, GG-RANGE for a value that is too
        large for its format.
      StorageError: OUT-FULL, OUT-WRITE, OUT-VERIFY.
    """
    if Path(out).suffix != ".gguf":
        raise InputError("GG-SUFFIX", out, "has another suffix", "a name that ends with .gguf")
    with new_file(out) as path, GGUFWriter(path, metadata, specs, str(out)) as writer:
        for name, array in tensors:
            writer.write(name, array)
        writer.verify()


class GGUFWriter:
    """One file that is being written.

    Args:
      path: a new file.
      metadata, specs: see `save_gguf`.
      where: what errors call the file.

    Raises:
      StorageError: OUT-FULL when the disk has no room for all of it.
    """

    def __init__(
        self, path: Path, metadata: Mapping[str, Value], specs: Mapping[str, Spec], where: str
    ):
        self.specs, self.where = dict(specs), where
        self.digests: dict[str, bytes] = {}
        infos, end = b"", 0
        offsets = {}
        for name, (kind, shape) in self.specs.items():
            assert len(name.encode()) <= MAX_NAME, f"{name} is too long for llama.cpp"
            offsets[name] = end
            dims = struct.pack(f"<I{len(shape)}q", len(shape), *reversed(shape))
            infos += text(name) + dims + struct.pack("<IQ", BY_NAME[kind][0], end)
            end = aligned(end + nbytes((kind, shape)))
        head = b"GGUF" + struct.pack("<Iqq", 3, len(self.specs), len(metadata))
        head += b"".join(text(key) + encoded(value) for key, value in metadata.items()) + infos
        head += b"\0" * (aligned(len(head)) - len(head))
        self.header = head
        self.places = {name: len(head) + offset for name, offset in offsets.items()}
        refuse_too_large(path.parent, len(head) + end)
        self.file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        write_all(self.file, head, 0)
        os.ftruncate(self.file, len(head) + end)

    def write(self, name: str, array: np.ndarray) -> None:
        """Packs one tensor, whose shape is as announced, and writes it to its place."""
        kind, shape = self.specs[name]
        assert array.shape == shape, (name, array.shape, shape)
        assert name not in self.digests, f"{name} is written twice"
        check_finite(array, self.where, name)
        digest, offset = hashlib.sha256(), self.places[name]
        for piece in packed(array, kind, f"{self.where}: {name}"):
            data = memoryview(piece.reshape(-1))
            write_all(self.file, data, offset)
            digest.update(data)
            offset += len(data)
        self.digests[name] = digest.digest()

    def verify(self) -> None:
        """Reads the whole file again with our own reader, and compares what came back.

        Raises:
          StorageError: OUT-VERIFY names the first tensor that differs.
        """
        missing = self.specs.keys() - self.digests.keys()
        assert not missing, f"never written: {sorted(missing)[:5]}"
        header = read_header(self.file, os.fstat(self.file).st_size, self.where)
        found = {name: (t.block.name, t.shape) for name, t in header.tensors.items()}
        if found != self.specs or os.pread(self.file, len(self.header), 0) != self.header:
            raise StorageError("OUT-VERIFY", self.where, "the header differs on the disk")
        for name, tensor in header.tensors.items():
            digest, buffer = hashlib.sha256(), bytearray(min(PIECE, tensor.nbytes))
            for start in range(0, tensor.nbytes, PIECE):
                piece = memoryview(buffer)[: min(PIECE, tensor.nbytes - start)]
                os.preadv(self.file, [piece], tensor.offset + start)
                digest.update(piece)
            if digest.digest() != self.digests[name]:
                found = "differs on the disk from what was written"
                raise StorageError("OUT-VERIFY", f"{self.where}: {name}", found)

    def __enter__(self) -> "GGUFWriter":
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self.file)


def nbytes(spec: Spec) -> int:
    """Bytes of a tensor."""
    block = BY_NAME[spec[0]][1]
    assert spec[1][-1] % block.values == 0, f"{spec}: a row is no whole number of blocks"
    return math.prod(spec[1]) // block.values * block.nbytes


def text(value: str) -> bytes:
    """A string as GGUF has it: its length, then UTF-8."""
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def encoded(value: Value) -> bytes:
    """A metadata value's type and bytes; types are those that llama.cpp's own keys have."""
    if isinstance(value, bytes):
        return value
    if isinstance(value, list):
        kind = {bool: BOOL, int: I32, float: F32, str: STRING}[type((value or [""])[0])]
        head = struct.pack("<IIQ", ARRAY, kind, len(value))
        if kind == STRING:
            return head + b"".join(map(text, value))
        return head + np.array(value, {BOOL: "<u1", I32: "<i4", F32: "<f4"}[kind]).tobytes()
    if isinstance(value, str):
        return struct.pack("<I", STRING) + text(value)
    kind, form = {bool: (BOOL, "?"), int: (U32, "I"), float: (F32, "f")}[type(value)]
    return struct.pack("<I" + form, kind, value)
