"""A machine in NumPy for the few PTX instructions that the kernels write by hand.

Registers are uint64 arrays, masked to their 32 bits; the last axis is the lanes of a warp where an
instruction passes data between them. What an instruction means is the PTX ISA's text, section 9.7.
"""

import re

import numpy as np

MASK = np.uint64(0xFFFFFFFF)
LANES = 32


def run(text: str, *inputs: np.ndarray, results: int) -> list[np.ndarray]:
    """Registers $0 to $results-1 after the text; the inputs (uint32 arrays) are the next ones."""
    registers = {
        f"${results + i}": array.astype(np.uint64)
        for i, array in enumerate(np.broadcast_arrays(*inputs))
    }
    for instruction in text.strip().removeprefix("{").removesuffix("}").split(";"):
        name, _, rest = instruction.strip().partition(" ")
        if not name or name.startswith(".reg"):
            continue
        target, *sources = (one.strip() for one in re.split(r",(?![^{]*})", rest))
        values = [value(source, registers) for source in sources]
        assert name in INSTRUCTIONS, f"{name}: the machine does not know this instruction"
        result = INSTRUCTIONS[name](*values)
        if target.startswith("{"):
            result = result & MASK, result >> np.uint64(32)
            targets = [one.strip() for one in target[1:-1].split(",")]
            registers.update(zip(targets, result, strict=True))
        else:
            registers[target] = result if name.startswith("mul.wide") else result & MASK
    return [registers[f"${i}"].astype(np.uint32) for i in range(results)]


def value(source: str, registers: dict) -> np.ndarray:
    """Of an operand: a register, or a number."""
    return registers[source] if source in registers else np.uint64(int(source, 0))


def prmt(a, b, selector):
    """Four of the eight bytes of a and b; with the selector's fourth bit, that byte's sign."""
    result = np.uint64(0)
    for i in range(4):
        chosen = selector >> np.uint64(4 * i) & np.uint64(7)
        word = np.where(chosen < 4, a, b)
        byte = word >> np.uint64(8) * (chosen & np.uint64(3)) & np.uint64(255)
        sign = np.where(byte >> np.uint64(7) == 1, np.uint64(255), np.uint64(0))
        byte = np.where(selector >> np.uint64(4 * i + 3) & np.uint64(1) == 1, sign, byte)
        result = result | byte << np.uint64(8 * i)
    return result


def lop3(a, b, c, table):
    """Any function of three bits: bit 4 a + 2 b + c of `table`, for each bit."""
    result = np.uint64(0)
    for i in range(8):
        if int(table) >> i & 1:
            terms = (x if i & bit else ~x for x, bit in ((a, 4), (b, 2), (c, 1)))
            result = result | np.bitwise_and.reduce(np.broadcast_arrays(*terms))
    return result


def movmatrix(a):
    """Transposes 8 by 8 values of 16 bits; lane 4 r + c holds columns 2 c and 2 c + 1 of row r."""
    assert a.shape[-1] == LANES
    halves = np.stack([a & np.uint64(0xFFFF), a >> np.uint64(16)], axis=-1)
    turned = halves.reshape(*a.shape[:-1], 8, 8).swapaxes(-1, -2).reshape(halves.shape)
    return turned[..., 0] | turned[..., 1] << np.uint64(16)


def shfl_idx(a, b, c, members):
    """The value of another lane, which b names, of the segment and up to the lane that c allows."""
    assert a.shape[-1] == LANES
    assert members == MASK, "every lane must take part"
    segment, last = int(c) >> 8 & 31, int(c) & 31
    lane = np.arange(LANES)
    asked = lane & segment | b.astype(np.int64) & 31 & ~segment
    asked = np.where(asked <= (lane & segment | last & ~segment), asked, lane)
    return np.take_along_axis(*np.broadcast_arrays(a, asked), axis=-1)


INSTRUCTIONS = {
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "shr.u32": lambda a, b: a >> b,
    "shl.b32": lambda a, b: a << b,
    "mov.b64": lambda a: a,
    "mul.wide.u32": lambda a, b: a * b,
    "prmt.b32": prmt,
    "lop3.b32": lop3,
    "shfl.sync.idx.b32": shfl_idx,
    "movmatrix.sync.aligned.m8n8.trans.b16": movmatrix,
}
