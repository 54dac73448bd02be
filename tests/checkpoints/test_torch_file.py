"""A .bin file of PyTorch is read as PyTorch reads it: real ones, and those written by hand."""

import json
import os
import shutil
import struct
import tracemalloc
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from qlora_jax.checkpoints.load import load_weights
from qlora_jax.checkpoints.shards import TORCH_INDEX, TORCH_SINGLE, Shards
from qlora_jax.checkpoints.torch_file import TorchFile
from qlora_jax.errors import InputError
from qlora_jax.models.config import ModelConfig
from qlora_jax.quantization.policy import QuantizationConfig
from tests.checkpoints.safetensors_files import index, model_files, one_tensor
from tests.checkpoints.torch_writer import (
    KINDS,
    members_of,
    pickle_of,
    storage,
    tensor,
    torch_bytes,
    zip_of,
)
from tests.golden_data import golden_folder

REAL = Path(__file__).parent / "torch_files"
SIX = np.arange(6).reshape(2, 3)
DTYPES = [np.dtype(ml_dtypes.bfloat16 if kind == "bfloat16" else kind) for kind in KINDS]


def read_all(path: Path) -> dict[str, np.ndarray]:
    """Every tensor, whole; each must come in pieces as it comes at once."""
    file = TorchFile(path, path.name)
    arrays = {}
    try:
        for name, entry in file.entries.items():
            arrays[name] = np.empty(entry.shape, entry.dtype)
            file.read_bytes(entry, arrays[name])
            pieces = [piece.tobytes() for piece in file.pieces(entry, np.empty(7, np.uint8))]
            assert b"".join(pieces) == arrays[name].tobytes()
    finally:
        file.close()
    return arrays


def same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert list(found) == list(expected)
    for name, array in expected.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape), name
        assert found[name].tobytes() == array.tobytes(), name


def test_reads_every_dtype_that_pytorch_wrote():
    same(read_all(REAL / "kinds.bin"), {dtype.name: SIX.astype(dtype) for dtype in DTYPES})


def test_reads_views_that_pytorch_wrote():
    base = np.arange(24, dtype=np.float32).reshape(4, 6)
    expected = {
        "base": base,
        "tied": base,
        "transposed": base.T,
        "rows": base[1:3],
        "block": base[1:3, 2:5],
        "steps": base[::2, 1::3],
        "turned": base.reshape(2, 3, 4).transpose(2, 0, 1),
        "scalar": np.float32(2.5).reshape(()),
        "empty": np.zeros((0, 3), np.float32),
        "one": np.ones((1, 1, 1), np.float32),
        "parameter": np.ones(2, np.float32),
    }
    same(read_all(REAL / "views.bin"), expected)


def test_any_view_may_be_the_first_that_is_read():
    """The checksum is that of the whole storage, whatever part is asked for."""
    expected = read_all(REAL / "views.bin")
    for name, array in expected.items():
        file = TorchFile(REAL / "views.bin", "views.bin")
        found = np.empty_like(array)
        file.read_bytes(file.entries[name], found)
        file.close()
        same({name: found}, {name: array})


def test_reads_a_modules_state_with_its_versions():
    found = read_all(REAL / "module.bin")
    assert found.pop("num_batches_tracked") == 0
    ones, zeros = np.ones(2, np.float32), np.zeros(2, np.float32)
    same(found, {"weight": ones, "bias": zeros, "running_mean": zeros, "running_var": ones})


@pytest.mark.parametrize(
    ("name", "code", "words"),
    [
        ("protocol4", "PK-PROTOCOL", "protocol 4"),
        ("legacy", "PT-LEGACY", "format of before 1.6"),
        ("float8", "PK-DTYPE", "torch._utils._rebuild_tensor_v3"),
        ("wrapped", "PK-WRAPPED", "it is the entry 'state_dict' of another dict"),
        ("no_checksums", "PT-CRC", "torch.save with checksums"),
    ],
)
def test_refuses_other_files_that_pytorch_wrote(name, code, words):
    with pytest.raises(InputError, match=words) as error:
        TorchFile(REAL / f"{name}.bin", name)
    assert error.value.code == code


