"""Reads machine code (SASS): the loop that decodes weights, and what an iteration of it costs.

A loop is found as compilers define it: a jump back to a block that every path to the jump has
passed, and all blocks on the way from there to the jump. Jumps alone do not tell: ptxas moves
waiting loops to the end of a kernel, and their way back into the middle of a loop looks like one.
What it moved there is rarely run, and not counted; nor are loops inside a loop.
"""

import collections
import dataclasses
import functools
import math
import re

LABEL = re.compile(r"^(\.L\w+):")
INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;/]*)")
TARGET = re.compile(r"\((\.L\w+)\)")

# These issue for half of a warp's lanes a clock, all others for a whole warp (CUDA programming
# guide, throughput of native arithmetic instructions; PRMT, LOP3 and SHF at half is an assumption).
HALF_RATE = frozenset(
    ("PRMT", "LOP3", "SHF", "SHL", "SHR", "LEA", "ISETP", "FSETP", "PLOP3", "FMNMX", "IMNMX")
    + ("SEL", "FSEL", "IADD3", "VIADD", "VIMNMX", "VIADDMNMX", "I2F", "F2F", "F2FP")
)
MATRIX = frozenset(("HMMA", "IMMA", "QMMA", "HGMMA", "QGMMA", "UTCHMMA", "UTCQMMA", "UTCOMMA"))
# decode.py ends with one permute for every two weights that has one of these as an immediate.
LAST_PERMUTES = ("0x4051", "0x6273")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of SASS: predicate, such as `!P1`; operation without suffixes; its operands."""

    predicate: str | None
    name: str
    operands: str

    @property
    def operation(self) -> str:
        return self.name.split(".")[0]

    @property
    def ends_block(self) -> bool:
        return self.operation in ("BRA", "BRX", "EXIT", "RET")

    @property
    def always_leaves(self) -> bool:
        """Whether nothing that follows is reached: no condition before, nor as first operand."""
        conditional = self.predicate or re.match(r"[!~]?U?[PR]\w+,", self.operands)
        return self.ends_block and not conditional

    @property
    def weights(self) -> int:
        """Decoded by it: 2 if it is the permute that completes two."""
        last = any(word in self.operands for word in LAST_PERMUTES)
        return 2 * (self.operation == "PRMT" and last)


@dataclasses.dataclass(frozen=True)
class Block:
    """Instructions that run one after the other: first, last (both counted), and where next."""

    first: int
    last: int
    next: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Loop:
    """One loop: its instructions in order, loops inside it left out."""

    instructions: tuple[Instruction, ...]

    @functools.cached_property
    def counts(self) -> collections.Counter[str]:
        """By operation, suffixes cut off."""
        return collections.Counter(each.operation for each in self.instructions)

    @property
    def half_rate(self) -> int:
        return sum(self.counts[name] for name in HALF_RATE)

    @property
    def matrix(self) -> int:
        return sum(self.counts[name] for name in MATRIX)

    @property
    def multiply_adds(self) -> int:
        """That a warp asks of the tensor cores in an iteration; tcgen05's size is not in its name.

        A warpgroup's wgmma is counted as a quarter for each of its four warps.
        """
        return sum(multiply_adds(each.name) for each in self.instructions)

    @property
    def weights(self) -> int:
        """Decoded by a thread in an iteration."""
        return sum(each.weights for each in self.instructions)


def multiply_adds(name: str) -> int:
    """Of one instruction of a warp: HMMA.16816.F32.BF16 or HGMMA.64x128x16.F32.BF16."""
    if found := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", name):
        return math.prod(map(int, found.groups())) // 4
    found = re.match(r"HMMA\.(16)(8)(8|16)\b", name)
    return math.prod(map(int, found.groups())) if found else 0


def parse(sass: str) -> tuple[list[Instruction], dict[str, int]]:
    """(instructions, labels): a label is the place of the instruction that follows it."""
    instructions, labels = [], {}
    for line in sass.splitlines():
        if label := LABEL.match(line.strip()):
            labels[label[1]] = len(instructions)
        elif found := INSTRUCTION.search(line):
            instructions.append(Instruction(*found.groups()))
    return instructions, labels


def blocks(instructions: list[Instruction], labels: dict[str, int]) -> list[Block]:
    """The straight pieces of the code. BRA.DIV, for warps that have diverged, is never taken."""
    ends = {i for i, each in enumerate(instructions) if each.ends_block}
    starts = sorted(({0, *labels.values(), *(i + 1 for i in ends)}) & set(range(len(instructions))))
    number = {start: n for n, start in enumerate(starts)}
    result = []
    for n, start in enumerate(starts):
        last = (starts[n + 1] if n + 1 < len(starts) else len(instructions)) - 1
        end, after = instructions[last], []
        if not end.always_leaves and n + 1 < len(starts):
            after.append(n + 1)
        target = TARGET.search(end.operands) if end.operation == "BRA" else None
        if target and not end.name.startswith("BRA.DIV"):
            after.append(number[labels[target[1]]])
        result.append(Block(start, last, tuple(after)))
    return result


def predecessors(code: list[Block]) -> list[list[int]]:
    """For each block, those that go on to it."""
    before = [[] for _ in code]
    for n, block in enumerate(code):
        for after in block.next:
            before[after].append(n)
    return before


def dominators(code: list[Block]) -> list[set[int]]:
    """For each block, those that every path to it passes, and itself; none if it is dead."""
    before, everything = predecessors(code), set(range(len(code)))
    result, changed = [{0}, *(everything for _ in code[1:])], True
    while changed:
        changed = False
        for n in range(1, len(code)):
            paths = [result[m] for m in before[n] if result[m] is not everything]
            passed = {n} | set.intersection(*paths) if paths else everything
            changed, result[n] = changed or passed != result[n], passed
    return [set() if passed is everything else passed for passed in result]


def loop_blocks(code: list[Block]) -> dict[int, set[int]]:
    """The blocks of each loop by its head; outer loops have those of inner ones too."""
    before, passed = predecessors(code), dominators(code)
    found = {}
    for n, block in enumerate(code):
        for head in passed[n].intersection(block.next):
            inside, todo = found.setdefault(head, {head}), [n]
            while todo:
                if (m := todo.pop()) not in inside:
                    inside.add(m)
                    todo += before[m]
    return dict(sorted(found.items()))


def loops(sass: str) -> list[Loop]:
    """The loops of a kernel, in the order of their heads."""
    instructions, labels = parse(sass)
    code = blocks(instructions, labels)
    found = loop_blocks(code)

    def own(head, loop):
        inner = set().union(*(other for other in found.values() if other < loop))
        end = max(n for n in loop if head in code[n].next)
        return [
            instructions[i]
            for n in sorted(loop - inner)
            if n <= end
            for i in range(code[n].first, code[n].last + 1)
        ]

    return [Loop(tuple(own(head, loop))) for head, loop in found.items()]


def main_loop(sass: str) -> Loop | None:
    """The loop that decodes the most weights in an iteration, in the fewest instructions.

    A loop that ptxas unrolled whole is what lies between the first load from shared memory and
    the last product. None if nothing is decoded.
    """
    decoding = [loop for loop in loops(sass) if loop.weights]
    if decoding:
        return max(decoding, key=lambda loop: (loop.weights, -len(loop.instructions)))
    code = parse(sass)[0]
    if not any(each.weights for each in code):
        return None
    first = next(i for i, each in enumerate(code) if each.operation in ("LDS", "LDSM"))
    last = max(i for i, each in enumerate(code) if each.weights or each.operation in MATRIX)
    return Loop(tuple(code[first : last + 1]))
