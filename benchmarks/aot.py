"""Compiles a function for a GPU that is not there, down to machine code.

XLA takes a description of the GPU in place of the device, so registers, spills, shared memory and
XLA's temporaries are the compiler's own figures. No time can be read this way: nothing is run.

Needs jax's CUDA plugin, ptxas and libdevice (`make compile-gpu` installs them), and no driver.
"""

import contextlib
import dataclasses
import functools
import os
import re
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
from jax.experimental import topologies

from pallas_kernels import gpu
from pallas_kernels.gpu import Gpu

# Where pip puts ptxas and nvdisasm.
TOOLS = Path(sysconfig.get_path("purelib"), "nvidia", "cu13", "bin")

# The fields that XLA's GpuTargetConfigProto wants. It uses them as limits, and in its cost model.
DESCRIPTION = """gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {shared_sm}
  shared_memory_per_block_optin: {shared}
  threads_per_core_limit: {threads}
  core_count: {sms}
  fpus_per_core: {fpus}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  memory_bandwidth: {bandwidth}
  l2_cache_size: {l2}
  clock_rate_ghz: {clock}
  device_memory_size: {memory}
  cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {features} }}
  device_vendor: "NVIDIA Corporation"
  name: "{name}"
  driver_version: "13.0.0"
  runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.12.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 12 patch: 0 }}
device_description_str: "{name}"
"""


def description(target: Gpu) -> str:
    """The text of XLA's GpuTargetConfigProto for a GPU."""
    major, minor = target.capability
    return DESCRIPTION.format(
        name=target.name,
        major=major,
        minor=minor,
        # wgmma and tcgen05 exist only in the sm_90a and sm_100a variants.
        features="ACCELERATED_FEATURES" if major >= 9 else "NONE",
        shared=target.shared_bytes,
        shared_sm=target.shared_bytes_sm,
        sms=target.sms,
        # CUDA programming guide, table of compute capabilities.
        threads=1536 if target.capability in ((8, 6), (8, 9), (12, 0)) else 2048,
        fpus=64 if target.capability == (8, 0) else 128,
        bandwidth=int(target.bandwidth),
        l2=target.l2_bytes,
        clock=target.clock / 1e9,
        memory=target.memory,
    )


@dataclasses.dataclass(frozen=True, repr=False)
class Device(jax.sharding.AbstractDevice):
    """An abstract device that tells its capability; without it Mosaic lowers for 9.0."""

    compute_capability: str = ""  # read by jax with getattr, as is the next
    shared_memory_per_block_optin: int = 0


@functools.cache
def load_plugin() -> None:
    """Registers the CUDA plugin; without a GPU jax reports that it found none, and goes on.

    Raises:
      RuntimeError: the packages of `make compile-gpu` are not installed.
    """
    if not (TOOLS / "ptxas").exists():
        raise RuntimeError(f"there is no {TOOLS}/ptxas: use the environment of `make compile-gpu`")
    # A ptxas of another CUDA, in PATH or in /usr/local/cuda, would be taken before pip's.
    os.environ["PATH"] = f"{TOOLS}{os.pathsep}{os.environ['PATH']}"
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    jax.config.update("jax_platforms", None)  # `cpu` would leave the plugin unloaded
    with contextlib.suppress(RuntimeError):
        jax.devices()


@functools.cache
def meshes(target: Gpu) -> tuple[jax.sharding.Mesh, jax.sharding.AbstractMesh]:
    """One device of the kind, as XLA's compiler and as jax's lowering want it."""
    load_plugin()
    topology = topologies.get_topology_desc(
        platform="cuda",
        topology_name="",
        target_config=description(target),
        topology="1x1x1",
    )
    device = Device(
        device_kind=target.name,
        num_cores=target.sms,
        platform="gpu",
        compute_capability="{}.{}".format(*target.capability),
        shared_memory_per_block_optin=target.shared_bytes,
    )
    return (
        jax.sharding.Mesh(np.array(topology.devices), ("x",)),
        jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device),
    )


def lower(target: Gpu, function: Callable, *shapes, **jit) -> jax.stages.Lowered:
    """`function` of arrays like `shapes` (trees of ShapeDtypeStruct), lowered for the GPU."""
    mesh, abstract = meshes(target)
    here = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    with jax.sharding.use_abstract_mesh(abstract), gpu.pretend(target, interpret=False):
        jitted = jax.jit(function, in_shardings=here, out_shardings=here, **jit)
        return jitted.trace(*shapes).lower(lowering_platforms=("cuda",))


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
