"""A Hugging Face folder of safetensors or PyTorch's .bin files: each tensor read when asked for.

Nothing is believed before it is checked, nothing outside the folder is opened.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from qlora_jax.checkpoints.aligned import aligned_empty
from qlora_jax.checkpoints.files import AGAIN, SAVE_AGAIN, WeightFile, bytes_of, inside
from qlora_jax.checkpoints.safetensors_header import Entry, read_header
from qlora_jax.checkpoints.strict_json import CONFIG_LIMIT, read_json
from qlora_jax.checkpoints.torch_file import TorchFile
from qlora_jax.errors import InputError, listed

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
TORCH_SINGLE, TORCH_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
TORCH_SHARD = re.compile(r"pytorch_model-\d+-of-\d+\.bin")
INDEX_LIMIT = 64 << 20
SHARD_NAME = r"(?!\.)[A-Za-z0-9._-]{1,243}\."  # and what the kind of file ends with


class Shards:
    """The weights of a folder with config.json and model.safetensors, or an index and its shards.

    Without those, pytorch_model.bin, or its index and shards. All headers are checked when it is
    opened. As in transformers, one file wins over an index beside it. Use as a context manager, or
    call `close`.

    Attributes:
      path: the folder.
      config: what config.json says.

    Raises:
      InputError: ST-... for a file, PT-... and PK-... for a .bin, IX-... for the index,
        CFG-MISSING, FILE-..., JSON-...
    """

    def __init__(self, folder: str | Path):
        self.path = Path(folder)
        self.files: list[WeightFile] = []
        self.places: dict[str, WeightFile] = {}
        try:
            self.config = read_config(self.path)
            there = [name for name in KINDS if os.path.lexists(self.path / name)]
            if not there:
                raise no_weights(self.path)
            name, kind = there[0], KINDS[there[0]]
            if name.endswith(".json"):
                self.open_index(name, kind)
            else:
                self.open(name, kind)
        except BaseException:
            self.close()
            raise

    def open(self, name: str, kind: type[WeightFile]) -> WeightFile:
        file = kind(inside(self.path, name), str(self.path / name))
        self.files.append(file)
        self.places.update(dict.fromkeys(file.entries, file))
        return file

    def open_index(self, name: str, kind: type[WeightFile]) -> None:
        """Opens every shard; the tensors in them must be exactly those that the index promises."""
        where = str(self.path / name)
        weight_map = read_index(inside(self.path, name), where, kind.ending)
        shards = sorted(set(weight_map.values()))
        real = {shard: inside(self.path, shard) for shard in shards}
        if missing := [shard for shard in shards if not real[shard].exists()]:
            found = f"missing shards: {listed(missing)}"
            raise InputError("IX-SHARDS", where, found, f"{len(shards)} shards", AGAIN)
        for shard in shards:
            file = self.open(shard, kind)
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
          InputError: ST-CHANGED, PT-CHANGED when the file changed since it was opened; PT-CRC.
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
        return file.pieces(file.entries[name], memory)

    def close(self) -> None:
        while self.files:
            self.files.pop().close()

    def __enter__(self) -> "Shards":
        return self

    def __exit__(self, *error) -> None:
        self.close()


class SafetensorsFile(WeightFile):
    """One open safetensors file."""

    area, ending = "ST", "safetensors"

    def read_entries(self) -> dict[str, Entry]:
        return read_header(self.file, self.where)

    def read_bytes(self, entry: Entry, out: np.ndarray) -> None:
        view = bytes_of(out)
        assert len(view) == entry.nbytes, (len(view), entry)
        self.fill(view, entry.offset)

    def pieces(self, entry: Entry, memory: np.ndarray) -> Iterator[np.ndarray]:
        for start in range(0, entry.nbytes, len(memory)):
            piece = memory[: entry.nbytes - start]
            self.fill(bytes_of(piece), entry.offset + start)
            yield piece


KINDS = {  # the first one that is there is read
    SINGLE: SafetensorsFile,
    INDEX: SafetensorsFile,
    TORCH_SINGLE: TorchFile,
    TORCH_INDEX: TorchFile,
}


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


def read_index(path: Path, where: str, ending: str) -> dict[str, str]:
    """`weight_map` of an index: the shard of every tensor, each a plain file name.

    Args:
      path: the index.
      where: what errors call it.
      ending: of every shard's name, "safetensors" or "bin".

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
    plain = re.compile(SHARD_NAME + ending, re.ASCII)
    for name, shard in weight_map.items():
        if type(shard) is not str or not plain.fullmatch(shard):
            found = (
                f"{name}: the shard name {str(shard)[:80]!r} is not a file name inside the folder"
            )
            raise InputError("IX-NAME", where, found, f"NAME.{ending}", AGAIN)
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
    if bins := [name for name in names if TORCH_SHARD.fullmatch(name)]:
        found = f"missing index: {listed(bins)} without {TORCH_INDEX}"
        return InputError("IX-MISSING", where, found, expected, AGAIN)
    if pickles := [name for name in names if name.endswith((".bin", ".pt", ".pth"))]:
        found = f"missing weights: only {listed(pickles)}, which is not what transformers writes"
        return InputError("ST-MISSING", where, found, f"{expected}, or {TORCH_SINGLE}", SAVE_AGAIN)
    if loose := [name for name in names if name.endswith(".safetensors")]:
        found = f"missing index: {listed(loose)} without {INDEX}"
        return InputError("IX-MISSING", where, found, expected, AGAIN)
    return InputError("ST-MISSING", where, "missing weights", expected, AGAIN)