@st.composite
def arrays(draw) -> np.ndarray:
    """Any bits, as a C- or Fortran-ordered array of up to four axes."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 4), max_size=4))
    count = int(np.prod(shape, dtype=int))
    if dtype == np.bool_:
        data = bytes(draw(st.lists(st.integers(0, 1), min_size=count, max_size=count)))
    else:
        size = count * dtype.itemsize
        data = draw(st.binary(min_size=size, max_size=size))
    array = np.frombuffer(data, dtype).reshape(shape)
    return np.asfortranarray(array) if draw(st.booleans()) else array


NAMES = st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=40)


@given(st.dictionaries(NAMES, arrays(), max_size=5))
def test_reads_what_was_written(tmp_path_factory, state):
    path = tmp_path_factory.mktemp("torch") / "x.bin"
    path.write_bytes(torch_bytes(state))
    same(read_all(path), state)


def test_reads_files_of_the_first_zip_versions(tmp_path):
    """PyTorch 1.6 wrote no byte order, a storage's address as its key, and version 2."""
    key, data = "94204416777216", np.float32([1, 2]).tobytes()
    pickle = pickle_of({"a": tensor(storage("Float", key, 2, "cuda:0"), 0, [2], [1])})
    members = members_of(pickle, {key: data}, "archive")
    del members[1]
    members[-1].data = b"2\n"
    (tmp_path / "x.bin").write_bytes(zip_of(members))
    same(read_all(tmp_path / "x.bin"), {"a": np.float32([1, 2])})


def folder_of(path: Path, **files: dict[str, np.ndarray]) -> Path:
    """A model's folder of .bin files."""
    return model_files(path, {f"{name}.bin": torch_bytes(file) for name, file in files.items()})


def test_reads_a_folder(tmp_path):
    folder = folder_of(tmp_path / "model", pytorch_model={"a": SIX, "b": SIX.T.astype("f4")})
    with Shards(folder) as shards:
        assert shards.names() == ["a", "b"]
        assert (shards.shape("b"), shards.dtype("b")) == ((3, 2), "float32")
        assert np.array_equal(shards.read("b"), SIX.T)
        out = np.empty(24, np.uint8)
        shards.read_into("b", out)
        assert out.tobytes() == SIX.T.astype("f4").tobytes()


