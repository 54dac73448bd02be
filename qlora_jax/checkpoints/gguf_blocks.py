"""GGUF's number formats: blocks of packed bytes to the floats that they stand for.

A tensor's row is cut into blocks of 32 or 256 values. A block holds its float16 scale (and minimum)
and the codes; of two codes in a byte, the low nibble comes first by half a block:

    Q4_0    d16  q4 x 32                              d * (q - 8)
    Q4_1    d16  m16  q4 x 32                         d * q + m
    Q5_0    d16  h1 x 32  q4 x 32                     d * (q + 16 h - 16)
    Q5_1    d16  m16  h1 x 32  q4 x 32                d * (q + 16 h) + m
    Q8_0    d16  q8 x 32                              d * q
    Q2_K    (s4 m4) x 16  q2 x 256  d16  m16          (d * s) * q - (m16 * m)
    Q3_K    h1 x 256  q2 x 256  s6 x 16  d16          (d * (s - 32)) * (q + 4 h - 4)
    Q4_K    d16  m16  (s6 m6) x 8  q4 x 256           (d * s) * q - (m16 * m)
    Q5_K    d16  m16  (s6 m6) x 8  h1, q4 x 256     (d * s) * (q + 16 h) - (m16 * m)
    Q6_K    q4 x 256  h2 x 256  s8 x 16  d16          (d * s) * (q + 16 h - 32)
    IQ4_NL  d16  q4 x 32                              d * LEVELS[q]
    IQ4_XS  d16  s6 x 8  q4 x 256                     (d * (s - 32)) * LEVELS[q]

Products and sums are float32 in this order, so values equal llama.cpp's reference bit for bit.
"""

from collections.abc import Callable
from dataclasses import dataclass

import ml_dtypes
import numpy as np

# The sixteen levels of IQ4_NL and IQ4_XS.
LEVELS = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32
)

HALF, SINGLE, BFLOAT = np.dtype("<f2"), np.dtype("<f4"), np.dtype(ml_dtypes.bfloat16)
Unpack = Callable[[np.ndarray, np.ndarray], None]


@dataclass(frozen=True)
class Block:
    """One number format.

    Attributes:
      name: its name in GGUF, such as `Q4_1`.
      values: values in a block.
      nbytes: bytes of a block.
      dtype: of the unpacked values.
      unpack: `unpack(packed, out)` fills out (n, values) from packed uint8 (n, nbytes).
    """

    name: str
    values: int
    nbytes: int
    dtype: np.dtype
    unpack: Unpack


def plain(dtype: np.dtype) -> Unpack:
    """Values stored as they are."""

    def unpack(packed: np.ndarray, out: np.ndarray) -> None:
        out[:] = packed.view(dtype)

    return unpack


def half(packed: np.ndarray, start: int) -> np.ndarray:
    """The float16 at byte `start` of each block, as float32 (n, 1)."""
    return packed[:, start : start + 2].view(HALF).astype(np.float32)


def nibbles(packed: np.ndarray, out: np.ndarray) -> None:
    """Low nibbles of packed (n, k) to the first k of out (n, 2k), high nibbles to the rest."""
    k = packed.shape[1]
    np.bitwise_and(packed, 15, out=out[:, :k], casting="unsafe")
    np.right_shift(packed, 4, out=out[:, k:], casting="unsafe")


def fifth_bits(packed: np.ndarray) -> np.ndarray:
    """16 where the value's high bit is set, else 0: packed (n, 4) to float32 (n, 32)."""
    return np.unpackbits(packed, axis=1, bitorder="little") * np.float32(16)


def q4_0(packed: np.ndarray, out: np.ndarray) -> None:
    """Codes around 8, scaled."""
    nibbles(packed[:, 2:], out)
    out -= 8
    out *= half(packed, 0)


def q4_1(packed: np.ndarray, out: np.ndarray) -> None:
    """Codes scaled and shifted."""
    nibbles(packed[:, 4:], out)
    out *= half(packed, 0)
    out += half(packed, 2)


