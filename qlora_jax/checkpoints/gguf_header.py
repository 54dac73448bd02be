"""GGUF's header: metadata and tensor table, read strictly and only as far as the file really goes.

    magic "GGUF" | version u32 | tensors i64 | keys i64
    key, type u32, value                              for every key
    name, dims u32, dim i64 each, type u32, offset    for every tensor
    padding to the alignment | data, each tensor padded to the alignment

No count, length or shape is believed before the bytes that it speaks of are known to be there, and
nothing is memory-mapped, so a hostile file costs no more memory than its header, bounded by
MAX_HEADER, and the Python objects of MAX_ELEMENTS. The rules are llama.cpp's (gguf.cpp), and
stricter where it lets damage pass.
"""

import os
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np

from qlora_jax.checkpoints.files import refuse_foreign
from qlora_jax.checkpoints.gguf_blocks import BLOCKS, UNREAD, Block
from qlora_jax.errors import InputError, listed

MAX_HEADER = 64 << 20  # bytes; a vocabulary of 262,144 tokens with its merges takes about 20 MB
MAX_ELEMENTS = 1 << 22  # of all arrays: as Python numbers 170 MB; Gemma's have 1.3 million
MAX_STRING = 1 << 30
MAX_KEY = 65_535
MAX_NAME = 63
MIN_KEY_ENTRY, MIN_TENSOR_ENTRY = 13, 32  # bytes
READ_AHEAD = 1 << 20
ALIGNMENT = 32  # of tensors in a file that names no other

