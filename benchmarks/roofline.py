"""The time that a kernel cannot be faster than, on paper: nothing was run.

The longest of what must happen, if all of it overlaps:

    tensor    multiply-adds of whole tiles at the peak rate
    issue     instructions of the main loop, from the compiled code: 4 a clock and SM
    half      those of them that issue at half rate (sass.HALF_RATE): 2 a clock and SM
    memory    codes, scales (as float32), x and y cross device memory once
    l2        partial tiles are written and read once, if they fit into the L2 cache; if not, they
              are counted as memory

The first three are those of the SM with the most steps, in the division of work that was compiled
(nf4_matmul/work.py made it), and the time to fill and drain the pipeline for every wave of blocks.

Left out, so that a GPU will be slower: shared memory's bandwidth and conflicts, latencies that
nothing hides, launches, clocks below boost, re-reading what the L2 cache lost, that partial tiles
are summed only when the last is there (half of `l2` does not overlap with the rest), and the
expansion of double-quantized scales by XLA (reads 1/64 byte a weight and writes 1/16, once a call:
a seventh of the bytes of the codes). bf16 is compared at its own ideal, which no library reaches.
"""

import dataclasses

from pallas_kernels.gpu import Gpu

# Clocks a wave, estimates: copies of the first step arrive, and the last tile is written.
FILL, FILL_FEW_ROWS = 3000, 1000
FEW_ROWS = 16  # a tile has hardly anything to write
COLUMNS = 128  # of y in a tile: n is rounded up to them
# Bytes a clock of the L2 cache: 5120 on A100 (its whitepaper) and H100 (table 3 of PMC10448217);
# Blackwell is taken to be no worse. On an RTX 4090 about 5 TB/s were measured (chipsandcheese.com,
# Microbenchmarking Nvidia's RTX 4090).
L2_BYTES = {(8, 0): 5120, (8, 9): 2048, (9, 0): 5120, (10, 0): 5120}

# Of the peak, what `mma` of one warp reaches where the peak is that of wgmma or tcgen05: 0.63 on
# Hopper (Luo and others 2024, arXiv 2402.13499); Blackwell's is taken to be no faster than that.
WARP_MMA = {(9, 0): 0.63, (10, 0): 0.34}


@dataclasses.dataclass(frozen=True)
class Code:
    """What was compiled, as the roofline needs it.

    Attributes:
      instructions: of the main loop, for each weight that a thread decodes.
      half_rate: those of them that issue at half rate.
      weights: that a block decodes in an iteration, a step.
      rows: of x in a tile: products that a decoded weight is used for.
      blocks: of the grid.
      resident: blocks that one SM holds at a time.
      warp_mma: it multiplies by `mma`, not by wgmma or tcgen05.
      partial_bytes: of partial tiles that the kernel writes in float32; 0 when it writes y.
    """

    instructions: float
    half_rate: float
    weights: int
    rows: int
    blocks: int
    resident: int
    warp_mma: bool
    partial_bytes: int


@dataclasses.dataclass(frozen=True)
class Bound:
    """Seconds that each resource is busy for."""

    tensor: float
    issue: float
    half: float
    memory: float
    l2: float

    @property
    def seconds(self) -> float:
        return max(dataclasses.astuple(self))

    @property
    def limit(self) -> str:
        """The name of the longest."""
        return max(dataclasses.asdict(self).items(), key=lambda item: item[1])[0]


def ideal_bf16(gpu: Gpu, m: int, n: int, k: int) -> float:
    """Seconds of x W^T in bfloat16 at the GPU's peaks, whichever takes longer."""
    return max(2 * m * n * k / gpu.flops, 2 * (n * k + m * k + m * n) / gpu.bandwidth)


def resident_blocks(gpu: Gpu, registers: int, threads: int, shared_bytes: int) -> int:
    """Blocks that one SM holds at a time; CUDA keeps 1 KB of shared memory for itself a block."""
    most_threads = 1536 if gpu.capability == (8, 9) else 2048
    return max(
        1,
        min(
            gpu.shared_bytes_sm // (shared_bytes + 1024),
            65536 // (registers * threads),
            most_threads // threads,
        ),
    )


def bound(gpu: Gpu, code: Code, m: int, n: int, k: int) -> Bound:
    """What one product of m rows takes: n columns of y, k contracted."""
    fma = gpu.flops / 2 / gpu.sms / gpu.clock  # a clock and SM
    fma *= WARP_MMA.get(gpu.capability, 1) if code.warp_mma else 1
    warps = code.weights / 32
    whole = ceil(m, code.rows) * ceil(ceil(n, COLUMNS) * COLUMNS * k, code.weights)
    # Of the block with the most, and of the SM with the most blocks.
    steps = ceil(whole, code.blocks) * ceil(code.blocks, gpu.sms)
    waves = ceil(code.blocks, gpu.sms * code.resident)
    fill = waves * (FILL_FEW_ROWS if code.rows <= FEW_ROWS else FILL)

    def seconds(clocks: float) -> float:
        return (steps * clocks + fill) / gpu.clock

    fits = code.partial_bytes <= gpu.l2_bytes
    partial = 2 * code.partial_bytes
    moved = n * k * (1 / 2 + 4 / 64) + 2 * m * (n + k)
    return Bound(
        tensor=seconds(code.rows * code.weights / fma),
        issue=seconds(warps * code.instructions / 4),
        half=seconds(warps * code.half_rate / 2),
        memory=(moved + (0 if fits else partial)) / gpu.bandwidth,
        l2=(partial if fits else 0) / (L2_BYTES[gpu.capability] * gpu.clock),
    )


def dequantize(gpu: Gpu, instructions: float, n: int, k: int) -> float:
    """Seconds of writing a matrix in bfloat16: memory's, or those of instructions a weight.

    Each weight is fetched by a shuffle, of which an SM does one for 32 lanes a clock.
    """
    moved = n * k * (1 / 2 + 4 / 64 + 2)
    clocks = n * k / 32 * max(instructions / 4, 1) / gpu.sms
    return max(moved / gpu.bandwidth, clocks / gpu.clock)


def ceil(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)
