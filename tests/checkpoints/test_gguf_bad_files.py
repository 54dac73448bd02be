"""Bad GGUF files: one a rule, random damage, and what the messages say."""

import contextlib
import os
import struct
import tracemalloc

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_jax.checkpoints.gguf import GGUF
from qlora_jax.checkpoints.gguf_header import MAX_ELEMENTS
from qlora_jax.errors import InputError
from tests.checkpoints.gguf_files import (
    ARRAY,
    BOOL,
    HEAD,
    HEADS,
    I32,
    STRING,
    U32,
    VOCAB,
    WIDTH,
    File,
    array,
    f32,
    string,
    strings,
    text,
    tiny,
    u32,
)


def with_key(key: str, value: tuple[int, bytes] | None):
    return lambda: tiny().set(key, value)


def with_tensor(name: str, dims=None, kind=None, payload=None, rename=None):
    def build() -> File:
        file = tiny()
        old_dims, old_kind, old_payload = file.tensors[name]
        changed = (
            old_dims if dims is None else dims,
            old_kind if kind is None else kind,
            old_payload if payload is None else payload,
        )
        file.tensors = {
            (rename if n == name and rename is not None else n): changed if n == name else t
            for n, t in file.tensors.items()
        }
        return file

    return build


def with_field(**changes):
    def build() -> File:
        file = tiny()
        for name, value in changes.items():
            setattr(file, name, value)
        return file

    return build


def patched(old: bytes, new: bytes):
    def build() -> bytes:
        data = tiny().tobytes()
        assert data.count(old) == 1
        return data.replace(old, new)

    return build


def cut(to: int):
    return lambda: tiny().tobytes()[:to]


def doubled_key() -> File:
    file = tiny()
    file.keys.append(file.keys[1])
    return file


def without(name: str):
    def build() -> File:
        file = tiny()
        del file.tensors[name]
        return file

    return build


def plus(name: str, shape: tuple[int, ...]):
    return lambda: tiny().put(name, np.ones(shape, np.float32), gguf.GGMLQuantizationType.F32)


def with_frequencies(*factors: float):
    values = np.array(factors, np.float32)
    return lambda: tiny().put("rope_freqs.weight", values, gguf.GGMLQuantizationType.F32)


def with_yarn(key: str, value: tuple[int, bytes]):
    scaling = "llama.rope.scaling."
    file = tiny().set(scaling + "type", string("yarn")).set(scaling + "factor", f32(2.0))
    return lambda: file.set(scaling + key, value)


NORM = "output_norm.weight"
Q = "blk.0.attn_q.weight"
TOKENS = "tokenizer.ggml.tokens"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 98362432\n"
BOMB = b"GGUF" + struct.pack("<Iqq", 3, 0, 1) + text("a") + struct.pack("<IIQ", ARRAY, 0, 2**63)
assert len(BOMB) < 64

