"""R29: a file that another program changes or shortens while it is read is an error, no SIGBUS.

The change comes right after one of the reads, which are counted.
"""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from qlora_jax.checkpoints.load import load_weights
from qlora_jax.checkpoints.peft import read_adapter
from qlora_jax.errors import InputError
from qlora_jax.models.config import ModelConfig
from qlora_jax.workflows.open import open_source
from tests.reliability import clean

RULE = "R29"


def shorten(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 3)


def lengthen(path: Path) -> None:
    os.truncate(path, path.stat().st_size + 4096)


def rewrite(path: Path) -> None:
    """In place, as a copying program does."""
    content = np.frombuffer(path.read_bytes(), np.uint8).copy()
    content[len(content) // 2 :] ^= 1
    with open(path, "r+b") as file:
        file.write(content.tobytes())
    os.utime(path, ns=(1, 1))


def empty(path: Path) -> None:
    os.truncate(path, 0)


ACTS = [shorten, lengthen, rewrite, empty]
FILES = {
    "safetensors": (clean.model, "model.safetensors", "ST-CHANGED"),
    "shards": (clean.sharded, "model-00001-of-00002.safetensors", "ST-CHANGED"),
    "4-bit": (clean.bitsandbytes, "model.safetensors", "ST-CHANGED"),
    "gguf": (clean.gguf_model, "model.gguf", "GG-CHANGED"),
    "bin": (clean.torch_model, "pytorch_model.bin", "PT-CHANGED"),
    "adapter": (clean.adapter, "adapter_model.safetensors", "ST-CHANGED"),
}


def load(kind: str, folder: Path) -> None:
    """Opens the file and reads everything."""
    if kind == "adapter":
        read_adapter(folder, clean.ADAPTED, clean.LAYERS)
        return
    with open_source(folder / "model.gguf" if kind == "gguf" else folder) as source:
        load_weights(source, ModelConfig.from_dict(source.config), dtype="float32")


class Reads:
    """Stands for os.pread and os.preadv; after read `at` it calls `act`.

    Attributes:
      calls: how many reads there were.
      first: the first one of a file of weights.
    """

    def __init__(self, monkeypatch, at: int, act: Callable[[], None]):
        self.calls, self.first, self.at, self.act = 0, 0, at, act
        for name in ("pread", "preadv"):
            monkeypatch.setattr(os, name, self.counted(getattr(os, name)))

    def counted(self, real: Callable) -> Callable:
        def call(file, *args):
            got = real(file, *args)
            self.calls += 1
            if not self.first and not os.readlink(f"/proc/self/fd/{file}").endswith(".json"):
                self.first = self.calls
            if self.calls == self.at:
                self.act()
            return got

        return call


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("kind", FILES)
def test_a_file_that_changes_while_it_is_read(tmp_path, monkeypatch, kind, act):
    write, name, code = FILES[kind]
    with monkeypatch.context() as patch:
        reads = Reads(patch, 0, lambda: None)
        load(kind, write(tmp_path / "whole"))
    first = reads.first
    # While the header is read, and while the tensors are.
    for at in (first, first + 1, reads.calls // 2, reads.calls - 1):
        folder = write(tmp_path / str(at))
        with monkeypatch.context() as patch:
            Reads(patch, at, lambda path=folder / name: act(path))
            with pytest.raises(InputError) as caught:
                load(kind, folder)
        assert caught.value.code == code or at < reads.calls - 1
        assert name in str(caught.value)
