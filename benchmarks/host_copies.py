"""Reads a compiled program's text: what moves between host memory and the GPU, and beside what.

XLA's text of a compiled program is its schedule. A copy is two lines, its start and its done, and
what stands between them runs while the copy is under way:

    %a = (... S(5) ..., u8[1,4096,7168], u32[]) fusion-start(%weights, %j, ...)      S(5): host
    %b = bf16[2048,4096] custom-call(...), custom_call_target="mosaic_gpu_v2"        a product
    %c = u8[1,4096,7168] fusion-done(%a)

A slice that is affine in its loop's counter is a memcpy on a stream of its own; it is annotated
with the bytes at which it begins and by which it moves on each turn. Without that annotation it is
a kernel, which keeps the GPU's cores busy with reading host memory. The annotation was once wrong
for loops that walk down (xla#46231): wrong gradients, and nothing said so.
"""

import dataclasses
import math
import re
from collections.abc import Iterable

COMPUTATION = re.compile(r"^(ENTRY )?%(\S+) \(.*?\{\n(.*?)^\}", re.M | re.S)
INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%(\S+) = (.*?) ([a-z][a-z-]*)\(([^)]*)\)(.*)$")
ARRAY = re.compile(r"(pred|[a-z]+\d+)\[([\d,]*)\](\{[^}]*\})?")
CALLED = re.compile(r"(?:calls|body|to_apply)=%([\w.-]+)")
TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
SLICE = re.compile(r'"dynamic_slice_config":(\{.*?\})[,}]')
OFFSET = re.compile(r'"byte_offset":"(-?\d+)","byte_stride":"(-?\d+)"')
HOST = "S(5)"

# A copy is hidden when so much of a turn's products run beside it; so many bytes have to be.
SPAN = 0.9
HIDDEN = 0.9

# They name what is in memory already.
NAMES = frozenset(("parameter", "get-tuple-element", "tuple", "bitcast", "while", "conditional"))


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation; `rest` is what follows the operands."""

    name: str
    shape: str
    operation: str
    operands: tuple[str, ...]
    rest: str


@dataclasses.dataclass(frozen=True)
class Copy:
    """What moves between host memory and the device.

    Attributes:
      entries: of what is in host memory, along its first axis.
      nbytes: of one copy.
      leaves: whether it goes to the host.
      memcpy: whether a copy engine does it, and no kernel.
      beside: how many products run between its start and its done.
      offset: bytes at which the first turn of the loop begins.
      stride: bytes by which each turn moves on.
    """

    entries: int
    nbytes: int
    leaves: bool
    memcpy: bool
    beside: int = 0
    offset: int | None = None
    stride: int | None = None

    def walks(self, first: int, step: int) -> bool:
        """Whether it is entry `first` in the first turn, and moves on by `step` entries."""
        return (self.offset, self.stride) == (first * self.nbytes, step * self.nbytes)


@dataclasses.dataclass(frozen=True)
class Body:
    """A computation that touches host memory.

    Attributes:
      trips: how often the loop turns; None outside loops, 0 where XLA does not know.
      products: of one turn: our kernels, matrix products, and loops of them as one.
      copies: in the order of their starts.
    """

    trips: int | None
    products: int
    copies: tuple[Copy, ...]

    def bytes_of(self, leaves: bool) -> int:
        """Of a turn, in one direction."""
        return sum(copy.nbytes for copy in self.copies if copy.leaves == leaves)

    def hidden(self, leaves: bool) -> float:
        """The share of these bytes that are copied beside (nearly) all products of the turn."""
        least = max(1, SPAN * self.products)
        hidden = [c for c in self.copies if c.leaves == leaves and c.beside >= least]
        return sum(copy.nbytes for copy in hidden) / max(1, self.bytes_of(leaves))


def layer_loops(found: list[Body], layers: int) -> list[Body]:
    """The loops over layers that take what they need from host memory: forward, backward."""
    return [
        body
        for body in found
        if body.trips == layers - 1 and body.products
        if any(copy.entries == layers for copy in body.copies)
    ]


def report(found: list[Body], layers: int) -> list[str]:
    """A line for each computation that touches host memory."""
    names = iter(("forward", "backward"))
    loops = layer_loops(found, layers)
    lines = []
    for body in found:
        name = next(names, "another loop") if body in loops else "a loop"
        parts = ["outside loops" if body.trips is None else f"{name} of {body.trips} turns"]
        for leaves, way in ((False, "from"), (True, "to")):
            if moved := body.bytes_of(leaves):
                share = f", {body.hidden(leaves):.0%} hidden" if body in loops else ""
                parts.append(f"{moved / 1e6:.1f} MB {way} the host{share}")
        kernels = sum(not copy.memcpy for copy in body.copies)
        parts.append(f"{kernels} of {len(body.copies)} by kernels" if kernels else "all memcpy")
        lines.append(f"{'; '.join(parts)}; {body.products} products")
    return lines


def faults(found: list[Body], layers: int, layer_bytes: int) -> list[str]:
    """A line for each reason why layers do not come from host memory as they should.

    Args:
      layers: how many there are.
      layer_bytes: of one layer's weights in host memory, on average.
    """
    loops = layer_loops(found, layers)
    if len(loops) != 2:
        return [f"{len(loops)} loops over layers in host memory, not a forward and a backward one"]
    lines = []
    for body in found:
        own = [copy for copy in body.copies if copy.entries in (layers, 2 * layers)]
        if kernels := [copy.nbytes for copy in own if not copy.memcpy]:
            where = "outside loops" if body.trips is None else f"a loop of {body.trips} turns"
            lines.append(f"{where}: {len(kernels)} kernels move {sum(kernels)} bytes")
        if body.trips is not None and body not in loops:
            lines += strayed("before the first layer", own, 0, 1)
    for name, body, first, step in (
        ("forward", loops[0], 1, 1),
        ("backward", loops[1], layers - 2, -1),
    ):
        for leaves in (False, True):
            if body.bytes_of(leaves) and (share := body.hidden(leaves)) < HIDDEN:
                lines.append(f"{name}: {share:.0%} of the bytes are copied beside the products")
        if body.bytes_of(leaves=False) < layer_bytes:
            lines.append(f"{name}: {body.bytes_of(leaves=False)} bytes a layer, not {layer_bytes}")
        lines += strayed(name, [copy for copy in body.copies if not copy.leaves], first, step)
        lines += strayed(name, [copy for copy in body.copies if copy.leaves], 0, step)
    return lines


def strayed(name: str, copies: Iterable[Copy], first: int, step: int) -> list[str]:
    """A line for each memcpy that does not go through its layers in the loop's order."""
    return [
        f"{name}: a slice of {copy.nbytes} bytes from {copy.offset} by {copy.stride}"
        for copy in copies
        if copy.memcpy and not copy.walks(first, step)
    ]


