"""A Hugging Face folder of safetensors, one file or shards: each tensor read when asked for.

Files are read with `pread` and never mapped: a mapped file that another program shortens kills the
process. Nothing is believed before it is checked, nothing outside the folder is opened.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from qlora_jax.checkpoints.aligned import aligned_empty
from qlora_jax.checkpoints.files import inside, open_regular
from qlora_jax.checkpoints.safetensors_header import Entry, read_header
from qlora_jax.checkpoints.strict_json import CONFIG_LIMIT, read_json
from qlora_jax.errors import InputError, listed

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
INDEX_LIMIT = 64 << 20
SHARD_NAME = re.compile(r"(?!\.)[A-Za-z0-9._-]{1,243}\.safetensors", re.ASCII)
AGAIN = "download it again"


class Shards:
    """The weights of a folder with config.json and model.safetensors, or an index and its shards.

    All headers are checked when it is opened. As in transformers, model.safetensors wins when there
    is an index beside it. Use as a context manager, or call `close`.

    Attributes:
      path: the folder.
      config: what config.json says.

    Raises:
      InputError: ST-... for a file, IX-... for the index, CFG-MISSING, FILE-..., JSON-...
    """

    def __init__(self, folder: str | Path):
        self.path = Path(folder)
        self.files: list[SafetensorsFile] = []
        self.places: dict[str, SafetensorsFile] = {}
        try:
            self.config = read_config(self.path)
            if os.path.lexists(self.path / SINGLE):
                self.open(SINGLE)
            elif os.path.lexists(self.path / INDEX):
                self.open_index()
            else:
                raise no_weights(self.path)
        except BaseException:
            self.close()
            raise

    def open(self, name: str) -> "SafetensorsFile":
        file = SafetensorsFile(inside(self.path, name), str(self.path / name))
        self.files.append(file)
        self.places.update(dict.fromkeys(file.entries, file))
        return file

    def open_index(self) -> None:
        """Opens every shard; the tensors in them must be exactly those that the index promises."""
        where = str(self.path / INDEX)
        weight_map = read_index(inside(self.path, INDEX), where)
        shards = sorted(set(weight_map.values()))
        real = {shard: inside(self.path, shard) for shard in shards}
        if missing := [shard for shard in shards if not real[shard].exists()]:
            found = f"missing shards: {listed(missing)}"
            raise InputError("IX-SHARDS", where, found, f"{len(shards)} shards", AGAIN)
        for shard in shards:
            file = self.open(shard)
            promised = {name for name, place in weight_map.items() if place == shard}
            if lost := promised - file.entries.keys():
                found = f"lacks {listed(sorted(lost))}"
                raise InputError("IX-TENSORS", file.where, found, "what the index promises", AGAIN)
            if extra := file.entries.keys() - promised:
                found = f"holds {listed(sorted(extra))}, which the index does not place there"
                raise InputError("IX-TENSORS", file.where, found, hint=AGAIN)

    def names(self) -> list[str]:
        """All tensors: shard by shard, in the order of their bytes."""
        return list(self.places)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.places[name].entries[name].shape

    def dtype(self, name: str) -> str:
        """NumPy's name for the stored dtype, such as "bfloat16"."""
        return self.places[name].entries[name].dtype.name

    def read(self, name: str) -> np.ndarray:
        """A fresh array of the stored shape and dtype (ml_dtypes.bfloat16 for bfloat16).

        Raises:
          InputError: ST-CHANGED when the file changed since it was opened.
        """
        entry = self.places[name].entries[name]
        array = aligned_empty(entry.shape, entry.dtype)
        self.read_into(name, array)
        return array

    def read_into(self, name: str, out: np.ndarray) -> None:
        """Reads a tensor's bytes into `out`: C-contiguous and of exactly as many bytes."""
        file = self.places[name]
        file.read_bytes(file.entries[name], out)

    def pieces(self, name: str, memory: np.ndarray) -> Iterator[np.ndarray]:
        """A tensor's bytes, as many at a time as fit into `memory` (uint8), the next over them."""
        file = self.places[name]
        entry = file.entries[name]
        for start in range(0, entry.nbytes, len(memory)):
            piece = memory[: entry.nbytes - start]
            place = entry._replace(offset=entry.offset + start, nbytes=len(piece))
            file.read_bytes(place, piece)
            yield piece

    def close(self) -> None:
        while self.files:
            self.files.pop().close()

    def __enter__(self) -> "Shards":
        return self

    def __exit__(self, *error) -> None:
        self.close()