@pytest.mark.parametrize("quantization", [None, QuantizationConfig()])
def test_a_tied_model_may_carry_its_head(tmp_path, quantization):
    """As transformers wrote them: lm_head is the storage of the embeddings a second time."""
    golden = golden_folder("models/llama_tied")
    state = load_file(golden / "model.safetensors")
    embeddings = state.pop("model.embed_tokens.weight")
    held = storage("Float", "0", embeddings.size)
    tied = tensor(held, 0, embeddings.shape, [embeddings.shape[1], 1])
    items, storages = {"lm_head.weight": tied, "model.embed_tokens.weight": tied}, {}
    storages["0"] = embeddings.tobytes()
    for i, (name, array) in enumerate(state.items(), 1):
        strides = [step // 4 for step in array.strides]
        items[name] = tensor(storage("Float", str(i), array.size), 0, array.shape, strides)
        storages[str(i)] = array.tobytes()
    (tmp_path / TORCH_SINGLE).write_bytes(zip_of(members_of(pickle_of(items), storages)))
    shutil.copy(golden / "config.json", tmp_path)
    found, expected = (weights_of(folder, quantization) for folder in (tmp_path, golden))
    assert found.keys() == expected.keys()
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def weights_of(folder: Path, quantization: QuantizationConfig | None) -> dict:
    with Shards(folder) as shards:
        config = ModelConfig.from_dict(shards.config, "config.json")
        return load_weights(shards, config, quantization, dtype="float32")


FIRST, SECOND = "pytorch_model-00001-of-00002", "pytorch_model-00002-of-00002"
MAP = {"a": f"{FIRST}.bin", "b": f"{SECOND}.bin"}


def test_reads_shards(tmp_path):
    folder = folder_of(tmp_path / "model", **{FIRST: {"a": SIX}, SECOND: {"b": SIX}})
    (folder / TORCH_INDEX).write_bytes(index(MAP))
    with Shards(folder) as shards:
        assert shards.names() == ["a", "b"]
        assert np.array_equal(shards.read("b"), SIX)


def test_safetensors_win(tmp_path):
    folder = folder_of(tmp_path / "model", pytorch_model={"a": SIX})
    (folder / "model.safetensors").write_bytes(one_tensor())
    with Shards(folder) as shards:
        assert shards.shape("a") == (2,)


@pytest.mark.parametrize(
    ("weight_map", "code", "words"),
    [
        ({**MAP, "c": "x.safetensors"}, "IX-NAME", "NAME.bin"),
        ({**MAP, "c": "../x.bin"}, "IX-NAME", "is not a file name inside the folder"),
        ({**MAP, "c": "gone.bin"}, "IX-SHARDS", "missing shards: gone.bin"),
        ({"a": MAP["a"], "c": MAP["b"]}, "IX-TENSORS", "lacks c"),
        ({"a": MAP["a"]}, None, None),
    ],
)
def test_refuses_an_index_that_does_not_fit(tmp_path, weight_map, code, words):
    folder = folder_of(tmp_path / "model", **{FIRST: {"a": SIX}, SECOND: {"b": SIX}})
    (folder / TORCH_INDEX).write_text(json.dumps({"weight_map": weight_map}))
    if code is None:  # a shard that the index does not name is no business of ours
        Shards(folder).close()
        return
    with pytest.raises(InputError, match=words) as error:
        Shards(folder)
    assert error.value.code == code


@pytest.mark.parametrize("act", ["shrinks", "is rewritten"])
def test_a_file_that_changes_is_noticed(tmp_path, act):
    folder = folder_of(tmp_path / "model", pytorch_model={"a": SIX})
    path = folder / TORCH_SINGLE
    with Shards(folder) as shards:
        path.write_bytes(path.read_bytes()[: 60 if act == "shrinks" else None])
        os.utime(path, (1, 1))  # two writes may be within one tick of the clock
        with pytest.raises(InputError, match=r"PT-CHANGED.*changed while it was being read"):
            shards.read("a")


@pytest.mark.parametrize("part", ["rows", "whole", "columns"])
def test_a_flipped_bit_is_noticed_wherever_it_is(tmp_path, part):
    """Also outside the tensor that is read, since its storage has one checksum."""
    held = storage("Float", "0", 6)
    views = {
        "rows": tensor(held, 2, [1, 2], [2, 1]),
        "whole": tensor(held, 0, [3, 2], [2, 1]),
        "columns": tensor(held, 0, [2, 3], [1, 2]),
    }
    data = np.arange(6, dtype="f4").tobytes()
    good = zip_of(members_of(pickle_of(views), {"0": data}))
    path = tmp_path / "x.bin"
    for place in range(len(data)):
        bad = bytearray(good)
        bad[good.index(data) + place] ^= 4
        path.write_bytes(bad)
        file = TorchFile(path, "x")
        entry = file.entries[part]
        with pytest.raises(InputError, match=r"PT-CRC.*the checksum of its 24 bytes"):
            file.read_bytes(entry, np.empty(entry.shape, entry.dtype))
        file.close()


def test_a_small_part_of_a_large_storage_needs_little_memory(tmp_path):
    count = 16 << 20
    data = np.zeros(count, np.float32).tobytes()
    pickle = pickle_of({"a": tensor(storage("Float", "0", count), count - 8, [8], [1])})
    (tmp_path / "x.bin").write_bytes(zip_of(members_of(pickle, {"0": data})))
    file = TorchFile(tmp_path / "x.bin", "x")
    tracemalloc.start()
    file.read_bytes(file.entries["a"], np.empty(8, np.float32))
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    file.close()
    assert most < 8 << 20


def test_numbers_of_more_than_four_bytes_stand_in_64_bits(tmp_path):
    """Sizes and places beyond 4 GB, as PyTorch writes them; here small ones are written so."""
    pickle = pickle_of({"a": tensor(storage("Float", "0", 2), 0, [2], [1])})
    members = members_of(pickle, {"0": np.float32([1, 2]).tobytes()})
    body, directory = b"", b""
    for member in members:
        wide = struct.pack("<HHQQQ", 1, 24, len(member.data), len(member.data), len(body))
        body += member.local()
        member.size, member.start, member.extra = 0xFFFFFFFF, 0xFFFFFFFF, wide
        directory += member.central(0)
    start, count = len(body), len(members)
    end64 = (b"PK\6\6", 44, 30, 45, 0, 0, count, count, len(directory), start)
    record = struct.pack("<4sQHHIIQQQQ", *end64)
    locator = struct.pack("<4sIQI", b"PK\6\7", 0, start + len(directory), 1)
    end = struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, count, count, len(directory), 0xFFFFFFFF, 0)
    path = tmp_path / "x.bin"
    path.write_bytes(body + directory + record + locator + end)
    same(read_all(path), {"a": np.float32([1, 2])})
    path.write_bytes(body + directory + record + locator.replace(b"PK\6\7", b"PK\6\0") + end)
    with pytest.raises(InputError, match="PT-END"):
        read_all(path)