def bodies(hlo: str) -> list[Body]:
    """The computations of a compiled program that copy from or to host memory, as they run."""
    program, entry = computations(hlo)
    found = []

    def visit(name: str, trips: int | None) -> None:
        body = read(program, name, trips)
        if body.copies:
            found.append(body)
        for line in program[name]:
            if line.operation == "while":
                count = TRIPS.search(line.rest)
                visit(called(line, program), int(count[1]) if count else 0)

    visit(entry, None)
    return found


def computations(hlo: str) -> tuple[dict[str, list[Instruction]], str]:
    """Every computation's instructions by its name, and the name of the one that is run."""
    program, entry = {}, ""
    for is_entry, name, text in COMPUTATION.findall(hlo):
        program[name] = [
            Instruction(m[1], m[2], m[3], tuple(re.findall(r"%([\w.-]+)", m[4])), m[5])
            for m in map(INSTRUCTION.match, text.splitlines())
            if m
        ]
        entry = name if is_entry else entry
    return program, entry


def called(line: Instruction, program: dict) -> str:
    """The computation that an instruction calls; an empty one where it calls none."""
    name = CALLED.search(line.rest)
    return name[1] if name and name[1] in program else ""


def read(program: dict[str, list[Instruction]], name: str, trips: int | None) -> Body:
    """The copies of one computation, each with the products beside it."""
    shapes = {line.name: line.shape for line in program[name]}
    products, copies, under_way = 0, {}, {}
    for line in program[name]:
        if line.operation.endswith("-done"):
            start = under_way.pop(line.operands[0], None)
            if start is not None:
                copies[line.operands[0]] = dataclasses.replace(
                    copies[line.operands[0]], beside=products - start
                )
        elif (copy := copied(line, shapes, program)) is not None:
            copies[line.name] = copy
            if line.operation.endswith("-start"):
                under_way[line.name] = products
        products += is_product(line, program)
    return Body(trips, products, tuple(copies.values()))


def copied(line: Instruction, shapes: dict[str, str], program: dict) -> Copy | None:
    """What an instruction moves between the memories; None where it moves nothing."""
    if line.operation in NAMES or 'target="AllocateBuffer"' in line.rest:
        return None
    result = line.shape
    parts = arrays(line.shape)
    if line.operation == "copy-start":  # (what it makes, what it reads, a handle)
        result = parts[0]
    elif line.operation.endswith("-start"):  # ((what it reads), what it makes, a handle)
        result = parts[len(line.operands)]
    else:
        result = line.shape
    sources = [shapes.get(name, "") for name in line.operands]
    read = [shape for shape in sources if HOST in shape]
    leaves = HOST in result
    if not read and not leaves:
        return None
    inner = program.get(called(line, program), [])
    slices = [config for one in inner if (config := SLICE.search(one.rest))]
    offset, stride = map(int, OFFSET.findall(slices[-1][0])[-1]) if slices else (None, None)
    whole = line.operation in ("copy", "copy-start")
    moved = result if not leaves else (sources[1] if len(sources) > 1 else sources[0])
    return Copy(
        entries=int((dimensions(read[0] if read else result) or [1])[0]),
        nbytes=size(moved),
        leaves=leaves,
        memcpy=whole or bool(slices),
        offset=offset,
        stride=stride,
    )


def is_product(line: Instruction, program: dict) -> bool:
    """Whether an instruction multiplies matrices: itself, or anywhere in what it calls."""
    if line.operation == "custom-call":
        return "mosaic_gpu" in line.rest or "__cu" in line.rest  # ours, cuBLAS, cuDNN
    if line.operation == "dot":
        return True
    return any(is_product(inner, program) for inner in program.get(called(line, program), []))


def arrays(shape: str) -> list[str]:
    """The arrays of a shape that may be a tuple."""
    return [match[0] for match in ARRAY.finditer(shape)]


def dimensions(shape: str) -> list[str]:
    """The sides of an array's shape; of a scalar none."""
    return [side for side in ARRAY.search(shape)[2].split(",") if side]


def size(shape: str) -> int:
    """Bytes of an array."""
    bits = int((re.search(r"\d+", ARRAY.search(shape)[1]) or ["8"])[0])
    return bits // 8 * math.prod(map(int, dimensions(shape)))