LONG = MAX_ELEMENTS + 1
BAD = [
    # the frame
    ("empty", "GG-EMPTY", lambda: b""),
    ("lfs", "GG-LFS", lambda: LFS),
    ("html", "GG-HTML", lambda: b"<!DOCTYPE html><html></html>"),
    ("zip", "GG-MAGIC", lambda: b"PK\x03\x04" + b"\0" * 60),
    ("magic", "GG-MAGIC", with_field(magic=b"GGUX")),
    ("version 1", "GG-VERSION", with_field(version=1)),
    ("version 0", "GG-VERSION", with_field(version=0)),
    ("version 4", "GG-VERSION", with_field(version=4)),
    ("big-endian", "GG-ENDIAN", with_field(version=3 << 24)),
    ("cut in the magic", "GG-CUT", cut(3)),
    ("cut in the counts", "GG-CUT", cut(12)),
    ("cut after the counts", "GG-COUNT", cut(24)),
    ("cut in the keys", "GG-COUNT", cut(100)),
    ("cut in the data", "GG-CUT", lambda: tiny().tobytes()[:-1]),
    ("negative tensors", "GG-COUNT", with_field(counts=(-1, None))),
    ("2^40 tensors", "GG-COUNT", with_field(counts=(1 << 40, None))),
    ("2^62 keys", "GG-COUNT", with_field(counts=(None, 1 << 62))),
    # metadata
    ("empty key", "GG-KEY", with_key("", u32(1))),
    ("doubled key", "GG-KEY", doubled_key),
    ("long key", "GG-STRING", with_key("k" * 65_536, u32(1))),
    ("long string", "GG-STRING", with_key("x", (STRING, struct.pack("<Q", 1 << 40)))),
    ("key not UTF-8", "GG-UTF8", patched(b"llama.block_count", b"llama.block\xffcount")),
    ("unknown value type", "GG-KVTYPE", with_key("x", (13, b"\0" * 8))),
    ("bool 2", "GG-BOOL", with_key("x", (BOOL, b"\x02"))),
    ("array 2^63", "GG-ARRAY", lambda: BOMB),
    ("array past the end", "GG-ARRAY", with_key("x", array(U32, 1 << 20, b""))),
    ("strings past the end", "GG-ARRAY", with_key("x", array(STRING, 1 << 20, b""))),
    ("long array", "GG-ARRAY", with_key("x", array(BOOL, LONG, b"\0" * LONG))),
    ("nested array", "GG-ARRAY", with_key("x", array(ARRAY, 1, b"\0" * 12))),
    ("array of unknown", "GG-ARRAY", with_key("x", array(99, 1, b"\0" * 12))),
    ("alignment 0", "GG-ALIGN", with_key("general.alignment", u32(0))),
    ("alignment 48", "GG-ALIGN", with_key("general.alignment", u32(48))),
    ("alignment int32", "GG-ALIGN", with_key("general.alignment", (I32, struct.pack("<i", 32)))),
    # the tensor table
    ("empty name", "GG-NAME", with_tensor(NORM, rename="")),
    ("doubled name", "GG-NAME", with_field(doubled=NORM)),
    ("long name", "GG-STRING", with_tensor(NORM, rename="n" * 64)),
    ("no dimensions", "GG-DIMS", with_tensor(NORM, dims=())),
    ("five dimensions", "GG-DIMS", with_tensor(NORM, dims=(32, 1, 1, 1, 1))),
    ("dimension 0", "GG-DIMS", with_tensor(NORM, dims=(0,))),
    ("negative dimension", "GG-DIMS", with_tensor(NORM, dims=(-32,))),
    ("2^80 values", "GG-DIMS", with_tensor(NORM, dims=(1 << 40, 1 << 40))),
    ("2^50 values", "GG-CUT", with_tensor(NORM, dims=(1 << 50,))),
    ("unknown type", "GG-TYPE", with_tensor(NORM, kind=77)),
    ("type that is not read", "GG-TYPE", with_tensor(NORM, kind=16)),
    ("half a block", "GG-BLOCK", with_tensor(NORM, dims=(16,), kind=8)),
    ("misaligned", "GG-OFFSET", with_field(offsets={Q: 1})),
    ("overlapping", "GG-OFFSET", with_field(offsets={NORM: 0})),
    ("a hole", "GG-OFFSET", with_field(offsets={NORM: 1 << 20})),
    ("bytes behind the data", "GG-TRAILING", lambda: tiny().tobytes() + b"x"),
    ("offset 2^64 - 32", "GG-OFFSET", with_field(offsets={NORM: (1 << 64) - 32})),
    # what the model says of itself
    ("unknown architecture", "GG-ARCH", with_key("general.architecture", string("mamba"))),
    ("no architecture", "GG-META", with_key("general.architecture", None)),
    ("architecture a number", "GG-META", with_key("general.architecture", u32(1))),
    ("an adapter", "GG-KIND", with_key("general.type", string("adapter"))),
    ("one of two files", "GG-SPLIT", with_key("split.count", u32(2))),
    ("no width", "GG-META", with_key("llama.embedding_length", None)),
    ("width 0", "GG-META", with_key("llama.embedding_length", u32(0))),
    ("width a float", "GG-META", with_key("llama.embedding_length", f32(32.0))),
    ("heads an array", "GG-META", with_key("llama.attention.head_count", array(U32, 0, b""))),
    ("3 heads", "GG-SHAPE", with_key("llama.attention.head_count", u32(3))),
    ("33 heads", "GG-META", with_key("llama.attention.head_count", u32(33))),
    ("odd heads", "GG-META", with_key("llama.attention.head_count", u32(32))),
    ("2 heads share 3", "GG-META", with_key("llama.attention.head_count_kv", u32(3))),
    ("eps NaN", "GG-META", with_key("llama.attention.layer_norm_rms_epsilon", f32(np.nan))),
    ("eps negative", "GG-META", with_key("llama.attention.layer_norm_rms_epsilon", f32(-1.0))),
    ("experts", "GG-META", with_key("llama.expert_count", u32(8))),
    ("unknown family key", "GG-META", with_key("llama.attention.clamp_kqv", f32(8.0))),
    ("partial rotary", "GG-META", with_key("llama.rope.dimension_count", u32(8))),
    ("yarn without a factor", "GG-META", with_key("llama.rope.scaling.type", string("yarn"))),
    ("yarn ramp", "GG-ROPE", with_yarn("yarn_ext_factor", f32(0.5))),
    ("yarn of infinite factor", "GG-META", with_yarn("factor", f32(np.inf))),
    ("yarn in unknown words", "GG-META", with_yarn("yarn_log_multiplier", f32(0.1))),
    ("longrope", "GG-ROPE", with_key("llama.rope.scaling.type", string("longrope"))),
    ("unknown rope scaling", "GG-ROPE", with_key("llama.rope.scaling.type", string("x\n" * 99))),
    ("not causal", "GG-META", with_key("llama.attention.causal", (BOOL, b"\x00"))),
    ("a window", "GG-META", with_key("llama.attention.sliding_window", u32(8))),
    ("a matrix of frequencies", "GG-ROPE", plus("rope_freqs.weight", (8, 8))),
    ("eot out of range", "GG-VOCAB", with_key("tokenizer.ggml.eot_token_id", u32(VOCAB))),
    ("frequencies of a wider head", "GG-ROPE", with_frequencies(*[1] * (HEAD // 2 + 1))),
    ("foreign frequencies", "GG-ROPE", with_frequencies(*range(1, HEAD // 2 + 1))),
    ("frequencies of 0", "GG-ROPE", with_frequencies(*[0] * (HEAD // 2))),
    ("frequencies next to 0", "GG-ROPE", with_frequencies(*np.linspace(3e-45, 1e-44, HEAD // 2))),
    ("vocabulary too short", "GG-SHAPE", with_key(TOKENS, strings(["a", "b", "c"]))),
    ("vocabulary contradicted", "GG-VOCAB", with_key("llama.vocab_size", u32(9))),
    ("eos out of range", "GG-VOCAB", with_key("tokenizer.ggml.eos_token_id", u32(VOCAB))),
    ("wrong shape", "GG-SHAPE", with_tensor(Q, dims=(16, 64))),
    ("kv heads contradicted", "GG-SHAPE", with_key("llama.attention.head_count_kv", u32(2))),
    ("missing weight", "GG-MISSING", without(Q)),
    ("a layer too many claimed", "GG-MISSING", with_key("llama.block_count", u32(2))),
    ("2^30 layers claimed", "GG-MISSING", with_key("llama.block_count", u32(1 << 30))),
    ("a layer too many", "GG-UNKNOWN", plus("blk.1.attn_norm.weight", (WIDTH,))),
    ("unknown tensor", "GG-UNKNOWN", plus("blk.0.attn_sinks.weight", (HEADS,))),
    ("one bias of four", "GG-MISSING", plus("blk.0.attn_q.bias", (WIDTH,))),
    ("a bias of a norm", "GG-UNKNOWN", plus("blk.0.attn_norm.bias", (WIDTH,))),
    ("a bias of v alone", "GG-UNKNOWN", plus("blk.0.attn_v.bias", (16,))),
    ("a scale", "GG-UNKNOWN", plus("blk.0.attn_q.scale", (1,))),
    ("another family's norm", "GG-UNKNOWN", plus("blk.0.attn_q_norm.weight", (16,))),
    ("Phi 3's factors", "GG-UNKNOWN", plus("rope_factors_long.weight", (8,))),
    ("layer 00", "GG-UNKNOWN", plus("blk.00.attn_norm.weight", (WIDTH,))),
    ("unknown top tensor", "GG-UNKNOWN", plus("../../etc/passwd", (WIDTH,))),
]


@pytest.mark.parametrize(("code", "build"), [row[1:] for row in BAD], ids=[row[0] for row in BAD])
def test_bad_files_are_refused_by_the_rule_they_break(opened, code, build):
    with pytest.raises(InputError) as caught:
        opened(build())
    assert caught.value.code == code
    message = str(caught.value)
    assert "model.gguf" in message
    assert message.isprintable()


def test_messages_use_plain_words(opened):
    def message(build) -> str:
        with pytest.raises(InputError) as caught:
            opened(build())
        return str(caught.value)

    assert "unknown architecture 'mamba' (expected one of: llama, qwen2, " in message(
        with_key("general.architecture", string("mamba"))
    )
    for build in (cut(12), cut(24), lambda: tiny().tobytes()[:-1]):
        assert "truncated" in message(build)
    assert "is a Git-LFS pointer (71 bytes), not weights of 0.0984 GB. Try: git" in message(
        lambda: LFS
    )
    assert "GGUF version 4 (expected 2 or 3)" in message(with_field(version=4))
    assert f"{Q}: has the shape (64, 16) (expected (32, 32))" in message(
        with_tensor(Q, dims=(16, 64))
    )
    assert "IQ2_XXS (16) (expected F32, F16, " in message(with_tensor(NORM, kind=16))


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q8_0"])
def test_nan_and_inf_are_refused_by_tensor_and_place(opened, kind, value):
    kind = gguf.GGMLQuantizationType[kind]
    file = tiny().put("output.weight", np.ones((VOCAB, WIDTH), np.float32), kind)
    dims, number, payload = file.tensors["output.weight"]
    block = gguf.GGML_QUANT_SIZES[kind][1]
    types = {"F32": "<f4", "BF16": None}
    bad = np.array(value, np.float32).tobytes()[2:] if kind.name == "BF16" else None
    bad = bad or np.array(value, types.get(kind.name, "<f2")).tobytes()
    at = block * 5 if kind.name.startswith("Q") else block * 160
    payload = payload[:at] + bad + payload[at + len(bad) :]
    file.tensors["output.weight"] = dims, number, payload
    source = opened(file)
    with pytest.raises(InputError, match=r"output\.weight: .* at value 160 .*finite") as caught:
        source.read("lm_head.weight")
    assert caught.value.code == "GG-NAN"


@pytest.mark.parametrize(
    ("kind", "code"), [("missing", "GG-FILE"), ("folder", "FILE-KIND"), ("fifo", "FILE-KIND")]
)
def test_only_regular_files_are_opened(tmp_path, kind, code):
    path = tmp_path / "model.gguf"
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    with pytest.raises(InputError) as caught:
        GGUF(path)
    assert caught.value.code == code


@pytest.mark.parametrize("size", [100, None])
def test_a_file_that_changes_while_open_is_an_error(tmp_path, size):
    path = tmp_path / "model.gguf"
    path.write_bytes(tiny().tobytes())
    with GGUF(path) as source:
        os.truncate(path, size or path.stat().st_size + 1)
        with pytest.raises(InputError) as caught:
            source.read("model.norm.weight")
    assert caught.value.code == "GG-CHANGED"


def test_a_short_read_goes_on(tmp_path, monkeypatch):
    path = tmp_path / "model.gguf"
    path.write_bytes(tiny().tobytes())
    with GGUF(path) as source:
        whole = source.read("model.norm.weight")
        real = os.preadv
        monkeypatch.setattr(os, "preadv", lambda fd, views, at: real(fd, [views[0][:7]], at))
        np.testing.assert_array_equal(source.read("model.norm.weight"), whole)


def test_a_refused_file_is_closed_again(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(tiny().tobytes()[:-1])
    before = os.listdir("/dev/fd")
    with pytest.raises(InputError):
        GGUF(path)
    assert os.listdir("/dev/fd") == before


@settings(max_examples=300)
@given(
    place=st.floats(0, 1, exclude_max=True),
    patch=st.sampled_from([1, 4, 8]).flatmap(lambda n: st.binary(min_size=n, max_size=n)),
    cut=st.booleans(),
)
def test_random_damage_loads_equal_or_is_an_input_error(tmp_path_factory, place, patch, cut):
    data = tiny().tobytes()
    at = int(place * len(data))
    path = tmp_path_factory.mktemp("damaged") / "model.gguf"
    path.write_bytes(data[:at] if cut else data[:at] + patch + data[at + len(patch) :])
    tracemalloc.start()
    with contextlib.suppress(InputError), GGUF(path) as source:
        for name in source.names():
            assert np.isfinite(source.read(name)).all()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 << 20
