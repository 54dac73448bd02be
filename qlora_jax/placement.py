"""Where an array lives (device or pinned host memory) and how it gets there.

JAX names the kinds of memory that a device can address: `device` is its own, `pinned_host` is the
host's, which a GPU copies from and to on its own while it computes. On a CPU both are the same RAM:
the kinds are kept, so that programs behave alike, but nothing is saved.
"""

import functools
from typing import Any

import jax

from qlora_jax.errors import InputError

DEVICE = "device"
HOST = "pinned_host"

# How a GPU's program that copies from host memory is compiled: without it XLA waits for each copy
# where it starts.
OVERLAP = {"xla_gpu_enable_latency_hiding_scheduler": True}


def memory_kind(array: jax.Array) -> str:
    """The kind of memory that `array` lives in: `device` or `pinned_host`."""
    return array.sharding.memory_kind


def memory_kinds(device: jax.Device | None = None) -> tuple[str, ...]:
    """The kinds of memory that `device` (default: the first) can address."""
    return kinds_of(device or jax.devices()[0])


@functools.cache
def kinds_of(device: jax.Device) -> tuple[str, ...]:
    """Asked once a device, and not for every array that moves."""
    return tuple(memory.kind for memory in device.addressable_memories())


def has_host_memory(device: jax.Device | None = None) -> bool:
    """Whether arrays can live in pinned host memory here."""
    return HOST in memory_kinds(device)


def to_host(tree: Any) -> Any:
    """`tree` with every array in pinned host memory, sharded over devices as before.

    Raises:
      InputError: the backend has no pinned host memory.
    """
    return jax.tree.map(lambda leaf: moved(leaf, HOST), tree)


def to_device(tree: Any) -> Any:
    """`tree` with every array in device memory; NumPy arrays go to the first device.

    The arrays are committed: a program traced with one of them is not traced again for the next.
    """
    return jax.tree.map(lambda leaf: moved(leaf, DEVICE), tree)


def moved(leaf: Any, kind: str) -> jax.Array:
    """`leaf` in memory of this kind; the copy may still be under way when this returns."""
    sharding = getattr(leaf, "sharding", None)
    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    device = min(sharding.device_set, key=lambda device: device.id)
    if kind not in memory_kinds(device):
        raise InputError(
            "MEM-KIND",
            f"device {device}",
            f"has no memory of kind {kind}",
            f"one of {', '.join(memory_kinds(device))}",
            "optim_memory=device",
        )
    return jax.device_put(leaf, sharding.with_memory_kind(kind))


def in_host(tree: Any) -> bool:
    """Whether any array of `tree`, traced or not, lives in host memory: its type says so."""
    spaces = (jax.typeof(leaf).memory_space for leaf in jax.tree.leaves(tree))
    return any(space is jax.memory.Space.Host for space in spaces)


def fetched(tree: Any) -> Any:
    """`tree` in device memory, inside a program: a copy of what is in host memory, or itself."""
    return jax.device_put(tree, jax.memory.Space.Device)


def kept_in_host(tree: Any) -> Any:
    """`tree` in host memory, inside a program."""
    return jax.device_put(tree, jax.memory.Space.Host)


def total_device_bytes(device: jax.Device | None = None) -> int | None:
    """What JAX may allocate on `device`, in bytes; None where the backend does not say (a CPU)."""
    return memory_stat(device, "bytes_limit")


def free_device_bytes(device: jax.Device | None = None) -> int | None:
    """What JAX may still allocate on `device`, in bytes; None where the backend does not say."""
    limit, used = memory_stat(device, "bytes_limit"), memory_stat(device, "bytes_in_use")
    return None if limit is None or used is None else max(0, limit - used)


def passing_device_bytes(device: jax.Device | None = None) -> int | None:
    """The peak so far without what is still there, in bytes; None where the backend keeps none."""
    peak, used = memory_stat(device, "peak_bytes_in_use"), memory_stat(device, "bytes_in_use")
    return None if peak is None or used is None else peak - used


def peak_device_bytes(device: jax.Device | None = None) -> int | None:
    """The most that was allocated on `device` at once, in bytes; None where it is not counted."""
    return memory_stat(device, "peak_bytes_in_use")


def memory_stat(device: jax.Device | None, name: str) -> int | None:
    """One figure of the backend's allocator; None where it keeps none."""
    device = device or jax.local_devices()[0]
    return (device.memory_stats() or {}).get(name)
