"""The header of a safetensors file, checked against every rule of the format before it is believed.

    8 bytes: N, little endian | N bytes: JSON | the tensors, one behind the other, without a hole

Stricter than the safetensors package where that follows its own README less closely: doubled keys
and leading spaces are refused.
"""

import math
import os
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from qlora_jax.checkpoints.files import AGAIN, refuse_foreign
from qlora_jax.checkpoints.strict_json import parse_json
from qlora_jax.errors import InputError, listed

HEADER_LIMIT = 100_000_000  # bytes, the format's own limit
TENSORS_LIMIT = 200_000
NAME_LIMIT = 512  # bytes
RANK_LIMIT = 8

# In the order in which the package lays tensors out in a file: by decreasing alignment.
DTYPES = {
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
UNREAD = ("F4", "F6_E2M3", "F6_E3M2", "F8_E4M3", "F8_E5M2", "F8_E8M0", "C64")


Spec = tuple[np.dtype, tuple[int, ...]]  # dtype and shape


class Entry(NamedTuple):
    """One tensor of a file; `offset` counts bytes from the start of the file."""

    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def nbytes(spec: Spec) -> int:
    """Bytes of a tensor."""
    return math.prod(spec[1]) * spec[0].itemsize


def read_header(file: int, where: str) -> dict[str, Entry]:
    """The tensors of an open safetensors file by name, in the order of their bytes.

    Raises:
      InputError: ST-...; `where` names the file.
    """
    refuse_foreign(file, where, "ST")
    if os.pread(file, 4, 0) == b"PK\x03\x04":
        found = "is a zip archive, as PyTorch's .bin files are"
        raise InputError("ST-ZIP", where, found, "safetensors", "naming it pytorch_model.bin")
    size = os.fstat(file).st_size
    if size < 8:
        raise InputError("ST-SHORT", where, f"has {size} bytes", "at least 8", AGAIN)
    length = int.from_bytes(os.pread(file, 8, 0), "little")
    if length > HEADER_LIMIT:
        found = f"the header claims {length} bytes"
        raise InputError("ST-HEADER", where, found, f"at most {HEADER_LIMIT}", AGAIN)
    if 8 + length > size:
        found = f"is truncated: the header claims {length} bytes, the file has {size}"
        raise InputError("ST-TRUNCATED", where, found, hint=AGAIN)
    header = parse_header(os.pread(file, length, 8), where)
    return check_layout(header, 8 + length, size, where)


def parse_header(text: bytes, where: str) -> dict[str, Any]:
    """The JSON of a header, without its metadata."""
    if text[:1] != b"{" or text.rstrip(b" ")[-1:] != b"}":
        raise InputError("ST-HEADER", where, "the header is no JSON object", "safetensors")
    if text.count(b'"data_offsets"') > TENSORS_LIMIT:
        raise InputError("ST-COUNT", where, "too many tensors", f"at most {TENSORS_LIMIT}")
    header = parse_json(text, f"{where}: header", depth=4)
    metadata = header.pop("__metadata__", {})
    if type(metadata) is not dict or any(type(value) is not str for value in metadata.values()):
        raise InputError("ST-METADATA", where, "__metadata__ is not text by text")
    return header


def check_layout(header: dict[str, Any], start: int, size: int, where: str) -> dict[str, Entry]:
    """The entries, after it is sure that they cover the file's bytes exactly once."""
    entries = {name: check_entry(name, fields, start, where) for name, fields in header.items()}
    ordered = sorted(entries.items(), key=lambda item: (item[1].offset, item[1].nbytes))
    end = start
    for name, entry in ordered:
        if entry.offset != end:
            kind = "a hole" if entry.offset > end else "an overlap"
            found = f"{kind} in the file: begins at byte {entry.offset}"
            raise InputError("ST-OFFSET", f"{where}: {name}", found, f"byte {end}")
        end += entry.nbytes
    if end > size:
        found = f"is truncated: {size} of {end} bytes"
        raise InputError("ST-TRUNCATED", where, found, hint=AGAIN)
    if end < size:
        found = f"{size - end} bytes behind the last tensor"
        raise InputError("ST-TRAILING", where, found, f"a file of {end} bytes", AGAIN)
    return dict(ordered)


def check_entry(name: str, fields: Any, start: int, where: str) -> Entry:
    """One tensor's fields, checked by themselves."""
    if not name or not name.isprintable() or len(name.encode()) > NAME_LIMIT:
        found = f"the tensor name {name[:80]!r}"
        raise InputError("ST-NAME", where, found, f"1 to {NAME_LIMIT} printable bytes")
    where = f"{where}: {name}"
    if type(fields) is not dict or fields.keys() != {"dtype", "shape", "data_offsets"}:
        keys = listed(sorted(fields)) if type(fields) is dict else "no object"
        raise InputError("ST-FIELDS", where, f"has {keys}", "dtype, shape and data_offsets")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if type(dtype) is not str or dtype not in DTYPES:
        kind = "an unsupported" if type(dtype) is str and dtype in UNREAD else "an unknown"
        raise InputError(
            "ST-DTYPE", where, f"{kind} dtype {dtype!r}", f"one of {', '.join(DTYPES)}"
        )
    if not whole_numbers(shape) or len(shape) > RANK_LIMIT:
        raise InputError("ST-DIMS", where, f"the shape {shape!r}", f"up to {RANK_LIMIT} sizes >= 0")
    if not whole_numbers(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise InputError("ST-OFFSET", where, f"data_offsets {offsets!r}", "[begin, end]")
    if math.prod(filter(None, shape)) >= 2**59 or offsets[1] >= 2**63:
        raise InputError("ST-DIMS", where, "a size that no file has", "less than 2^63 bytes")
    size = nbytes((DTYPES[dtype], shape))
    if size != offsets[1] - offsets[0]:
        found = f"data_offsets {offsets} hold {offsets[1] - offsets[0]} bytes"
        raise InputError("ST-BYTES", where, found, f"{size} bytes for {dtype} of shape {shape}")
    return Entry(DTYPES[dtype], tuple(shape), start + offsets[0], size)


def whole_numbers(values: Any) -> bool:
    """Whether `values` is a list of ints >= 0; True and False are no ints."""
    return type(values) is list and all(type(v) is int and v >= 0 for v in values)
