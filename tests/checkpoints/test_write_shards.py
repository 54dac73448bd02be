"""What is written is what the safetensors package writes, and is what is read again."""

import json
import re

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from qlora_jax.checkpoints import write_shards
from qlora_jax.checkpoints.shards import INDEX, SINGLE, Shards
from qlora_jax.checkpoints.write_shards import ShardWriter, group, model_folder
from qlora_jax.errors import InputError, StorageError

TREE = {
    "b": np.arange(6, dtype=np.float32).reshape(2, 3),
    "a": np.arange(5, dtype=np.uint8),
    "d": np.asarray(7, np.int64),
    "c": np.zeros((0, 2), np.float16),
    "e": np.arange(4).astype(ml_dtypes.bfloat16),
}
SPECS = {name: (array.dtype, array.shape) for name, array in TREE.items()}


EXTRA = {"extra.txt": b"x"}


def write(out, tree=TREE, files=EXTRA, **options):
    with model_folder(out, {"a": 1}, SPECS, files, **options) as writer:
        for name, array in tree.items():
            writer.write(name, array)


def test_one_file_has_the_bytes_of_the_package(tmp_path):
    write(tmp_path / "out")
    expected = safetensors.numpy.save(TREE, {"format": "pt"})
    assert (tmp_path / "out" / SINGLE).read_bytes() == expected
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"a": 1}
    assert (tmp_path / "out" / "extra.txt").read_bytes() == b"x"


def test_the_order_of_writing_does_not_matter(tmp_path):
    write(tmp_path / "one")
    write(tmp_path / "two", dict(reversed(TREE.items())))
    assert (tmp_path / "one" / SINGLE).read_bytes() == (tmp_path / "two" / SINGLE).read_bytes()


@pytest.mark.parametrize("shard_bytes", [1, 13, 30])
def test_shards_are_read_again(tmp_path, shard_bytes):
    write(tmp_path / "out", shard_bytes=shard_bytes)
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in TREE.values())
    with Shards(tmp_path / "out") as shards:
        assert set(shards.names()) == set(TREE)
        for name, array in TREE.items():
            read = shards.read(name)
            assert (read.dtype, read.shape) == (array.dtype, array.shape)
            assert read.tobytes() == array.tobytes()


OPEN = {"f": np.arange(3, dtype=np.uint8), "aa": np.zeros(0, np.uint8)}
ROOM = {name: (np.dtype(np.uint8), (1000,)) for name in OPEN}


@pytest.mark.parametrize("shard_bytes", [10**6, 13])
def test_vectors_may_become_shorter_than_announced(tmp_path, shard_bytes):
    specs = {"f": ROOM["f"], **SPECS, "aa": ROOM["aa"]}
    with model_folder(tmp_path / "out", {}, specs, {}, shard_bytes, list(OPEN)) as writer:
        for name, array in {**OPEN, **TREE}.items():
            writer.write(name, array)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    read = {}
    for file in files:  # the package takes what we wrote, and its rules are ours
        read |= safetensors.numpy.load_file(file)
        assert file.stat().st_size < 1000
    tree = {**OPEN, **TREE}
    assert read.keys() == tree.keys()
    for name, array in tree.items():
        assert (read[name].dtype, read[name].shape) == (array.dtype, array.shape)
        assert read[name].tobytes() == array.tobytes()
    if len(files) > 1:
        index = json.loads((tmp_path / "out" / INDEX).read_text())
        assert index["metadata"]["total_size"] == sum(array.nbytes for array in tree.values())


@pytest.mark.parametrize("array", [np.zeros(1001, np.uint8), np.zeros((1, 2), np.uint8)])
def test_but_not_longer_nor_of_another_rank(tmp_path, array):
    with pytest.raises(AssertionError), ShardWriter(tmp_path, ROOM, open_ended=ROOM) as writer:
        writer.write("f", array)


def test_some_files_are_made_when_the_weights_are_written(tmp_path):
    seen = []
    with model_folder(tmp_path / "out", {}, SPECS, {"late": lambda: bytes(seen)}) as writer:
        for name, array in TREE.items():
            writer.write(name, array)
        seen.append(7)
    assert (tmp_path / "out" / "late").read_bytes() == b"\x07"


def test_a_file_that_cannot_be_copied_is_the_source_s_error(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(InputError, match=r"FILE-READ.*loop: cannot be opened"):
        write(tmp_path / "out", files={"copy": tmp_path / "loop"})
    assert [path.name for path in tmp_path.iterdir()] == ["loop"]


def test_groups_keep_the_order_and_the_limit():
    specs = {
        name: (np.dtype(np.uint8), (size,)) for name, size in zip("abcd", (3, 3, 9, 1), strict=True)
    }
    assert group(specs, 6) == [["a", "b"], ["c"], ["d"]]
    assert group(specs, 16) == [["a", "b", "c", "d"]]
    assert group({}, 6) == [[]]


def test_damage_on_the_way_to_the_disk_is_noticed(tmp_path, monkeypatch):
    real = write_shards.write_all

    def damaged(file, data, offset):
        data = bytearray(data)
        if len(data) == TREE["b"].nbytes:
            data[3] ^= 1
        real(file, data, offset)

    monkeypatch.setattr(write_shards, "write_all", damaged)
    with pytest.raises(StorageError, match=r"OUT-VERIFY.*: b: differs on the disk"):
        write(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_too_large_is_refused_before_anything_is_written(tmp_path):
    specs = {"a": (np.dtype(np.uint8), (10**15, 1000))}
    with pytest.raises(StorageError, match=r"OUT-FULL.*needs 1000000000000000000 bytes"):
        ShardWriter(tmp_path, specs)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match=re.escape(f"{tmp_path / 'out'}: exists already")):
        write(tmp_path / "out")


@pytest.mark.parametrize(
    "tree", [{}, {**TREE, "b": TREE["b"].T}, {**TREE, "b": TREE["b"].astype(int)}]
)
def test_wrong_calls_are_caught(tmp_path, tree):
    with pytest.raises(AssertionError):
        write(tmp_path / "out", tree)
    assert list(tmp_path.iterdir()) == []
