"""Writing GGUF files: read back by the gguf package, which knows nothing of ours."""

import tracemalloc

import gguf
import ml_dtypes
import numpy as np
import pytest
from gguf.quants import dequantize, quantize

from qlora_jax.checkpoints import gguf_write
from qlora_jax.checkpoints.gguf_header import read_header
from qlora_jax.checkpoints.gguf_write import save_gguf
from qlora_jax.errors import InputError, StorageError

RNG = np.random.default_rng(0)
METADATA = {
    "general.architecture": "llama",
    "llama.block_count": 7,
    "llama.rope.freq_base": 1e4,
    "tokenizer.ggml.add_bos_token": True,
    "tokenizer.ggml.tokens": ["a", "ä", ""],
    "tokenizer.ggml.scores": [0.0, -1.5],
    "tokenizer.ggml.token_type": [1, -3],
    "tokenizer.ggml.merges": [],
    "raw": b"\x00\x00\x00\x00\x09",  # uint8 9
}
TYPES = {
    "general.architecture": "STRING",
    "llama.block_count": "UINT32",
    "llama.rope.freq_base": "FLOAT32",
    "tokenizer.ggml.add_bos_token": "BOOL",
    "tokenizer.ggml.tokens": "ARRAY STRING",
    "tokenizer.ggml.scores": "ARRAY FLOAT32",
    "tokenizer.ggml.token_type": "ARRAY INT32",
    "raw": "UINT8",
}


def tensors() -> dict[str, np.ndarray]:
    return {
        "token_embd.weight": RNG.standard_normal((5, 64)).astype(ml_dtypes.bfloat16),
        "blk.0.attn_norm.weight": RNG.standard_normal(3).astype(np.float32),
        "blk.0.attn_q.weight": RNG.standard_normal((4, 32)).astype(np.float32),
        "blk.0.ffn_up.weight": RNG.standard_normal((2, 96)).astype(np.float16),
        "output.weight": RNG.standard_normal((5, 64)).astype(np.float32),
    }


KINDS = {
    "token_embd.weight": "BF16",
    "blk.0.attn_norm.weight": "F32",
    "blk.0.attn_q.weight": "Q4_0",
    "blk.0.ffn_up.weight": "F16",
    "output.weight": "Q8_0",
}


def specs_of(values):
    return {name: (KINDS[name], array.shape) for name, array in values.items()}


def test_the_gguf_package_reads_it(tmp_path):
    values = tensors()
    shuffled = sorted(values.items())  # written in another order than announced
    save_gguf(tmp_path / "out.gguf", METADATA, specs_of(values), shuffled)
    reader = gguf.GGUFReader(tmp_path / "out.gguf")
    fields = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert {name: " ".join(t.name for t in f.types) for name, f in fields.items()} == {
        **TYPES,
        "tokenizer.ggml.merges": "ARRAY",
    }
    found = {name: field.contents() for name, field in fields.items()}
    assert found == {**METADATA, "raw": 9}
    assert [tensor.name for tensor in reader.tensors] == list(values)
    for tensor in reader.tensors:
        array = values[tensor.name]
        assert tensor.tensor_type.name == KINDS[tensor.name]
        assert tensor.shape.tolist() == list(array.shape[::-1])
        assert tensor.data_offset % 32 == 0
        packed = quantize(array.astype(np.float32), tensor.tensor_type)
        np.testing.assert_array_equal(
            dequantize(tensor.data, tensor.tensor_type).reshape(array.shape),
            dequantize(packed, tensor.tensor_type),
        )
    assert (tmp_path / "out.gguf").stat().st_size % 32 == 0  # as llama.cpp asks of the last tensor
    assert [path.name for path in tmp_path.iterdir()] == ["out.gguf"]


def write(path, values, metadata=METADATA):
    save_gguf(path, metadata, specs_of(values), values.items())


def test_an_existing_file_is_left_alone(tmp_path):
    (tmp_path / "out.gguf").write_text("mine")
    with pytest.raises(InputError, match="OUT-EXISTS"):
        write(tmp_path / "out.gguf", tensors())
    assert (tmp_path / "out.gguf").read_text() == "mine"


def test_another_suffix_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"GG-SUFFIX.*ends with \.gguf"):
        write(tmp_path / "out", tensors())


@pytest.mark.parametrize(("value", "code"), [(np.nan, "W-FINITE"), (1e6, "GG-RANGE")])
def test_what_cannot_be_stored_is_named_and_leaves_nothing(tmp_path, value, code):
    values = tensors()
    values["blk.0.ffn_up.weight"] = values["blk.0.ffn_up.weight"].astype(np.float32)
    values["blk.0.ffn_up.weight"][1, 5] = value
    with pytest.raises(InputError, match=rf"{code}\]: .*out\.gguf: blk\.0\.ffn_up\.weight: "):
        write(tmp_path / "out.gguf", values)
    assert list(tmp_path.iterdir()) == []


def test_a_tensor_that_changes_on_the_disk_is_found(tmp_path, monkeypatch):
    values, original = tensors(), gguf_write.write_all

    def careless(file, data, offset):
        original(file, data, offset)
        if len(data) == 2 * 96 * 2:
            original(file, b"\x55", offset + 7)

    monkeypatch.setattr(gguf_write, "write_all", careless)
    with pytest.raises(StorageError, match=r"OUT-VERIFY.*out\.gguf: blk\.0\.ffn_up\.weight"):
        write(tmp_path / "out.gguf", values)
    assert list(tmp_path.iterdir()) == []


def test_a_header_that_changes_on_the_disk_is_found(tmp_path, monkeypatch):
    original = gguf_write.write_all

    def careless(file, data, offset):
        original(file, data, offset)
        if offset == 0:
            original(file, b"b", data.index(b"\0a") + 1)

    monkeypatch.setattr(gguf_write, "write_all", careless)
    with pytest.raises(StorageError, match=r"OUT-VERIFY.*the header differs"):
        write(tmp_path / "out.gguf", tensors())


def test_no_room_on_the_disk_is_told_before_the_first_tensor(tmp_path):
    with pytest.raises(StorageError, match=r"OUT-FULL.*bytes are free"):
        save_gguf(tmp_path / "out.gguf", {}, {"a.weight": ("F32", (1 << 30, 1 << 30))}, [])


def test_memory_is_bounded(tmp_path):
    """A tensor is packed in pieces: beside itself it needs little."""
    big = np.ones((2048, 4096), ml_dtypes.bfloat16)
    tracemalloc.start()
    save_gguf(tmp_path / "out.gguf", {}, {"a.weight": ("Q8_0", big.shape)}, [("a.weight", big)])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20  # float32 would be 32 MB


def test_our_reader_finds_where_each_value_lies(tmp_path):
    write(tmp_path / "out.gguf", tensors())
    with open(tmp_path / "out.gguf", "rb") as file:
        header = read_header(file.fileno(), (tmp_path / "out.gguf").stat().st_size, "out")
        for key, (start, end) in header.spans.items():
            file.seek(start)
            assert file.read(end - start) == gguf_write.encoded(METADATA[key])