SCALARS = {
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "<u1",
    10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip
LENGTH = struct.Struct("<Q")  # of a string
U32, BOOL, STRING, ARRAY = 4, 7, 8, 9


@dataclass(frozen=True)
class Tensor:
    """Where a tensor lies: shape row-major (rows first), offset from the file's start, in bytes."""

    shape: tuple[int, ...]
    block: Block
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Header:
    """What a GGUF file says of itself: metadata in plain Python values, tensors in file order.

    `spans` has the bytes of each value, from its type on, so that a copy can keep them as they are.
    """

    version: int
    metadata: dict[str, Any]
    tensors: dict[str, Tensor]
    spans: dict[str, tuple[int, int]]


class Cursor:
    """Reads the file `fd` of `size` bytes front to back, never past its end."""

    def __init__(self, fd: int, size: int, where: str):
        self.fd, self.size, self.where = fd, size, where
        self.position, self.elements = 0, 0
        self.buffer, self.buffer_start = b"", 0

    def left(self) -> int:
        return self.size - self.position

    def take(self, count: int, what: str) -> bytes:
        if count > self.left():
            raise InputError(
                "GG-CUT",
                self.where,
                f"truncated: {what} needs {count} bytes at byte {self.position}, "
                f"{self.left()} are left",
                hint="download the file again",
            )
        if self.position + count > MAX_HEADER:
            raise InputError(
                "GG-HEADER", self.where, f"the header is larger than {MAX_HEADER} bytes"
            )
        begin = self.position - self.buffer_start
        if begin + count > len(self.buffer):
            self.buffer = os.pread(self.fd, max(count, READ_AHEAD), self.position)
            self.buffer_start, begin = self.position, 0
        piece = self.buffer[begin : begin + count]
        if len(piece) != count:
            raise InputError("GG-CHANGED", self.where, "the file shrank while it was read")
        self.position += count
        return piece

    def number(self, format: str, what: str) -> int:
        return struct.unpack("<" + format, self.take(struct.calcsize("<" + format), what))[0]

    def string(self, what: str, limit: int = MAX_STRING) -> str:
        length = self.number("Q", f"the length of {what}")
        if length > min(limit, self.left()):
            raise InputError(
                "GG-STRING",
                self.where,
                f"{what} claims {length} bytes",
                f"at most {min(limit, self.left())}",
            )
        try:
            return self.take(length, what).decode()
        except UnicodeDecodeError as error:
            raise InputError("GG-UTF8", self.where, f"{what} is not UTF-8: {error}") from None

    def strings_ahead(self, most: int) -> list[str]:
        """The next strings, at most `most`, up to one that is not whole in the buffer, or wrong."""
        found, begin = [], self.position - self.buffer_start
        while len(found) < most and begin + LENGTH.size <= len(self.buffer):
            start = begin + LENGTH.size
            end = start + LENGTH.unpack_from(self.buffer, begin)[0]
            if end > len(self.buffer):
                break
            try:
                found.append(self.buffer[start:end].decode())
            except UnicodeDecodeError:
                break
            begin = end
        self.position = self.buffer_start + begin
        return found


def read_header(fd: int, size: int, where: str) -> Header:
    """The checked header of the open GGUF file `fd` of `size` bytes.

    Raises:
      InputError: GG-... for whatever is wrong; `where` is named.
    """
    cursor = Cursor(fd, size, where)
    version = read_version(cursor)
    tensor_count = read_count(cursor, "tensors", MIN_TENSOR_ENTRY)
    key_count = read_count(cursor, "metadata keys", MIN_KEY_ENTRY)
    metadata, spans, alignment = read_metadata(cursor, key_count)
    return Header(version, metadata, read_tensors(cursor, tensor_count, alignment), spans)


def read_version(cursor: Cursor) -> int:
    """2 or 3; what is no GGUF file at all is named here."""
    if os.pread(cursor.fd, 4, 0) != b"GGUF":
        refuse_foreign(cursor.fd, cursor.where, "GG")
    if (magic := cursor.take(4, "the magic")) != b"GGUF":
        raise InputError("GG-MAGIC", cursor.where, f"starts with {magic!r}", "b'GGUF'")
    version = cursor.number("I", "the version")
    if version and not version & 0xFFFF:
        raise InputError("GG-ENDIAN", cursor.where, "is big-endian", "a little-endian GGUF file")
    if version not in (2, 3):
        raise InputError("GG-VERSION", cursor.where, f"is GGUF version {version}", "2 or 3")
    return version


def read_count(cursor: Cursor, what: str, entry_bytes: int) -> int:
    """A number of entries for which the file has room."""
    count = cursor.number("q", f"the number of {what}")
    if not 0 <= count <= cursor.left() // entry_bytes:
        raise InputError(
            "GG-COUNT",
            cursor.where,
            f"truncated or false: claims {count} {what}",
            f"0 to {cursor.left() // entry_bytes}, which the file's size allows",
        )
    return count


def read_metadata(cursor: Cursor, count: int) -> tuple[dict, dict[str, tuple[int, int]], int]:
    """Keys to values, where each value lies, and the alignment of the data."""
    metadata, spans, alignment = {}, {}, ALIGNMENT
    for index in range(count):
        key = cursor.string(f"metadata key {index}", MAX_KEY)
        if not key or key in metadata:
            found = f"metadata key {index} is {'doubled: ' + key if key else 'empty'}"
            raise InputError("GG-KEY", cursor.where, found)
        start = cursor.position
        kind = cursor.number("I", f"the type of {key}")
        metadata[key] = read_value(cursor, key, kind)
        spans[key] = start, cursor.position
        if key == "general.alignment":
            alignment = metadata[key]
            if kind != U32 or alignment == 0 or alignment & (alignment - 1):
                found = f"general.alignment is {alignment!r}"
                raise InputError("GG-ALIGN", cursor.where, found, "a uint32 power of two")
    return metadata, spans, alignment


def read_value(cursor: Cursor, key: str, kind: int) -> Any:
    """A value of the type that the file declares for it."""
    if kind == STRING:
        return cursor.string(key)
    if kind == ARRAY:
        element = cursor.number("I", f"the element type of {key}")
        return read_array(cursor, key, element, cursor.number("Q", f"the length of {key}"))
    if kind not in SCALARS:
        raise InputError("GG-KVTYPE", cursor.where, f"{key} has the unknown type {kind}", "0 to 12")
    return read_scalars(cursor, key, kind, 1)[0]


def read_array(cursor: Cursor, key: str, element: int, count: int) -> list:
    """An array's elements; arrays of arrays are refused."""
    if element != STRING and element not in SCALARS:
        what = "arrays" if element == ARRAY else f"the unknown type {element}"
        found = f"{key} is an array of {what}"
        raise InputError("GG-ARRAY", cursor.where, found, "an array of numbers or strings")
    smallest = 8 if element == STRING else np.dtype(SCALARS[element]).itemsize
    if count > cursor.left() // smallest:
        found = f"{key} claims {count} elements, the file has {cursor.left()} bytes left"
        raise InputError("GG-ARRAY", cursor.where, found)
    cursor.elements += count
    if cursor.elements > MAX_ELEMENTS:
        found = f"arrays have {cursor.elements} elements up to {key}"
        raise InputError("GG-ARRAY", cursor.where, found, f"at most {MAX_ELEMENTS} in all")
    if element == STRING:
        return read_strings(cursor, key, count)
    return read_scalars(cursor, key, element, count)


def read_strings(cursor: Cursor, key: str, count: int) -> list[str]:
    """`count` strings: at once those that lie whole in what was read ahead, which is quicker."""
    strings = []
    while len(strings) < count:
        strings += cursor.strings_ahead(count - len(strings))
        if len(strings) < count:
            strings.append(cursor.string(f"{key}[{len(strings)}]"))
    return strings


def read_scalars(cursor: Cursor, key: str, kind: int, count: int) -> list:
    """`count` numbers of one type as Python numbers."""
    dtype = np.dtype(SCALARS[kind])
    values = np.frombuffer(cursor.take(count * dtype.itemsize, key), dtype)
    if kind == BOOL:
        if (values > 1).any():
            raise InputError("GG-BOOL", cursor.where, f"{key} holds {values.max()}", "0 or 1")
        values = values.astype(bool)
    return values.tolist()


def read_tensors(cursor: Cursor, count: int, alignment: int) -> dict[str, Tensor]:
    """The tensor table, each tensor known to lie inside the file and right behind the last."""
    entries: dict[str, tuple] = {}
    for index in range(count):
        name = cursor.string(f"the name of tensor {index}", MAX_NAME)
        if not name or name in entries:
            found = f"tensor {index} has {'the doubled name ' + name if name else 'no name'}"
            raise InputError("GG-NAME", cursor.where, found)
        entries[name] = read_entry(cursor, f"{cursor.where}: {name}")
    start, end = aligned(cursor.position, alignment), 0
    tensors = {}
    for name, (shape, block, nbytes, offset) in entries.items():
        where = f"{cursor.where}: {name}"
        place = aligned(end, alignment)
        if offset != place:
            found = f"begins at data byte {offset}"
            raise InputError("GG-OFFSET", where, found, f"{place}: no gap, no overlap")
        end = offset + nbytes
        if start + end > cursor.size:
            found = f"truncated: ends at byte {start + end}, the file has {cursor.size}"
            raise InputError("GG-CUT", where, found, hint="download the file again")
        tensors[name] = Tensor(shape, block, start + offset, nbytes)
    # A byte put in anywhere before shifts what follows.
    if cursor.size > start + aligned(end, alignment):
        found = f"{cursor.size - start - end} bytes behind the last tensor"
        raise InputError("GG-TRAILING", cursor.where, found, hint="download the file again")
    return tensors


def aligned(position: int, alignment: int = ALIGNMENT) -> int:
    """The next place where a tensor may begin."""
    return -(-position // alignment) * alignment


def read_entry(cursor: Cursor, where: str) -> tuple[tuple[int, ...], Block, int, int]:
    """A tensor's shape (rows first), format, bytes, and offset into the data."""
    rank = cursor.number("I", "a tensor's rank")
    if not 1 <= rank <= 4:
        raise InputError("GG-DIMS", where, f"has {rank} dimensions", "1 to 4")
    dims = [cursor.number("q", "a tensor's dimension") for _ in range(rank)]
    total = 1
    for dim in dims:
        total *= dim
        if dim <= 0 or total >= 1 << 63:
            raise InputError("GG-DIMS", where, f"has the shape {tuple(reversed(dims))}")
    kind = cursor.number("I", "a tensor's type")
    if kind not in BLOCKS:
        found = f"has the type {UNREAD.get(kind, 'unknown')} ({kind})"
        raise InputError("GG-TYPE", where, found, listed(block.name for block in BLOCKS.values()))
    block = BLOCKS[kind]
    if dims[0] % block.values:
        found = f"has {dims[0]} values in a row"
        raise InputError("GG-BLOCK", where, found, f"a multiple of {block.name}'s {block.values}")
    offset = cursor.number("Q", "a tensor's offset")
    return tuple(reversed(dims)), block, total // block.values * block.nbytes, offset
