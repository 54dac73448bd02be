"""Compiles a program for a GPU that is not there, and reads how much memory it takes.

    lowered = lower(KNOWN["rtx4090"], function, params, weights)     shapes, some in host memory
    sizes(lowered.compile())

XLA takes a description of the GPU in place of the device, so what it says of memory is the
compiler's own figure. No time can be read this way: nothing is run. Needs jax's CUDA plugin, ptxas
and libdevice (the extra `compile-gpu`), and no driver.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import os
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from pallas_kernels import gpu
from pallas_kernels.gpu import Gpu
from qlora_jax.errors import InputError
from qlora_jax.placement import HOST

PLUGIN = "jax_cuda13_plugin"
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


class HostSharding(NamedSharding):
    """On a device that is not there, in pinned host memory.

    Such a device has no memories, and NamedSharding then forgets the kind that it was given.
    """

    memory_kind = property(lambda self: HOST)

    # Its own, or jit's caches take it for the sharding of the same mesh on the device.
    def __hash__(self) -> int:
        return hash((HOST, self.mesh, self.spec))

    def __eq__(self, other: object) -> bool:
        return type(other) is HostSharding and (other.mesh, other.spec) == (self.mesh, self.spec)


@functools.cache
def load_plugin() -> None:
    """Registers the CUDA plugin; without a GPU jax reports that it found none, and goes on.

    Call it before anything asks jax for its devices.

    Raises:
      InputError: AOT-PLUGIN, the packages of the extra `compile-gpu` are not installed.
    """
    lacking = [] if importlib.util.find_spec(PLUGIN) else ["jax's CUDA plugin"]
    if not (TOOLS / "ptxas").exists():
        lacking.append("ptxas")
    if lacking:
        raise InputError(
            "AOT-PLUGIN",
            "compiling for a GPU that is not there",
            f"{' and '.join(lacking)} cannot be found",
            "the packages of the extra compile-gpu, for CUDA 13",
            "pip install 'qlora-jax[compile-gpu]'",
        )
    # A ptxas of another CUDA, in PATH or in /usr/local/cuda, would be taken before pip's.
    os.environ["PATH"] = f"{TOOLS}{os.pathsep}{os.environ['PATH']}"
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    jax.config.update("jax_platforms", None)  # `cpu` would leave the plugin unloaded
    with contextlib.suppress(RuntimeError):
        jax.devices()


@functools.cache
def meshes(target: Gpu) -> tuple[Mesh, AbstractMesh]:
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
        Mesh(np.array(topology.devices), ("x",)),
        # As Mesh has it; with the default, arrays in host memory are refused as of another mesh.
        AbstractMesh((1,), ("x",), (AxisType.Auto,), abstract_device=device),
    )


def lower(target: Gpu, function: Callable, *shapes: Any, **jit: Any) -> jax.stages.Lowered:
    """`function` of arrays like `shapes`, lowered for the GPU; its results are on the device.

    Args:
      shapes: trees of ShapeDtypeStruct; those whose sharding is of pinned host memory, on whatever
        device, are in the host's, and all others on the GPU.
      jit: options of `jax.jit`.
    """
    mesh, abstract = meshes(target)
    here, there = (kind(mesh, PartitionSpec()) for kind in (NamedSharding, HostSharding))

    def placed(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        host = leaf.sharding is not None and leaf.sharding.memory_kind == HOST
        # The types of what is traced say where it is only if the shapes do.
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=there if host else here)

    shapes = jax.tree.map(placed, shapes)
    where = jax.tree.map(lambda leaf: leaf.sharding, shapes)
    with jax.sharding.use_abstract_mesh(abstract), gpu.pretend(target, interpret=False):
        jitted = jax.jit(function, in_shardings=where, out_shardings=here, **jit)
        return jitted.trace(*shapes).lower(lowering_platforms=("cuda",))


class Sizes(NamedTuple):
    """Bytes that a program takes, by XLA's analysis; a `host_` figure is of pinned host memory.

    Attributes:
      argument: what it is given.
      output: what it returns.
      alias: of both, counted twice: results that take the memory of a donated argument.
      temp: what it needs while it runs.
    """

    argument: int = 0
    output: int = 0
    alias: int = 0
    temp: int = 0
    host_argument: int = 0
    host_output: int = 0
    host_alias: int = 0
    host_temp: int = 0

    @property
    def device(self) -> int:
        """The most on the device at once: everything that the program reads, writes and needs."""
        return self.argument + self.output - self.alias + self.temp

    @property
    def host(self) -> int:
        """The same in pinned host memory."""
        return self.host_argument + self.host_output - self.host_alias + self.host_temp


def sizes(compiled: jax.stages.Compiled) -> Sizes:
    """What XLA says of a compiled program's memory; on a CPU host memory counts as the device's."""
    analysis = compiled.memory_analysis()
    return Sizes(*(getattr(analysis, f"{name}_size_in_bytes") for name in Sizes._fields))
