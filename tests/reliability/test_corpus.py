"""R21: the hand-made files, one or more for every rule of every format, each with its own code.

The files stand beside the tests of the formats, which look at the messages too; here they are
gathered, opened by what reads them, and counted.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_jax.checkpoints.gguf import GGUF
from qlora_jax.checkpoints.shards import INDEX, SINGLE, Shards
from qlora_jax.checkpoints.strict_json import parse_json
from qlora_jax.checkpoints.torch_file import TorchFile
from qlora_jax.checkpoints.torch_pickle import read_state
from qlora_jax.data.tokenizer import load_tokenizer
from qlora_jax.errors import InputError
from tests.checkpoints import (
    test_gguf_bad_files,
    test_shards,
    test_strict_json,
    test_torch_pickle,
    test_torch_zip,
)
from tests.checkpoints.safetensors_files import model_files
from tests.data import test_gguf_tokenizer, test_tokenizer

RULE = "R21"
Open = Callable[[Path, Any], Any]  # a new folder, and a row's content


def shards(folder: Path, files: dict[str, bytes]) -> None:
    Shards(model_files(folder, files))


def gguf(folder: Path, build: Callable) -> None:
    built = build()
    path = folder.with_suffix(".gguf")
    path.write_bytes(built if isinstance(built, bytes) else built.tobytes())
    GGUF(path)


def torch(folder: Path, content: bytes) -> None:
    folder.write_bytes(content)
    TorchFile(folder, "x.bin")


def tokenizer(folder: Path, content: Any) -> None:
    content = json.dumps(content) if isinstance(content, dict) else content
    folder.mkdir()
    (folder / "tokenizer.json").write_bytes(
        content.encode() if isinstance(content, str) else content
    )
    load_tokenizer(folder)


# Format: how a row is opened, and rows of (code, content).
CORPUS: dict[str, tuple[Open, list[tuple[str, Any]]]] = {
    "safetensors": (
        shards,
        [(code, {SINGLE: content}) for content, code, _ in test_shards.BAD_FILES.values()],
    ),
    "index": (
        shards,
        [
            (code, {INDEX: content, **files})
            for content, files, code, _ in test_shards.BAD_INDICES.values()
        ],
    ),
    "GGUF": (gguf, [(code, build) for _, code, build in test_gguf_bad_files.BAD]),
    "zip": (torch, [(code, content) for content, code, _ in test_torch_zip.BAD.values()]),
    "pickle": (
        lambda _, content: read_state(content, test_torch_pickle.SIZES, "x.bin"),
        [(code, content) for content, code, _ in test_torch_pickle.BAD.values()],
    ),
    "JSON": (
        lambda _, content: parse_json(content, "x.json"),
        [(code, content) for content, (code, _) in test_strict_json.BAD.items()],
    ),
    "tokenizer.json": (tokenizer, [(code, file) for _, code, file in test_tokenizer.BAD_JSON]),
    "tokenizer of a GGUF": (
        lambda _, keys: load_tokenizer("x.gguf", test_gguf_tokenizer.tiny(**keys)),
        [(code, keys) for _, code, keys in test_gguf_tokenizer.BAD_METADATA],
    ),
}


@pytest.mark.parametrize("kind", CORPUS)
def test_the_corpus(kind, tmp_path, record_property):
    open_, rows = CORPUS[kind]
    wrong = []
    for number, (code, content) in enumerate(rows):
        with pytest.raises(InputError) as caught:
            open_(tmp_path / str(number), content)
        if caught.value.code != code:
            wrong.append((number, code, str(caught.value)))
    record_property("cases", len(rows))
    record_property("passed", len(rows) - len(wrong))
    assert wrong == []


def test_there_are_enough():
    codes = {code for _, rows in CORPUS.values() for code, _ in rows}
    assert sum(len(rows) for _, rows in CORPUS.values()) >= 90
    assert len(codes) >= 90
