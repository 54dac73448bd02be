"""Damage to bytes of any format, drawn from a seeded generator, and values that nobody expects.

A mutation gives the new bytes and how many numbers of what is loaded it may change: none, unless it
lies within the numbers themselves, where a format without checksums cannot show it.
"""

from collections.abc import Callable
from random import Random

Mutated = tuple[bytes, int]  # the new bytes, and how many loaded numbers they may change

NUMBERS = (
    0, 1, -1, 2, 3, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**53 + 1, 2**63 - 1, 2**63,
    2**64 - 1, 2**64, -(2**63), 10**30, 0.5, -0.0, 1e-320, 1e308,
)  # fmt: skip
TEXTS = (
    "", " ", ".", "..", "../x", "/etc/passwd", "a\\b", "C:x", "a\0b", "\x1b[2J", "\u202e",
    "x" * 999, "F16", "F64", "I8", "BOOL", "F8_E4M3", "float16", "null", "NaN", "{{ 1 }}",
    "(a+)+$", "LORA", "llama", "gemma2", "yarn", "longrope", "dynamic", "linear",
    "sliding_attention", "\ud800",
)  # fmt: skip


def bits(data: bytes, rng: Random, start: int = 0) -> Mutated:
    """One to four flipped bits; those from byte `start` on lie within numbers."""
    spoiled, touched = bytearray(data), 0
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        place = rng.randrange(len(data))
        spoiled[place] ^= 1 << rng.randrange(8)
        touched += place >= start
    return bytes(spoiled), touched


def bits_in_front(data: bytes, rng: Random, start: int) -> Mutated:
    """Flipped bits before byte `start`."""
    return bits(data[:start], rng)[0] + data[start:], 0


def pieces(data: bytes, rng: Random) -> Mutated:
    """Bytes cut off, taken out, put in or doubled, so that the length changes."""
    start = rng.randrange(len(data))
    end = min(len(data), start + rng.choice((1, 2, 3, 8, 64, 4096)))
    piece = data[start:end]
    return rng.choice(
        (
            data[:start],
            data[start:],
            data[:start] + data[end:],
            data[:end] + piece + data[end:],
            data[:start] + rng.randbytes(len(piece)) + data[start:],
            data + rng.randbytes(rng.choice((1, 7, 32, 64, 4096))),
            data + b"\0" * 4096,
        )
    ), 0


def number(rng: Random, size: int = 8) -> bytes:
    """A little-endian number that a length or count should not be, or just is not."""
    value = rng.choice([n for n in NUMBERS if isinstance(n, int)]) + rng.choice((-1, 0, 0, 1))
    return (value % (1 << 8 * size)).to_bytes(size, "little")


def scaled(mutated: Mutated, numbers: int) -> Mutated:
    """For a format in which a byte can change so many numbers."""
    return mutated[0], mutated[1] * numbers


def one_of(rng: Random, *weighted: tuple[Callable[[], Mutated], int]) -> Mutated:
    """What one of the functions gives, the heavier ones more often."""
    functions, weights = zip(*weighted, strict=True)
    return rng.choices(functions, weights)[0]()
