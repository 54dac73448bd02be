"""Writes a folder's weights as safetensors, one tensor at a time, in any order, in bounded memory.

Names, dtypes and shapes are known before the first tensor, so that every tensor has its place. Only
of small ones may the length be open: they come last in a file, behind a header that has room for
the longest. A file without such tensors has the bytes that the safetensors package writes.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from qlora_jax.checkpoints.aligned import aligned_empty
from qlora_jax.checkpoints.atomic import new_folder, refuse_too_large
from qlora_jax.checkpoints.files import bytes_of, opened
from qlora_jax.checkpoints.safetensors_header import DTYPES, Spec, nbytes
from qlora_jax.checkpoints.shards import INDEX, SINGLE, Shards
from qlora_jax.errors import StorageError

SHARD_BYTES = 5_000_000_000
PIECE, READERS = 4 << 20, 2  # bytes that each thread reads again at a time
CODES = {dtype: code for code, dtype in DTYPES.items()}
ORDER = {dtype: place for place, dtype in enumerate(DTYPES.values())}

Content = bytes | Path | Callable[[], bytes]  # of a file: itself, one to copy, made at the end


class ShardWriter:
    """Writes model.safetensors, or shards and their index when there is more than `shard_bytes`.

    Args:
      folder: exists; see `atomic.new_folder`.
      specs: dtype and shape of every tensor; the order decides what shares a shard.
      shard_bytes: bytes of tensors in a file; one larger tensor gets a file of its own.
      open_ended: names of vectors that may become shorter than their spec; they are kept in memory
        until `finish`.

    Raises:
      StorageError: OUT-FULL when the disk has no room for all of it.
    """

    def __init__(
        self,
        folder: Path,
        specs: Mapping[str, Spec],
        shard_bytes: int = SHARD_BYTES,
        open_ended: Collection[str] = (),
    ):
        self.folder, self.specs = folder, dict(specs)
        self.open_ended = dict.fromkeys(open_ended)  # name: array
        self.thread = ThreadPoolExecutor(1)  # writes a tensor while the next one is made
        self.writing: Future | None = None
        self.digests: dict[str, bytes] = {}
        self.places: dict[str, tuple[int, int]] = {}  # descriptor, offset
        self.files: dict[int, tuple[list[str], int]] = {}  # names and begin of each file's tensors
        groups = group(self.specs, shard_bytes)
        refuse_too_large(folder, sum(map(nbytes, self.specs.values())))
        self.shards = {SINGLE: groups[0]}
        if len(groups) > 1:
            of = f"of-{len(groups):05}.safetensors"
            self.shards = {f"model-{n:05}-{of}": names for n, names in enumerate(groups, 1)}
        try:
            for shard, names in self.shards.items():
                self.begin(folder / shard, names)
        except BaseException:
            self.close()
            raise

    def begin(self, path: Path, names: list[str]) -> None:
        """Creates a file, and gives each of its tensors a place behind the room for the header."""
        header, offsets, size = self.header(names)
        start = 8 + len(header)
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        self.files[file] = (names, start)
        os.ftruncate(file, start + size)
        self.places |= {name: (file, start + offset) for name, offset in offsets.items()}

    def header(self, names: list[str]) -> tuple[bytes, dict[str, int], int]:
        """The header of a file, the offset of each of its tensors, and their bytes in all."""

        def place(name: str) -> tuple[bool, int, str]:
            return name in self.open_ended, ORDER[self.specs[name][0]], name

        fields: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset, offsets = 0, {}
        for name in sorted(names, key=place):
            dtype, shape = self.specs[name]
            offsets[name], end = offset, offset + nbytes((dtype, shape))
            span = {"data_offsets": [offset, end]}
            fields[name], offset = {"dtype": CODES[dtype], "shape": list(shape), **span}, end
        text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
        return text + b" " * (-len(text) % 8), offsets, offset

    def write(self, name: str, array: np.ndarray) -> None:
        """Writes one tensor, whose dtype and shape are as announced, to its place.

        It is written while the caller goes on, and must not be changed any more.
        """
        array = np.asarray(array, order="C")
        dtype, shape = self.specs[name]
        assert name not in self.digests, f"{name} is written twice"
        if name in self.open_ended:
            assert array.dtype == dtype, (name, array.dtype)
            assert array.ndim == 1, (name, array.shape)
            assert array.size <= shape[0], (name, array.shape)
            self.open_ended[name], self.specs[name] = array, (dtype, array.shape)
        else:
            assert (array.dtype, array.shape) == (dtype, shape), (name, array.dtype, array.shape)
        self.wait()
        self.digests[name] = b""
        self.writing = self.thread.submit(self.put, name, array)

    def put(self, name: str, array: np.ndarray) -> None:
        """What the thread does with one tensor."""
        if name not in self.open_ended:
            file, offset = self.places[name]
            write_all(file, bytes_of(array), offset)
        self.digests[name] = hashlib.sha256(bytes_of(array)).digest()

    def wait(self) -> None:
        """Until the last tensor is written; raises what went wrong."""
        if self.writing is not None:
            done, self.writing = self.writing, None
            done.result()

    def finish(self) -> None:
        """Writes what was kept, the headers and the index, when every tensor was given."""
        self.wait()
        missing = self.specs.keys() - self.digests.keys()
        assert not missing, f"never written: {sorted(missing)[:5]}"
        for file, (names, start) in self.files.items():
            header, offsets, size = self.header(names)
            for name in names:
                if name in self.open_ended:
                    write_all(file, bytes_of(self.open_ended[name]), start + offsets[name])
            os.ftruncate(file, start + size)
            header = header.ljust(start - 8)
            write_all(file, (start - 8).to_bytes(8, "little") + header, 0)
        if len(self.shards) > 1:
            weight_map = {name: shard for shard, names in self.shards.items() for name in names}
            total = sum(map(nbytes, self.specs.values()))
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            text = json.dumps(index, indent=2, sort_keys=True)
            (self.folder / INDEX).write_text(text + "\n")

    def verify(self) -> None:
        """Reads the whole folder again, piece by piece, and compares what came back.

        Raises:
          StorageError: OUT-VERIFY names the first tensor that differs.
        """
        with Shards(self.folder) as written, ThreadPoolExecutor(READERS) as threads:

            def digest(name: str) -> bytes:
                memory, read = aligned_empty((PIECE,), np.uint8), hashlib.sha256()
                for piece in written.pieces(name, memory):
                    read.update(piece)
                return read.digest()

            for name, found in zip(self.digests, threads.map(digest, self.digests), strict=True):
                if found != self.digests[name]:
                    text = "differs on the disk from what was written"
                    raise StorageError("OUT-VERIFY", f"{self.folder}: {name}", text)

    def close(self) -> None:
        self.thread.shutdown()
        while self.files:
            os.close(self.files.popitem()[0])

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *error) -> None:
        self.close()


@contextlib.contextmanager
def model_folder(
    out: str | Path,
    config: Mapping[str, Any],
    specs: Mapping[str, Spec],
    extra_files: Mapping[str, Content],
    shard_bytes: int = SHARD_BYTES,
    open_ended: Collection[str] = (),
    finish: Callable[[Path], None] | None = None,
) -> Iterator[ShardWriter]:
    """Yields the writer of a new model folder, which is verified and appears when the block ends.

    Args:
      out: a path where nothing is yet.
      config: becomes config.json.
      extra_files: file name -> bytes, the path of a file to copy, or what makes the bytes when all
        weights are written.
      finish: called with the folder when all of that is there: what it adds appears with the rest.
      others: as for `ShardWriter`.
    """
    with new_folder(out) as folder:
        text = json.dumps(config, indent=2, sort_keys=True, allow_nan=False) + "\n"
        (folder / "config.json").write_text(text)
        with ShardWriter(folder, specs, shard_bytes, open_ended) as writer:
            yield writer
            writer.finish()
        writer.verify()
        for name, content in extra_files.items():
            assert Path(name).name == name, f"{name} is not a plain file name"
            assert name not in (SINGLE, INDEX), f"{name} is written by us"
            if isinstance(content, Path):
                with opened(content):  # an error of the source is none of what is written
                    shutil.copyfile(content, folder / name)
            else:
                (folder / name).write_bytes(content() if callable(content) else content)
        if finish is not None:
            finish(folder)


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
