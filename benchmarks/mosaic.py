"""What the compiler says of Mosaic kernels: registers, spills, shared memory, machine code.

Compiled for a GPU that is not there (qlora_jax/memory/aot.py), so no time can be read. Needs what
`make compile-gpu` installs: nvdisasm beside the packages of the extra `compile-gpu`.
"""

import contextlib
import dataclasses
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from pallas_kernels.gpu import Gpu
from qlora_jax.memory.aot import lower


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What the compiler says of one Mosaic kernel.

    Attributes:
      registers: a thread.
      spill_bytes: a thread, stores and loads together.
      shared_bytes: a block.
      blocks: of the grid.
      threads: a block.
      tmem_columns: of tensor memory, a block.
      result: shape and dtype, such as "4096x4096xbf16".
      serialized: ptxas waits after every wgmma, because of how the accumulator is used.
      sass: the machine code, as nvdisasm prints it.
    """

    registers: int
    spill_bytes: int
    shared_bytes: int
    blocks: int
    threads: int
    tmem_columns: int
    result: str
    serialized: bool
    sass: str


LAUNCH = re.compile(
    r"gpu\.launch_func .*blocks in \(%c(\d+)\w*, %c(\d+)\w*, %c(\d+)\w*\) "
    r"threads in \(%c(\d+)\w*, .*dynamic_shared_memory_size %c(\d+)"
)
SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")


def read_kernel(resources: str, base: Path, result: str) -> Kernel:
    """The kernel that was dumped as BASE.ptxas and so on."""
    report = base.with_suffix(".ptxas").read_text()
    with base.with_suffix(".mlir-passes.log").open() as passes:  # tens of MB
        launches = (LAUNCH.search(line) for line in passes if "gpu.launch_func" in line)
        launch = next(filter(None, launches))
    x, y, z, threads, shared = map(int, launch.groups())
    return Kernel(
        registers=int(re.search(r"Used (\d+) registers", report)[1]),
        spill_bytes=spilled(report),
        shared_bytes=shared,
        blocks=x * y * z,
        threads=threads,
        tmem_columns=int(re.search(r"tmem_scratch_cols=(\d+)", resources)[1]),
        result=result,
        serialized="wgmma.mma_async instructions are serialized" in report,
        sass=base.with_suffix(".sass_ctrl").read_text(),
    )


def spilled(report: str) -> int:
    """Bytes that a thread stores and loads because registers ran out, by a report of ptxas."""
    return sum(sum(map(int, pair)) for pair in SPILLS.findall(report))


CALL = re.compile(r'@mosaic_gpu.*kernel_hash = "((?:[^"\\]|\\.)*)".*-> tensor<(\w+)>')
compiled: dict[tuple, list[Kernel]] = {}


def kernels(target: Gpu, function: Callable, *shapes) -> list[Kernel]:
    """The Mosaic kernels of `function`, in the order of its program; equal ones compile once."""
    with dumped() as folder:
        lowered = lower(target, function, *shapes)
        calls = CALL.findall(lowered.as_text())
        # Mosaic compiles, and dumps, a kernel of one hash once a process.
        key = (target.capability, *(hashed for hashed, _ in calls))
        if key not in compiled:
            lowered.compile()
            files = zip(dumps(folder, ".resources.txt"), dumps(folder, ".ptxas"), strict=True)
            compiled[key] = [
                read_kernel(resources.read_text(), report.with_suffix(""), result)
                for (resources, report), (_, result) in zip(files, calls, strict=True)
            ]
        return compiled[key]


def dumps(folder: Path, suffix: str) -> list[Path]:
    """The files of one kind, in the order in which they were made: kernel_9, kernel_10.

    What lowering writes and what compiling writes is numbered apart.
    """
    paths = folder.glob(f"*{suffix}")
    return sorted(paths, key=lambda path: int(path.name.split(".")[0].rpartition("_")[2]))


@contextlib.contextmanager
def dumped() -> Iterator[Path]:
    """Within it Mosaic writes all that it compiles to a folder, which is removed afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MOSAIC_GPU_DUMP_TO"] = folder
        try:
            yield Path(folder)
        finally:
            del os.environ["MOSAIC_GPU_DUMP_TO"]