class SafetensorsFile:
    """One open file: its checked entries, and their bytes.

    Args:
      path: what is opened.
      where: what errors call it.
    """

    def __init__(self, path: Path, where: str):
        self.where = where
        self.file = open_regular(path, missing="ST-MISSING")
        try:
            self.stamp = self.size_and_time()
            self.entries = read_header(self.file, where)
        except BaseException:
            self.close()
            raise

    def read_bytes(self, entry: Entry, out: np.ndarray) -> None:
        """Fills `out`, whose nbytes are the entry's."""
        view = memoryview(out.reshape(-1).view(np.uint8))
        assert len(view) == entry.nbytes, (len(view), entry)
        done = 0
        while done < len(view):
            got = os.preadv(self.file, [view[done : done + (1 << 30)]], entry.offset + done)
            if got == 0:
                break
            done += got
        if done < len(view) or self.size_and_time() != self.stamp:
            found = "changed while it was being read"
            raise InputError("ST-CHANGED", self.where, found, hint="wait until its writer is done")

    def size_and_time(self) -> tuple[int, int]:
        status = os.fstat(self.file)
        return status.st_size, status.st_mtime_ns

    def close(self) -> None:
        os.close(self.file)


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model's folder, or what is wrong with the folder."""
    if not folder.is_dir():
        kind = "is a file" if folder.exists() else "no such folder"
        hint = "the path of a folder that holds config.json and model.safetensors"
        raise InputError("ST-FOLDER", str(folder), kind, "a model's folder", hint)
    path = inside(folder, "config.json")
    if not path.exists():
        found = "missing config.json"
        if (folder / "adapter_config.json").exists():
            found += ": this is an adapter, not a model"
        raise InputError("CFG-MISSING", str(folder), found, "a model's folder", AGAIN)
    return read_json(path, CONFIG_LIMIT)


def read_index(path: Path, where: str) -> dict[str, str]:
    """`weight_map` of an index: the shard of every tensor, each a plain file name.

    Raises:
      InputError: IX-MAP, IX-SIZE, IX-NAME, IX-CASE, or one of JSON-...
    """
    index = read_json(path, INDEX_LIMIT)
    weight_map = index.get("weight_map")
    if type(weight_map) is not dict or not weight_map:
        found = "weight_map is missing or empty"
        raise InputError("IX-MAP", where, found, "an object of tensor: shard")
    metadata = index.get("metadata", {})
    if type(metadata) is not dict or type(metadata.get("total_size", 0)) is not int:
        raise InputError("IX-SIZE", where, "metadata.total_size is not a whole number")
    for name, shard in weight_map.items():
        if type(shard) is not str or not SHARD_NAME.fullmatch(shard):
            found = (
                f"{name}: the shard name {str(shard)[:80]!r} is not a file name inside the folder"
            )
            raise InputError("IX-NAME", where, found, "NAME.safetensors", AGAIN)
    shards = set(weight_map.values())
    if len({shard.casefold() for shard in shards}) < len(shards):
        raise InputError("IX-CASE", where, "two shard names differ in case only")
    return weight_map


def no_weights(folder: Path) -> InputError:
    """The error for a folder without weights, by what is in it instead."""
    names = sorted(os.listdir(folder))
    where, expected = str(folder), f"{SINGLE} or {INDEX}"
    if ggufs := [name for name in names if name.endswith(".gguf")]:
        found = f"missing weights: no safetensors, but {listed(ggufs)}"
        return InputError("ST-MISSING", where, found, expected, f"name {folder / ggufs[0]} itself")
    if pickles := [name for name in names if name.endswith((".bin", ".pt", ".pth"))]:
        found = f"missing weights: only PyTorch pickles ({listed(pickles)}), which are not read"
        hint = "save_pretrained in transformers, which writes safetensors"
        return InputError("ST-MISSING", where, found, expected, hint)
    if loose := [name for name in names if name.endswith(".safetensors")]:
        found = f"missing index: {listed(loose)} without {INDEX}"
        return InputError("IX-MISSING", where, found, expected, AGAIN)
    return InputError("ST-MISSING", where, "missing weights", expected, AGAIN)
