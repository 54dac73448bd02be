"""The inline PTX itself, executed in NumPy on every input, against its twins and the codebooks."""

import importlib
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels.codebooks import CODEBOOKS
from pallas_kernels.nf4_matmul import decode, fragments
from tests.pallas_kernels import ptx

EXECUTED = {
    ("nf4_matmul.decode", "PTX"),
    ("nf4_matmul.fragments", "SHUFFLE"),
    ("nf4_matmul.fragments", "TURN"),
    ("dequantize.mosaic", "PTX"),  # in test_dequantize_kernel.py
}
HALF = np.arange(1 << 16, dtype=np.uint32)
# Every half word in either half, beside none, beside others, and beside all ones.
WORDS = np.concatenate(
    [
        HALF,
        HALF << 16,
        HALF | HALF[::-1] << 16,
        HALF | np.random.default_rng(0).permutation(HALF) << 16,
        HALF | 0xFFFF0000,
        HALF << 16 | 0xFFFF,
    ]
)


def test_all_inline_ptx_is_executed():
    package = Path(pallas_kernels.__file__).parent
    written = set()
    for path in package.rglob("*.py"):
        if ".reg .b" in path.read_text():
            name = ".".join(path.relative_to(package).with_suffix("").parts)
            module = importlib.import_module(f"pallas_kernels.{name}")
            texts = (text for text, value in vars(module).items() if ".reg .b" in str(value))
            written |= {(name, text) for text in texts if not text.startswith("__")}
    assert written == EXECUTED


def table(kind, dtype):
    """The 8 words that a lane holds."""
    words = decode.table_words(kind, dtype).reshape(decode.WORDS, -1)
    assert (words == words[:, :1]).all()
    return list(words[:, 0])


def bytes_of(words):
    """(n, 4) uint8, the lowest first."""
    return words.astype("<u4").view(np.uint8).reshape(-1, 4)


def codes_of(words):
    """(n, 8): a byte's first code is in its high nibble."""
    packed = bytes_of(words)
    return np.stack([packed >> 4, packed & 15], axis=-1).reshape(len(words), 8)


def decoded(text, words, kind, dtype):
    """(n, 8) of `dtype`: the PTX's four registers of two values."""
    registers = ptx.run(text, words, *table(kind, dtype), results=4)
    return np.stack(registers, axis=-1).astype("<u4").view(dtype).reshape(len(words), 8)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["nf4", "fp4", "int4"])
def test_decode_is_the_codebook_and_the_twin(kind, dtype):
    dtype = jnp.dtype(dtype)
    ours = decoded(decode.PTX, WORDS, kind, dtype).view(np.uint16)
    book = CODEBOOKS[kind].astype(dtype).view(np.uint16)
    np.testing.assert_array_equal(ours, book[codes_of(WORDS)])
    twin = decode.lookup_jnp(jnp.asarray(bytes_of(WORDS)), table(kind, dtype), dtype)
    np.testing.assert_array_equal(ours, np.asarray(twin).view(np.uint16))


# (number, bit) that change nothing: nothing carries, so 2^16 + 1 shifts by 16 bits as well.
IMMATERIAL = {(1 << 16, 0)}


def numbers(text):
    """(text before, number, text after) of each number of the PTX that is no register's."""
    for found in re.finditer(r"(?<![\w$.])\d+(?!\w)", text):
        yield text[: found.start()], int(found[0]), text[found.end() :]


@pytest.mark.parametrize("place", range(len(list(numbers(decode.PTX)))))
def test_decode_needs_each_of_its_numbers(place):
    """One bit changed in any constant gives wrong values: the test above would see it."""
    before, number, after = list(numbers(decode.PTX))[place]
    some = WORDS[::101]
    right = decoded(decode.PTX, some, "nf4", jnp.bfloat16).view(np.uint16)
    for bit in range(max(number.bit_length(), 1)):
        changed = f"{before}{number ^ 1 << bit}{after}"
        wrong = decoded(changed, some, "nf4", jnp.bfloat16).view(np.uint16)
        assert np.array_equal(wrong, right) == ((number, bit) in IMMATERIAL), (number, bit)


def test_shuffle_puts_two_rows_side_by_side():
    """fragments.SHUFFLE: nibbles a0 a1 a2 a3 b0 b1 b2 b3 of two words, by columns."""
    others = np.random.default_rng(1).permutation(WORDS)
    first, second = codes_of(WORDS), codes_of(others)
    even, odd = (codes_of(word) for word in ptx.run(fragments.SHUFFLE, WORDS, others, results=2))
    np.testing.assert_array_equal(even[:, :4], first[:, [0, 4, 2, 6]])
    np.testing.assert_array_equal(even[:, 4:], second[:, [0, 4, 2, 6]])
    np.testing.assert_array_equal(odd[:, :4], first[:, [1, 5, 3, 7]])
    np.testing.assert_array_equal(odd[:, 4:], second[:, [1, 5, 3, 7]])


def test_turn_transposes_a_matrix_over_the_lanes():
    """fragments.TURN moves bytes, each of which is marked here with a value of its own."""
    matrix = np.arange(256, dtype=np.uint8).view("<u4").reshape(8, 8)
    halves = matrix.reshape(ptx.LANES, 2)  # lane 4 r + c: columns 2 c and 2 c + 1 of row r
    out = ptx.run(fragments.TURN, halves[:, 0], halves[:, 1], results=2)
    np.testing.assert_array_equal(np.stack(out, axis=-1).reshape(8, 8), matrix.T)


def test_an_unknown_instruction_is_named():
    with pytest.raises(AssertionError, match=r"fma.rn.f32: the machine does not know"):
        ptx.run("{ fma.rn.f32 $0, $1, $1, $1; }", HALF, results=1)
