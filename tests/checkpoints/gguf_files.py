"""Hand-made GGUF files for the tests, in parts that can be spoiled."""

import struct
from dataclasses import dataclass, field

import gguf
import numpy as np
from gguf.quants import quantize

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


def weights(width: int = WIDTH) -> dict[str, np.ndarray]:
    """The tiny model's weights by GGUF name, rows in Hugging Face's order."""
    shapes = {
        "token_embd": (VOCAB, width),
        "blk.0.attn_norm": (width,),
        "blk.0.attn_q": (HEADS * HEAD, width),
        "blk.0.attn_k": (KV_HEADS * HEAD, width),
        "blk.0.attn_v": (KV_HEADS * HEAD, width),
        "blk.0.attn_output": (width, HEADS * HEAD),
        "blk.0.ffn_norm": (width,),
        "blk.0.ffn_gate": (INNER, width),
        "blk.0.ffn_up": (INNER, width),
        "blk.0.ffn_down": (width, INNER),
        "output_norm": (width,),
    }
    rng = np.random.default_rng(0)
    return {f"{n}.weight": rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}


def interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to q and k: row (half, i) of a head goes to row (i, half)."""
    out, pairs = np.empty_like(weight), len(weight) // heads // 2
    for row in range(len(weight)):
        head, half, i = row // (2 * pairs), row // pairs % 2, row % pairs
        out[2 * (head * pairs + i) + half] = weight[row]
    return out


def llama3_factors(rule: dict, head_dim: int) -> np.ndarray:
    """Llama 3's rule, one frequency at a time, as llama.cpp's converter writes it.

    Args:
      rule: config.json's rope_parameters.
    """
    original, factors = rule["original_max_position_embeddings"], []
    low, high, factor = rule["low_freq_factor"], rule["high_freq_factor"], rule["factor"]
    for i in range(head_dim // 2):
        wavelength = 2 * np.pi * rule["rope_theta"] ** (2 * i / head_dim)
        smooth = (original / wavelength - low) / (high - low)
        slowed = 1 / ((1 - smooth) / factor + smooth)
        is_fast, is_slow = wavelength < original / high, wavelength > original / low
        factors.append(1.0 if is_fast else factor if is_slow else slowed)
    return np.array(factors, np.float32)


def tiny(width: int = WIDTH) -> File:
    file = File(
        keys=[
            ("general.architecture", string("llama")),
            ("llama.context_length", u32(64)),
            ("llama.embedding_length", u32(width)),
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
    for name, values in weights(width).items():
        heads = {"blk.0.attn_q.weight": HEADS, "blk.0.attn_k.weight": KV_HEADS}.get(name)
        stored = values if heads is None else interleave(values, heads)
        file.put(name, stored, gguf.GGMLQuantizationType.F32)
    return file
