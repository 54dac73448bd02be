"""The lookup of all GPU kernels: packed codes to 16-bit floats in registers, two twins.

    interpret   jnp, which the CPU interpreter runs
    otherwise   inline PTX: 16 `prmt` (byte permutes) turn 4 bytes of codes into 8 values

A byte permute picks 4 of 8 bytes by 3-bit selectors, so 16 table entries take two permutes and a
third that chooses by the code's top bit; once for the low bytes of the values, once for the high.
The table is data, 9 words that stay in registers: as immediates they cost a MOV per two permutes,
and as data the kernel serves NF4, FP4 and INT4 alike.

Permutes, logic and shifts issue on one pipe, at half rate, and decoding fills it. So the selectors
are shifted by multiplying: 18 instructions of that pipe for 8 values, where shifts made 21.

tests/pallas_kernels/test_ptx.py runs the PTX text itself on every input; test_layout.py proves
from Mosaic's layouts that the registers lie where the kernels expect them.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxlib.mlir import ir

from pallas_kernels.codebooks import Kind, codebook
from pallas_kernels.registers import CODES, WEIGHTS, assembly, inline, word

ROWS = WEIGHTS.reduce(1)  # one value a row of WEIGHTS: the scales

WORDS = 9  # uint32: the low bytes of the 16 values, their high bytes, and TOPS
WARPGROUP = 128  # threads
TABLE = plgpu.Layout.WG_STRIDED((WORDS * WARPGROUP,), vec_size=1)  # a lane holds every word
TOPS = 0x44444444  # a mask of the PTX: lop3 takes one immediate, and the other would cost a MOV


def table_words(kind: Kind, dtype: DTypeLike) -> np.ndarray:
    """The codebook rounded to bfloat16 or float16, and TOPS: 9 uint32, each for 128 threads."""
    values = codebook(kind).astype(dtype).view(np.uint16)
    low, high = (values & 255).astype(np.uint8), (values >> 8).astype(np.uint8)
    words = low.view(np.uint32), high.view(np.uint32), np.array([TOPS], np.uint32)
    return np.concatenate(words).repeat(WARPGROUP)


def load_table(ref, *, interpret: bool):
    """In a kernel, once before its loop: the table, for `decode`.

    Each lane reads the words from a place of its own. Known to be the same in all lanes, they would
    be kept in uniform registers, and permutes would pay moves back: 1.0 instructions a weight.
    """
    if interpret:
        return [ref[WARPGROUP * i] for i in range(WORDS)]
    return plgpu.load(ref, layout=TABLE, optimized=False)


def four_values(selector: str, top: str, first: str, second: str) -> str:
    """PTX: the values of four codes, whose 3 low bits are in `selector` and top bits in `top`."""
    return f"""
 prmt.b32 a, $9, $10, {selector}; prmt.b32 b, $11, $12, {selector}; prmt.b32 h, a, b, {top};
 prmt.b32 a, $5, $6, {selector}; prmt.b32 b, $7, $8, {selector}; prmt.b32 l, a, b, {top};
 prmt.b32 {first}, l, h, {0x4051}; prmt.b32 {second}, l, h, {0x6273};"""


def shift_right(result: str, value: str, bits: int) -> str:
    """PTX: the upper half of a product."""
    return f"mul.wide.u32 w, {value}, {1 << (32 - bits)}; mov.b64 {{u, {result}}}, w;"


# $0-$3: 8 values; $4: 4 bytes of codes, the first code of a byte in its high nibble; $5-$13: table.
PTX = f"""{{ .reg .b32 s, s1, t, t1, a, b, h, l, u; .reg .b64 w;
 and.b32 s, $4, {0x77777777}; {shift_right("s1", "s", 16)}
 {shift_right("t", "$4", 1)} and.b32 t, t, $13; or.b32 t, t, {0x32103210};
 {shift_right("t1", "t", 16)}{four_values("s", "t", "$0", "$1")}{
    four_values("s1", "t1", "$2", "$3")
} }}"""


def same_register(register: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The register map of CODES -> WEIGHTS: each register of codes becomes one of weights."""
    return [register]


def decode(packed, table, dtype: DTypeLike, *, interpret: bool):
    """codes (R, C) uint8 in CODES -> (R, 2C) of `dtype` in WEIGHTS, not yet scaled."""
    if interpret:
        return lookup_jnp(packed, table, dtype)
    return lookup_ptx(packed, table, dtype, CODES, WEIGHTS, same_register)


def lookup_jnp(packed, table, dtype: DTypeLike):
    """The twin for the interpreter; scalars and `where`, as a kernel cannot capture an array."""
    codes = jnp.stack([packed >> 4, packed & 15], -1).reshape(packed.shape[0], -1)
    bits = jnp.zeros(codes.shape, jnp.uint16)
    for code in range(16):
        word, shift = code // 4, np.uint32(8 * (code % 4))
        low, high = (table[word] >> shift) & 255, (table[word + 4] >> shift) & 255
        bits = jnp.where(codes == code, (low | high << 8).astype(jnp.uint16), bits)
    return jax.lax.bitcast_convert_type(bits, dtype)


def lookup_ptx(
    packed,
    table,
    dtype: DTypeLike,
    source,
    target,
    register_map: Callable[[tuple[int, ...]], list[tuple[int, ...]]],
):
    """packed (R, C) uint8 in layout `source` -> (R, 2C) of `dtype` in layout `target`.

    `register_map` names, for each register of codes, the register of 8 values that it becomes, or
    the four registers of 2.
    """
    shape = (packed.shape[0], 2 * packed.shape[1])

    @inline((source, TABLE), plgpu.ShapeDtypeStruct(shape, dtype, layout=target))
    def lookup(values, codes, table):
        for index, register in np.ndenumerate(codes):
            pairs, places = look_up(word(register), table, dtype), register_map(index)
            if len(places) == 1:
                values[places[0]] = mgpu.utils.vector_concat(pairs)
            else:
                for place, two in zip(places, pairs, strict=True):
                    values[place] = two

    return lookup(packed, table)


def look_up(codes, table, dtype: DTypeLike) -> list:
    """Four registers of two values from an i32 of four bytes of codes, on a lane's table."""
    two = ir.VectorType.get((2,), mgpu.utils.dtype_to_ir_type(jnp.dtype(dtype)))
    pairs = assembly(PTX, [codes, *table.flat], 4)
    return [mgpu.utils.bitcast(pair, two) for pair in pairs]
