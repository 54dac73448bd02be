"""Writes a folder's weights as safetensors, one tensor at a time, in any order, in bounded memory.

Names, dtypes and shapes are known before the first tensor, so that the headers come first and every
tensor has its place. The bytes of a file are those that the safetensors package writes.
"""

import contextlib
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qlora_jax.checkpoints.atomic import new_folder, refuse_too_large
from qlora_jax.checkpoints.safetensors_header import DTYPES, Spec
from qlora_jax.checkpoints.shards import INDEX, SINGLE, Shards
from qlora_jax.errors import StorageError

SHARD_BYTES = 5_000_000_000
CODES = {dtype: code for code, dtype in DTYPES.items()}
ORDER = {dtype: place for place, dtype in enumerate(DTYPES.values())}


class ShardWriter:
    """Writes model.safetensors, or shards and their index when there is more than `shard_bytes`.

    Args:
      folder: exists; see `atomic.new_folder`.
      specs: dtype and shape of every tensor; the order decides what shares a shard.
      shard_bytes: bytes of tensors in a file; one larger tensor gets a file of its own.

    Raises:
      StorageError: OUT-FULL when the disk has no room for all of it.
    """

    def __init__(self, folder: Path, specs: Mapping[str, Spec], shard_bytes: int = SHARD_BYTES):
        self.folder, self.specs = folder, dict(specs)
        self.digests: dict[str, bytes] = {}
        self.places: dict[str, tuple[int, int]] = {}  # descriptor, offset
        self.files: list[int] = []
        groups = group(self.specs, shard_bytes)
        total = sum(nbytes(spec) for spec in self.specs.values())
        refuse_too_large(folder, total)
        try:
            if len(groups) == 1:
                self.begin(folder / SINGLE, groups[0])
                return
            weight_map = {}
            for number, names in enumerate(groups, 1):
                shard = f"model-{number:05}-of-{len(groups):05}.safetensors"
                self.begin(folder / shard, names)
                weight_map |= dict.fromkeys(names, shard)
            weight_map = dict(sorted(weight_map.items()))
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        except BaseException:
            self.close()
            raise

    def begin(self, path: Path, names: list[str]) -> None:
        """Creates a file with its header, and gives each of its tensors a place."""
        header, offset, offsets = {"__metadata__": {"format": "pt"}}, 0, {}
        for name in sorted(names, key=lambda name: (ORDER[self.specs[name][0]], name)):
            dtype, shape = self.specs[name]
            offsets[name], end = offset, offset + nbytes((dtype, shape))
            fields = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
            header[name], offset = fields, end
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        self.files.append(file)
        write_all(file, len(text).to_bytes(8, "little") + text, 0)
        os.ftruncate(file, 8 + len(text) + offset)
        self.places |= {name: (file, 8 + len(text) + offsets[name]) for name in names}

    def write(self, name: str, array: np.ndarray) -> None:
        """Writes one tensor, whose dtype and shape are as announced, to its place."""
        array = np.asarray(array, order="C")
        assert (array.dtype, array.shape) == self.specs[name], (name, array.dtype, array.shape)
        assert name not in self.digests, f"{name} is written twice"
        data = memoryview(array.reshape(-1).view(np.uint8))
        file, offset = self.places[name]
        write_all(file, data, offset)
        self.digests[name] = hashlib.sha256(data).digest()

    def verify(self) -> None:
        """Reads the whole folder again, tensor by tensor, and compares what came back.

        Raises:
          StorageError: OUT-VERIFY names the first tensor that differs.
        """
        missing = self.specs.keys() - self.digests.keys()
        assert not missing, f"never written: {sorted(missing)[:5]}"
        with Shards(self.folder) as written:
            for name, digest in self.digests.items():
                read = written.read(name)
                if hashlib.sha256(read.reshape(-1).view(np.uint8)).digest() != digest:
                    found = "differs on the disk from what was written"
                    raise StorageError("OUT-VERIFY", f"{self.folder}: {name}", found)

    def close(self) -> None:
        while self.files:
            os.close(self.files.pop())

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *error) -> None:
        self.close()


@contextlib.contextmanager
def model_folder(
    out: str | Path,
    config: Mapping[str, Any],
    specs: Mapping[str, Spec],
    extra_files: Mapping[str, bytes | Path],
    shard_bytes: int = SHARD_BYTES,
) -> Iterator[ShardWriter]:
    """Yields the writer of a new model folder, which is verified and appears when the block ends.

    Args:
      out: a path where nothing is yet.
      config: becomes config.json.
      extra_files: file name -> bytes, or the path of a file to copy.
    """
    with new_folder(out) as folder:
        text = json.dumps(config, indent=2, sort_keys=True, allow_nan=False) + "\n"
        for name, content in {"config.json": text.encode(), **extra_files}.items():
            assert Path(name).name == name, f"{name} is not a plain file name"
            assert name not in (SINGLE, INDEX), f"{name} is written by us"
            if isinstance(content, bytes):
                (folder / name).write_bytes(content)
            else:
                shutil.copyfile(content, folder / name)
        with ShardWriter(folder, specs, shard_bytes) as writer:
            yield writer
        writer.verify()


def nbytes(spec: Spec) -> int:
    """Bytes of a tensor."""
    return math.prod(spec[1]) * spec[0].itemsize


def group(specs: Mapping[str, Spec], shard_bytes: int) -> list[list[str]]:
    """The names in their order, cut so that no group has more bytes unless it is one tensor."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, spec in specs.items():
        if groups[-1] and filled + nbytes(spec) > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += nbytes(spec)
    return groups


def write_all(file: int, data: bytes | memoryview, offset: int) -> None:
    """All of `data` at `offset`; one system call writes at most 2 GB."""
    data, done = memoryview(data), 0
    while done < len(data):
        done += os.pwrite(file, data[done : done + (1 << 30)], offset + done)
