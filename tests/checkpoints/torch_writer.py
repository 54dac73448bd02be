"""PyTorch files written by hand from the two formats, good ones and spoiled ones.

The pickle is put together from instructions, the zip archive from its records, so that each field
can be wrong by itself.
"""

import struct
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np

KINDS = {  # PyTorch's name of the storage of each dtype
    "float16": "Half",
    "bfloat16": "BFloat16",
    "float32": "Float",
    "float64": "Double",
    "uint8": "Byte",
    "int8": "Char",
    "int16": "Short",
    "int32": "Int",
    "int64": "Long",
    "bool": "Bool",
}
START, STOP, MARK, REDUCE = b"\x80\x02", b".", b"(", b"R"
EMPTY_DICT, EMPTY_TUPLE = b"}", b")"


# Pickles


def text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def number(value: int) -> bytes:
    """The shortest instruction that pushes `value`, as in pickle's protocol 2."""
    if 0 <= value < 256:
        return b"K" + struct.pack("<B", value)
    if 0 <= value < 1 << 16:
        return b"M" + struct.pack("<H", value)
    if -(1 << 31) <= value < 1 << 31:
        return b"J" + struct.pack("<i", value)
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + struct.pack("<B", len(raw)) + raw


def numbers(values: Any) -> bytes:
    return tuple_of(*map(number, values))


def tuple_of(*items: bytes) -> bytes:
    return MARK + b"".join(items) + b"t"


def name(module: str, attribute: str) -> bytes:
    """The instruction GLOBAL."""
    return f"c{module}\n{attribute}\n".encode()


ORDERED_DICT = name("collections", "OrderedDict") + EMPTY_TUPLE + REDUCE
REBUILD = name("torch._utils", "_rebuild_tensor_v2")


def storage(kind: str, key: str, count: int, place: str = "cpu") -> bytes:
    """A reference to the member data/KEY."""
    of_type = name("torch", f"{kind}Storage")
    fields = (text("storage"), of_type, text(key), text(place), number(count))
    return tuple_of(*fields) + b"Q"


def tensor(held: bytes, start: int, shape: Any, stride: Any, hooks: bytes = ORDERED_DICT) -> bytes:
    """A tensor of the storage that `held` pushes."""
    fields = (held, number(start), numbers(shape), numbers(stride), b"\x89", hooks)
    return REBUILD + tuple_of(*fields) + REDUCE


def dict_of(items: dict[str, bytes], empty: bytes = ORDERED_DICT) -> bytes:
    return empty + MARK + b"".join(text(key) + value for key, value in items.items()) + b"u"


def pickle_of(items: dict[str, bytes]) -> bytes:
    """data.pkl of a state dict whose values are pushed by these instructions."""
    return START + dict_of(items) + STOP


# Zip archives


@dataclass
class Member:
    """A member, and what its records say that is not true; None for the truth."""

    name: str | bytes
    data: bytes = b""
    flags: int = 0
    method: int = 0
    crc: int | None = None
    size: int | None = None
    start: int | None = None
    local_name: str | bytes | None = None
    local_size: int | None = None
    extra: bytes = b""  # of the directory's entry

    def local(self) -> bytes:
        """Its header and its bytes."""
        name = raw(self.name if self.local_name is None else self.local_name)
        size = self.true_size() if self.local_size is None else self.local_size
        crc = 0 if self.flags & 8 else self.true_crc()
        head = struct.pack(
            "<4sHHHHHIIIHH",
            *(b"PK\x03\x04", 20, self.flags, self.method, 0, 0),
            *(crc, size, size, len(name), 0),
        )
        return head + name + self.data

    def central(self, start: int) -> bytes:
        """Its entry in the directory."""
        name = raw(self.name)
        head = struct.pack(
            "<4sHHHHHHIIIHHHHHII",
            *(b"PK\x01\x02", 20, 20, self.flags, self.method, 0, 0, self.true_crc()),
            *(self.true_size(), self.true_size(), len(name), len(self.extra), 0, 0, 0, 0),
            start if self.start is None else self.start,
        )
        return head + name + self.extra

    def true_crc(self) -> int:
        return zlib.crc32(self.data) if self.crc is None else self.crc

    def true_size(self) -> int:
        return len(self.data) if self.size is None else self.size


def zip_of(members: list[Member], comment: bytes = b"", **end: int) -> bytes:
    """An archive; `count`, `length` and `start` of its directory may be wrong."""
    body, directory = b"", b""
    for member in members:
        directory += member.central(len(body))
        body += member.local()
    count = end.get("count", len(members))
    length, start = end.get("length", len(directory)), end.get("start", len(body))
    record = struct.pack(
        "<4sHHHHIIH", b"PK\x05\x06", 0, 0, count, count, length, start, len(comment)
    )
    return body + directory + record + comment


def members_of(pickle: bytes, storages: dict[str, bytes], folder: str = "m") -> list[Member]:
    """The members of a PyTorch file."""
    return [
        Member(f"{folder}/data.pkl", pickle),
        Member(f"{folder}/byteorder", b"little"),
        *(Member(f"{folder}/data/{key}", data) for key, data in storages.items()),
        Member(f"{folder}/version", b"3\n"),
    ]


def torch_bytes(arrays: dict[str, np.ndarray]) -> bytes:
    """A good file: every array has a storage of its own, and strides as it has in memory."""
    items, storages = {}, {}
    for i, (key, array) in enumerate(arrays.items()):
        order = "F" if array.flags.f_contiguous and not array.flags.c_contiguous else "C"
        strides = [step // array.itemsize for step in np.asarray(array, order=order).strides]
        held = storage(KINDS[array.dtype.name], str(i), array.size)
        items[key] = tensor(held, 0, array.shape, strides)
        storages[str(i)] = array.tobytes(order)
    return zip_of(members_of(pickle_of(items), storages))


def raw(value: str | bytes) -> bytes:
    return value if isinstance(value, bytes) else value.encode()
