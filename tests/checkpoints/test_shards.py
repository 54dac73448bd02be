"""Every rule for safetensors files, indices and file names has a bad file and its own error."""

import json
import os

import numpy as np
import pytest

from qlora_jax.checkpoints.shards import INDEX, SINGLE, Shards
from qlora_jax.errors import InputError
from tests.checkpoints.safetensors_files import (
    CONFIG,
    entry,
    index,
    model_files,
    one_tensor,
    safetensors_bytes,
)

EIGHT = bytes(8)
LFS = (
    b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 4900000000\n"
)


def tensors(**entries) -> bytes:
    return safetensors_bytes(entries, EIGHT)


BAD_FILES = {
    "empty": (b"", "ST-EMPTY", "is empty (0 bytes)"),
    "lfs": (LFS, "ST-LFS", f"is a Git-LFS pointer ({len(LFS)} bytes), not weights of 4.9 GB."),
    "html": (b"<!DOCTYPE html><html>", "ST-HTML", "HTML"),
    "zip": (b"PK\x03\x04" + bytes(99), "ST-ZIP", "zip archive"),
    "gguf": (b"GGUF\x03\0\0\0" + bytes(99), "ST-GGUF", "GGUF"),
    "short": (b"1234567", "ST-SHORT", "7 bytes"),
    "header over the limit": (
        (100_000_001).to_bytes(8, "little") + b"{}",
        "ST-HEADER",
        "100000001",
    ),
    "header cut": (one_tensor()[:20], "ST-TRUNCATED", "truncated"),
    "data cut": (one_tensor()[:-1], "ST-TRUNCATED", "truncated"),
    "data behind": (one_tensor() + b"x", "ST-TRAILING", "1 bytes behind"),
    "leading space": (safetensors_bytes(b" {}"), "ST-HEADER", "no JSON object"),
    "trailing newline": (safetensors_bytes(b"{}\n"), "ST-HEADER", "no JSON object"),
    "no object": (safetensors_bytes(b"[]"), "ST-HEADER", "no JSON object"),
    "empty header": (safetensors_bytes(b""), "ST-HEADER", "no JSON object"),
    "no JSON": (safetensors_bytes(b"{a}"), "JSON-SYNTAX", "header"),
    "no UTF-8": (safetensors_bytes(b'{"\xff":1}'), "JSON-SYNTAX", "UTF-8"),
    "NaN": (safetensors_bytes(b'{"a":NaN}'), "JSON-NUMBER", "NaN"),
    "doubled name": (
        safetensors_bytes(b'{"a":%s,"a":%s}' % ((json.dumps(entry()).encode(),) * 2), EIGHT),
        "JSON-KEYS",
        "'a' is doubled",
    ),
    "deep": (safetensors_bytes({"a": [[[[1]]]]}), "JSON-DEPTH", "too deep"),
    "very deep": (
        safetensors_bytes(b'{"a":' + b"[" * 10**5 + b"]" * 10**5 + b"}"),
        "JSON-DEPTH",
        "deep",
    ),
    "many": (
        safetensors_bytes(b"{" + b'"data_offsets"' * 200_001 + b"}"),
        "ST-COUNT",
        "too many tensors",
    ),
    "metadata": (safetensors_bytes({"__metadata__": {"a": 1}}), "ST-METADATA", "__metadata__"),
    "metadata list": (safetensors_bytes({"__metadata__": []}), "ST-METADATA", "__metadata__"),
    "empty name": (tensors(**{"": entry()}), "ST-NAME", "''"),
    "long name": (tensors(**{"n" * 513: entry()}), "ST-NAME", "1 to 512"),
    "control name": (tensors(**{"a\x1b[2J": entry()}), "ST-NAME", r"a\x1b"),
    "surrogate name": (tensors(**{"a\ud800": entry()}), "ST-NAME", "ud800"),
    "no fields": (tensors(a=1), "ST-FIELDS", "no object"),
    "field missing": (tensors(a={"dtype": "F32", "shape": [2]}), "ST-FIELDS", "dtype, shape"),
    "field more": (tensors(a={**entry(), "b": 1}), "ST-FIELDS", "has b, data_offsets"),
    "dtype unknown": (tensors(a=entry("F31")), "ST-DTYPE", "an unknown dtype 'F31'"),
    "dtype unread": (tensors(a=entry("F8_E4M3")), "ST-DTYPE", "an unsupported dtype 'F8_E4M3'"),
    "dtype no text": (tensors(a=entry([1])), "ST-DTYPE", "[1]"),
    "shape no list": (tensors(a=entry(shape=2)), "ST-DIMS", "the shape 2"),
    "shape bool": (tensors(a=entry(shape=[True, 2])), "ST-DIMS", "True"),
    "shape float": (tensors(a=entry(shape=[2.0])), "ST-DIMS", "2.0"),
    "shape negative": (tensors(a=entry(shape=[-2])), "ST-DIMS", "-2"),
    "rank": (tensors(a=entry(shape=[1] * 8 + [2])), "ST-DIMS", "up to 8 sizes"),
    "huge": (tensors(a=entry(shape=[2**40, 2**40])), "ST-DIMS", "2^63"),
    "huge and empty": (
        tensors(a=entry(shape=[0, 2**40, 2**40], offsets=(0, 0))),
        "ST-DIMS",
        "2^63",
    ),
    "offsets one": (tensors(a=entry(offsets=[0])), "ST-OFFSET", "[begin, end]"),
    "offsets backwards": (tensors(a=entry(offsets=(8, 0))), "ST-OFFSET", "[8, 0]"),
    "offsets negative": (tensors(a=entry(offsets=(-8, 0))), "ST-OFFSET", "[-8, 0]"),
    "bytes": (tensors(a=entry(offsets=(0, 4))), "ST-BYTES", "8 bytes for F32 of shape [2]"),
    "hole": (tensors(a=entry(shape=[1], offsets=(4, 8))), "ST-OFFSET", "a hole"),
    "overlap": (
        tensors(a=entry(), b=entry(shape=[1], offsets=(4, 8))),
        "ST-OFFSET",
        "an overlap",
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_refuses_the_file(tmp_path, case):
    content, code, words = BAD_FILES[case]
    folder = model_files(tmp_path / "model", {SINGLE: content})
    with pytest.raises(InputError) as error:
        Shards(folder)
    assert error.value.code == code, str(error.value)
    assert words in str(error.value)
    assert str(folder / SINGLE) in str(error.value)
    assert "\n" not in str(error.value)


A, B = "model-1.safetensors", "model-2.safetensors"
TWO = {"a": A, "b": B}
SHARDS = {A: one_tensor("a"), B: one_tensor("b")}
BAD_INDICES = {
    "no JSON": (b"{", {}, "JSON-SYNTAX", "index.json"),
    "no map": (b"{}", {}, "IX-MAP", "weight_map is missing"),
    "map list": (index([]), {}, "IX-MAP", "weight_map is missing"),
    "size": (index(TWO, metadata={"total_size": "8"}), {}, "IX-SIZE", "total_size"),
    "size bool": (index(TWO, metadata={"total_size": True}), {}, "IX-SIZE", "total_size"),
    "doubled": (
        b'{"weight_map": {"a": "x.safetensors", "a": "x.safetensors"}}',
        {},
        "JSON-KEYS",
        "a",
    ),
    "case": (
        index({"a": A, "b": A.upper().replace("SAFETENSORS", "safetensors")}),
        {},
        "IX-CASE",
        "case",
    ),
    "missing shards": (
        index({"a": "x.safetensors", "b": A, "c": "y.safetensors"}),
        {A: one_tensor("b")},
        "IX-SHARDS",
        "missing shards: x.safetensors, y.safetensors",
    ),
    "tensor missing": (index({**TWO, "c": B}), SHARDS, "IX-TENSORS", f"{B}: lacks c"),
    "tensor more": (
        index({"a": A}),
        {A: safetensors_bytes({"a": entry(), "z": entry(shape=[0], offsets=(8, 8))}, EIGHT)},
        "IX-TENSORS",
        "holds z",
    ),
    "tensors swapped": (index({"a": B, "b": A}), SHARDS, "IX-TENSORS", f"{A}: lacks b"),
    "shard bad": (index(TWO), {A: one_tensor("a"), B: LFS}, "ST-LFS", B),
}


@pytest.mark.parametrize("case", BAD_INDICES)
def test_refuses_the_index(tmp_path, case):
    content, shards, code, words = BAD_INDICES[case]
    folder = model_files(tmp_path / "model", {INDEX: content, **shards})
    with pytest.raises(InputError) as error:
        Shards(folder)
    assert error.value.code == code, str(error.value)
    assert words in str(error.value)


BAD_NAMES = [
    "../secret.safetensors", "/etc/x.safetensors", "a/b.safetensors", "a\\b.safetensors",
    "C:x.safetensors", "a\0.safetensors", "a" * 300 + ".safetensors", ".", "", "..", ".safetensors",
    ".hidden.safetensors", "model.bin", "x.safetensors\n", "x.safetensors ", "\u00e4.safetensors",
    3, None, ["x.safetensors"], {"a": 1}, True, "~.safetensors", "%2e%2e.safetensors",
    "a:b.safetensors",
]  # fmt: skip


@pytest.mark.parametrize("name", BAD_NAMES, ids=repr)
def test_refuses_the_shard_name_before_it_is_opened(tmp_path, name):
    (tmp_path / "secret.safetensors").write_bytes(one_tensor())
    folder = model_files(tmp_path / "model", {INDEX: index({"a": name})})
    with pytest.raises(InputError, match=r"IX-NAME.*not a file name inside the folder"):
        Shards(folder)


def link_out(path, tmp_path):
    (tmp_path / "secret").write_bytes(one_tensor())
    path.symlink_to(tmp_path / "secret")


ODD_FILES = {
    "link out": (link_out, "FILE-OUTSIDE", "leads outside the folder"),
    "link to a device": (lambda path, _: path.symlink_to("/dev/zero"), "FILE-OUTSIDE", "/dev/zero"),
    "link loop": (lambda path, _: path.symlink_to(path.name), "FILE-READ", "cannot be opened"),
    "pipe": (lambda path, _: os.mkfifo(path), "FILE-KIND", "a pipe or device"),
    "folder": (lambda path, _: path.mkdir(), "FILE-KIND", "is a folder"),
    "dangling link": (lambda path, _: path.symlink_to("gone"), "ST-MISSING", "no such file"),
}


@pytest.mark.parametrize("case", ODD_FILES)
def test_refuses_what_is_no_file_of_the_folder(tmp_path, case):
    make, code, words = ODD_FILES[case]
    folder = model_files(tmp_path / "model", {})
    make(folder / SINGLE, tmp_path)
    with pytest.raises(InputError) as error:
        Shards(folder)
    assert error.value.code == code, str(error.value)
    assert words in str(error.value)


def test_follows_the_links_of_hugging_faces_cache(tmp_path):
    cache = tmp_path / "models--x"
    snapshot, blobs = cache / "snapshots" / "123", cache / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for name, content in {"config.json": json.dumps(CONFIG).encode(), SINGLE: one_tensor()}.items():
        (blobs / f"blob-{name}").write_bytes(content)
        (snapshot / name).symlink_to(f"../../blobs/blob-{name}")
    with Shards(snapshot) as shards:
        assert shards.read("a").tolist() == [1.0, 2.0]


FOLDERS = {
    "no folder": (None, "ST-FOLDER", "no such folder"),
    "empty": ({}, "ST-MISSING", "missing weights"),
    "pickle": (
        {"consolidated.pth": b"", "training_args.bin": b""},
        "ST-MISSING",
        "only consolidated.pth, training_args.bin, which is not what transformers writes",
    ),
    "gguf": ({"m.gguf": b""}, "ST-MISSING", "m.gguf"),
    ".bin shard alone": (
        {"pytorch_model-00001-of-00002.bin": b""},
        "IX-MISSING",
        "without pytorch_model.bin.index.json",
    ),
    "shard alone": ({A: one_tensor()}, "IX-MISSING", f"missing index: {A}"),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_says_what_a_folder_lacks(tmp_path, case):
    files, code, words = FOLDERS[case]
    folder = tmp_path / "model"
    if files is not None:
        model_files(folder, files)
    with pytest.raises(InputError) as error:
        Shards(folder)
    assert error.value.code == code
    assert words in str(error.value)


def test_says_that_config_json_is_missing(tmp_path):
    (tmp_path / SINGLE).write_bytes(one_tensor())
    with pytest.raises(InputError, match=r"CFG-MISSING.*missing config.json"):
        Shards(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="this is an adapter, not a model"):
        Shards(tmp_path)
    with pytest.raises(InputError, match=r"ST-FOLDER.*is a file"):
        Shards(tmp_path / SINGLE)


def test_reads_shards(tmp_path):
    folder = model_files(tmp_path / "model", {INDEX: index(TWO), **SHARDS})
    with Shards(folder) as shards:
        assert shards.names() == ["a", "b"]
        assert (shards.shape("b"), shards.dtype("b")) == ((2,), "float32")
        assert shards.config == CONFIG
        first, again = shards.read("b"), shards.read("b")
        assert first.tolist() == [1.0, 2.0]
        first[0] = 5
        assert again[0] == 1


@pytest.mark.parametrize("act", ["shrinks", "grows", "is rewritten"])
def test_a_file_that_changes_is_noticed(tmp_path, act):
    folder = model_files(tmp_path / "model", {SINGLE: one_tensor()})
    with Shards(folder) as shards:
        shards.read("a")
        if act == "shrinks":
            os.truncate(folder / SINGLE, 60)
        elif act == "grows":
            os.truncate(folder / SINGLE, 6000)
        else:
            (folder / SINGLE).write_bytes(one_tensor("a", [3.0, 4.0]))
            os.utime(folder / SINGLE, (1, 1))
        with pytest.raises(InputError, match=r"ST-CHANGED.*changed while it was being read"):
            shards.read("a")


def test_closes_its_files(tmp_path):
    good = model_files(tmp_path / "good", {SINGLE: one_tensor()})
    bad = model_files(tmp_path / "bad", {INDEX: index(TWO), A: one_tensor("a"), B: b"x"})
    before = os.listdir("/proc/self/fd")
    Shards(good).close()
    with pytest.raises(InputError):
        Shards(bad)
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_reads_scalars_and_empty_tensors(tmp_path):
    header = {"s": entry("F64", [], (0, 8)), "z": entry("BF16", [0, 3], (8, 8))}
    folder = model_files(
        tmp_path / "model", {SINGLE: safetensors_bytes(header, np.float64(7).tobytes())}
    )
    with Shards(folder) as shards:
        assert shards.read("s") == 7.0
        assert shards.read("s").shape == ()
        assert shards.read("z").shape == (0, 3)
