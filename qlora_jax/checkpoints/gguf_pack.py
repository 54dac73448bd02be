"""Floats to GGUF's number formats: `gguf_blocks` undone, bit for bit as llama.cpp itself packs.

    Q8_0   d = largest |x| / 127    q = round(x / d), halves away from zero
    Q4_0   d = largest x / -8       q = floor(x / d + 8.5), at most 15; largest by |x|, the first

Steps are float32, and the division is a product with 1 / d, since the reference has it so. Source:
llama.cpp's ggml-quants.c (quantize_row_q8_0_ref, quantize_row_q4_0_ref).
"""

from collections.abc import Callable, Iterator

import numpy as np

from qlora_jax.checkpoints.finite import first_not_finite
from qlora_jax.checkpoints.gguf_blocks import BFLOAT, BLOCKS, HALF, SINGLE, Block
from qlora_jax.errors import InputError

PIECE = 1 << 16  # values packed at once: what the steps need stays in the processor's cache
BELOW_HALF = np.nextafter(np.float32(0.5), np.float32(0))

Pack = Callable[[np.ndarray, np.ndarray], None]


def plain(dtype: np.dtype) -> Pack:
    """Values stored as they are, rounded to nearest even."""

    def pack(values: np.ndarray, out: np.ndarray) -> None:
        out.view(dtype)[:] = values

    return pack


def inverse(scale: np.ndarray) -> np.ndarray:
    """1 / scale; 0 where that has no float32, whose block is all zeros in float16 anyway."""
    with np.errstate(divide="ignore", over="ignore"):
        inverted = np.float32(1) / scale
    inverted[np.isinf(inverted)] = 0
    return inverted


def q8_0(values: np.ndarray, out: np.ndarray) -> None:
    """A float16 scale and 32 signed bytes."""
    scale = np.maximum(values.max(axis=1), np.abs(values.min(axis=1))) / np.float32(127)
    out[:, :2].view(HALF)[:, 0] = scale
    codes = values * inverse(scale)[:, None]
    codes += np.copysign(BELOW_HALF, codes)  # then cut off: halves go away from zero
    np.copyto(out[:, 2:].view(np.int8), codes, casting="unsafe")


def q4_0(values: np.ndarray, out: np.ndarray) -> None:
    """A float16 scale and 32 codes around 8: the first 16 in low nibbles, the rest in high ones."""
    high, low = values.max(axis=1), values.min(axis=1)
    largest = np.where(high > -low, high, low)
    ties = np.flatnonzero(high == -low)
    first = np.abs(values[ties]).argmax(axis=1)
    largest[ties] = values[ties, first]
    scale = largest / np.float32(-8)
    out[:, :2].view(HALF)[:, 0] = scale
    codes = values * inverse(scale)[:, None]
    codes += np.float32(8.5)
    codes = np.minimum(codes.astype(np.uint8), 15)
    np.bitwise_or(codes[:, :16], codes[:, 16:] << 4, out=out[:, 2:])


PACKERS: dict[str, Pack] = {
    "F32": plain(SINGLE),
    "F16": plain(HALF),
    "BF16": plain(BFLOAT),
    "Q8_0": q8_0,
    "Q4_0": q4_0,
}
BY_NAME: dict[str, tuple[int, Block]] = {
    block.name: (number, block) for number, block in BLOCKS.items() if block.name in PACKERS
}


def packed(array: np.ndarray, kind: str, where: str) -> Iterator[np.ndarray]:
    """The bytes of a tensor, in pieces of uint8 (blocks, bytes of a block).

    Args:
      array: finite, of any float dtype; rows are whole blocks.
      kind: F32, F16, BF16, Q8_0 or Q4_0.
      where: the tensor, for errors.

    Raises:
      InputError: GG-RANGE for a value that is too large for the format.
    """
    block = BY_NAME[kind][1]
    rows = np.ascontiguousarray(array).reshape(-1, block.values)
    step = PIECE // block.values
    for start in range(0, len(rows), step):
        with np.errstate(over="ignore"):  # what is too large becomes Inf: told below
            values = rows[start : start + step].astype(SINGLE, copy=False)
            out = np.empty((len(values), block.nbytes), np.uint8)
            PACKERS[kind](values, out)
        check_range(values, out, kind, where)
        yield out


def check_range(values: np.ndarray, out: np.ndarray, kind: str, where: str) -> None:
    """Refuses Inf among stored values or scales."""
    dtype = {"F32": SINGLE, "BF16": BFLOAT}.get(kind, HALF)
    stored = np.ascontiguousarray(out[:, : dtype.itemsize]).view(dtype)
    place = first_not_finite(stored)
    if place is not None:
        block = values[place]
        found = f"{block[np.abs(block).argmax()]} is too large for {kind}"
        hint = {"F32": "", "BF16": "the type f32"}.get(kind, "the type bf16 or f32")
        raise InputError("GG-RANGE", where, found, hint=hint)