def q5_0(packed: np.ndarray, out: np.ndarray) -> None:
    """Codes of five bits around 16, scaled."""
    nibbles(packed[:, 6:], out)
    out += fifth_bits(packed[:, 2:6])
    out -= 16
    out *= half(packed, 0)


def q5_1(packed: np.ndarray, out: np.ndarray) -> None:
    """Codes of five bits, scaled and shifted."""
    nibbles(packed[:, 8:], out)
    out += fifth_bits(packed[:, 4:8])
    out *= half(packed, 0)
    out += half(packed, 2)


def q8_0(packed: np.ndarray, out: np.ndarray) -> None:
    """Signed bytes, scaled."""
    out[:] = packed[:, 2:].view(np.int8)
    out *= half(packed, 0)


def six_bit_pairs(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scales and minima of the 8 groups of a K block: (n, 12) to two float32 (n, 8, 1).

    Groups 0-3 keep six bits in bytes 0-3 (scale) and 4-7 (minimum); groups 4-7 keep four bits in
    the nibbles of bytes 8-11 and their two high bits on top of bytes 0-7.
    """
    low, mid, high = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scale = np.concatenate([low & 63, (high & 15) | (low >> 6 << 4)], axis=1)
    minimum = np.concatenate([mid & 63, (high >> 4) | (mid >> 6 << 4)], axis=1)
    return scale.astype(np.float32)[:, :, None], minimum.astype(np.float32)[:, :, None]


def k_block(packed: np.ndarray, out: np.ndarray, codes: int, high_bits: int | None) -> None:
    """Q4_K and Q5_K: `codes` and `high_bits` are the bytes where those begin."""
    n = len(packed)
    groups = out.reshape(n, 8, 32)
    nibbles(packed[:, codes:].reshape(n * 4, 32), out.reshape(n * 4, 64))
    if high_bits is not None:
        bits = packed[:, None, high_bits : high_bits + 32] >> np.arange(8, dtype=np.uint8)[:, None]
        groups += (bits & 1) * np.float32(16)
    scale, minimum = six_bit_pairs(packed[:, 4:16])
    groups *= half(packed, 0)[:, :, None] * scale
    groups -= half(packed, 2)[:, :, None] * minimum


def q4_k(packed: np.ndarray, out: np.ndarray) -> None:
    """Eight groups of 32 codes, each with its own scale and minimum."""
    k_block(packed, out, codes=16, high_bits=None)


def q5_k(packed: np.ndarray, out: np.ndarray) -> None:
    """As Q4_K, with a fifth bit."""
    k_block(packed, out, codes=48, high_bits=16)


def two_bits(packed: np.ndarray) -> np.ndarray:
    """Codes of two bits, four of each byte 32 values apart: packed (n, 64) to uint8 (n, 256)."""
    shifts = np.array([0, 2, 4, 6], np.uint8)[:, None]
    codes = packed.reshape(-1, 2, 1, 32) >> shifts & 3
    return codes.reshape(-1, 256)


def q2_k(packed: np.ndarray, out: np.ndarray) -> None:
    """Sixteen groups of 16 codes, each with its own scale and minimum."""
    groups = out.reshape(-1, 16, 16)
    groups[...] = two_bits(packed[:, 16:80]).reshape(groups.shape)
    scale, minimum = packed[:, :16] & 15, packed[:, :16] >> 4
    groups *= (half(packed, 80) * scale)[:, :, None]
    groups -= (half(packed, 82) * minimum)[:, :, None]


def q3_k(packed: np.ndarray, out: np.ndarray) -> None:
    """Sixteen groups of 16 codes of three bits around 4, each with its own scale.

    Scales keep their low four bits in the nibbles of bytes 96-103, all low nibbles first, and the
    high two bits in bytes 104-107, as two_bits packs them.
    """
    n = len(packed)
    high = packed[:, None, :32] >> np.arange(8, dtype=np.uint8)[:, None] & 1
    out[:] = two_bits(packed[:, 32:96])
    out += high.reshape(n, 256) * np.float32(4)
    out -= 4
    scale = np.empty((n, 16), np.float32)
    nibbles(packed[:, 96:104], scale)
    shifts = np.array([0, 2, 4, 6], np.uint8)[:, None]
    top = packed[:, None, 104:108] >> shifts & 3
    scale += top.reshape(n, 16) * np.float32(16)
    scale -= 32
    groups = out.reshape(n, 16, 16)
    groups *= (half(packed, 108) * scale)[:, :, None]


def q6_k(packed: np.ndarray, out: np.ndarray) -> None:
    """Sixteen groups of 16 codes of six bits around 32, each with its own scale."""
    n = len(packed)
    nibbles(packed[:, :128].reshape(n * 2, 64), out.reshape(n * 2, 128))
    out += two_bits(packed[:, 128:192]) * np.float32(16)
    out -= 32
    scale = packed[:, 192:208].view(np.int8).astype(np.float32)
    groups = out.reshape(n, 16, 16)
    groups *= (half(packed, 208) * scale)[:, :, None]


def levels(packed: np.ndarray, out: np.ndarray) -> None:
    """The levels of packed nibbles (n, k) to out (n, 2k)."""
    k = packed.shape[1]
    np.take(LEVELS, packed & 15, out=out[:, :k])
    np.take(LEVELS, packed >> 4, out=out[:, k:])


def iq4_nl(packed: np.ndarray, out: np.ndarray) -> None:
    """Codes of uneven levels, scaled."""
    levels(packed[:, 2:], out)
    out *= half(packed, 0)


def iq4_xs(packed: np.ndarray, out: np.ndarray) -> None:
    """Eight groups of 32 codes of uneven levels, each with its own scale.

    Scales keep their low four bits in the nibbles of bytes 4-7, low before high nibble, and the
    high two bits in bytes 2-3.
    """
    n = len(packed)
    levels(packed[:, 8:].reshape(n * 8, 16), out.reshape(n * 8, 32))
    low = packed[:, 4:8, None] >> np.array([0, 4], np.uint8) & 15
    high = packed[:, 2:4, None] >> np.array([0, 2, 4, 6], np.uint8) & 3
    scale = (low.reshape(n, 8) | high.reshape(n, 8) << 4).astype(np.float32) - 32
    groups = out.reshape(n, 8, 32)
    groups *= (half(packed, 0) * scale)[:, :, None]


BLOCKS = {
    0: Block("F32", 1, 4, SINGLE, plain(SINGLE)),
    1: Block("F16", 1, 2, HALF, plain(HALF)),
    2: Block("Q4_0", 32, 18, SINGLE, q4_0),
    3: Block("Q4_1", 32, 20, SINGLE, q4_1),
    6: Block("Q5_0", 32, 22, SINGLE, q5_0),
    7: Block("Q5_1", 32, 24, SINGLE, q5_1),
    8: Block("Q8_0", 32, 34, SINGLE, q8_0),
    10: Block("Q2_K", 256, 84, SINGLE, q2_k),
    11: Block("Q3_K", 256, 110, SINGLE, q3_k),
    12: Block("Q4_K", 256, 144, SINGLE, q4_k),
    13: Block("Q5_K", 256, 176, SINGLE, q5_k),
    14: Block("Q6_K", 256, 210, SINGLE, q6_k),
    20: Block("IQ4_NL", 32, 18, SINGLE, iq4_nl),
    23: Block("IQ4_XS", 256, 136, SINGLE, iq4_xs),
    30: Block("BF16", 1, 2, BFLOAT, plain(BFLOAT)),
}

# Formats that exist but are not read, so that a refusal can name them.
UNREAD = {
    9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 21: "IQ3_S",
    22: "IQ2_S", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0",
    35: "TQ2_0", 39: "MXFP4", 40: "NVFP4",
}  # fmt: skip
