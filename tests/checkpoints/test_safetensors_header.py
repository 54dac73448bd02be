"""Our parser against the safetensors package: equal on good files, never wrong on bad ones."""

import ml_dtypes
import numpy as np
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_jax.checkpoints.safetensors_header import DTYPES
from qlora_jax.checkpoints.shards import SafetensorsFile
from qlora_jax.errors import InputError
from tests.checkpoints.safetensors_files import entry, safetensors_bytes

NAMES = st.text(
    st.characters(categories=["L", "N", "P"], exclude_characters='"'), min_size=1, max_size=9
)
# bytes of a bool other than 0 and 1 have no meaning
WRITABLE = [dtype for code, dtype in DTYPES.items() if code != "BOOL"]


@st.composite
def arrays(draw):
    dtype, shape = draw(st.sampled_from(WRITABLE)), draw(st.lists(st.integers(0, 3), max_size=3))
    size = int(np.prod(shape)) * dtype.itemsize
    return np.frombuffer(draw(st.binary(min_size=size, max_size=size)), dtype).reshape(shape)


def read_all(path) -> dict[str, np.ndarray]:
    file = SafetensorsFile(path, "x")
    try:
        read = {}
        for name, entry in file.entries.items():
            read[name] = np.empty(entry.shape, entry.dtype)
            file.read_bytes(entry, read[name])
        return read
    finally:
        file.close()


@settings(max_examples=60)
@given(tree=st.dictionaries(NAMES, arrays(), max_size=5), metadata=st.none() | st.just({"k": "v"}))
def test_reads_what_the_package_writes(tmp_path_factory, tree, metadata):
    path = tmp_path_factory.mktemp("st") / "f"
    tree.pop("__metadata__", None)
    path.write_bytes(safetensors.numpy.save(tree, metadata))
    ours = read_all(path)
    assert ours.keys() == tree.keys()
    for name, array in ours.items():
        assert (array.dtype, array.shape) == (tree[name].dtype, tree[name].shape)
        assert array.tobytes() == tree[name].tobytes()


def test_an_empty_tensor_overlaps_nothing(tmp_path):
    """Whatever stands first in the header."""
    header = {"full": entry(), "empty": entry(shape=(0, 3), offsets=(0, 0))}
    (tmp_path / "f").write_bytes(safetensors_bytes(header, bytes(8)))
    assert {name: array.shape for name, array in read_all(tmp_path / "f").items()} == {
        "full": (2,),
        "empty": (0, 3),
    }


BASE = safetensors.numpy.save(
    {
        "model.a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "model.b": np.arange(4).astype(ml_dtypes.bfloat16),
        "model.c": np.zeros((0, 2), np.uint8),
    },
    {"format": "pt"},
)


@settings(max_examples=400)
@given(
    edits=st.lists(
        st.tuples(st.integers(0, len(BASE) - 1), st.integers(0, 255)), min_size=1, max_size=3
    ),
    cut=st.none() | st.integers(0, len(BASE)),
)
def test_mutated_files_are_read_equal_or_refused(tmp_path_factory, edits, cut):
    data = bytearray(BASE)
    for place, byte in edits:
        data[place] = byte
    path = tmp_path_factory.mktemp("st") / "f"
    path.write_bytes(data[:cut])
    try:
        ours = read_all(path)
    except InputError:
        return
    theirs = dict(safetensors.deserialize(bytes(data[:cut])))
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        assert array.dtype == DTYPES[theirs[name]["dtype"]]
        assert list(array.shape) == theirs[name]["shape"]
        assert array.tobytes() == bytes(theirs[name]["data"])


def test_every_dtype_is_laid_out_as_the_package_does(tmp_path):
    tree = {f"n{i}": np.zeros(3, dtype) for i, dtype in enumerate(reversed(DTYPES.values()))}
    path = tmp_path / "f"
    path.write_bytes(safetensors.numpy.save(tree))
    assert [array.dtype for array in read_all(path).values()] == list(DTYPES.values())
