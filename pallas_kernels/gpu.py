"""What a GPU offers: this machine's, or a described one that kernels are built for.

Kernels ask `here()` and never the device itself, so that one process can lower for GPUs that are
not there: the tests interpret on a CPU, and benchmarks/compile_gpu.py compiles down to SASS.
"""

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator

import jax

from pallas_kernels.backends import Unsupported


@dataclasses.dataclass(frozen=True)
class Gpu:
    """The limits and peaks of one GPU; peaks are the vendor's figures, for the paper roofline.

    Attributes:
      name: as CUDA reports it.
      capability: compute capability, (9, 0) for Hopper.
      sms: streaming multiprocessors.
      shared_bytes: the most shared memory that one block may ask for.
      shared_bytes_sm: shared memory of one SM.
      bandwidth: of device memory, bytes a second.
      flops: dense bfloat16 with float32 accumulation, a second.
      clock: boost clock in Hz.
      l2_bytes: of the second-level cache.
      memory: device memory in bytes.
    """

    name: str
    capability: tuple[int, int]
    sms: int
    shared_bytes: int
    shared_bytes_sm: int
    bandwidth: float
    flops: float
    clock: float
    l2_bytes: int
    memory: int


def known(name, capability, sms, shared, shared_sm, bandwidth, flops, clock, l2, memory) -> Gpu:
    """A row of the table below: shared memory in KiB, L2 in MiB, memory in GB, the rest scaled."""
    return Gpu(
        name,
        capability,
        sms,
        shared << 10,
        shared_sm << 10,
        bandwidth * 1e12,
        flops * 1e12,
        clock * 1e9,
        l2 << 20,
        int(memory * 1e9),
    )


# Sources: NVIDIA's data sheets and architecture whitepapers of each GPU; shared memory from the
# CUDA programming guide's table of compute capabilities. TB/s, TFLOP/s, GHz.
KNOWN = {
    "a100": known("NVIDIA A100-SXM4-80GB", (8, 0), 108, 163, 164, 2.039, 312, 1.41, 40, 85.05),
    "rtx4090": known(
        "NVIDIA GeForce RTX 4090", (8, 9), 128, 99, 100, 1.008, 165.2, 2.52, 72, 25.39
    ),
    "h100": known("NVIDIA H100 80GB HBM3", (9, 0), 132, 227, 228, 3.35, 989, 1.755, 50, 85.05),
    "h200": known("NVIDIA H200", (9, 0), 132, 227, 228, 4.8, 989, 1.755, 50, 150.1),
    "b200": known("NVIDIA B200", (10, 0), 148, 227, 228, 8.0, 2250, 1.965, 126, 191.0),
}
# (shared_bytes, shared_bytes_sm) in KiB by capability, for a GPU that the table above lacks.
SHARED = {(8, 0): (163, 164), (8, 6): (99, 100), (8, 9): (99, 100), (9, 0): (227, 228)}
SHARED |= {(10, 0): (227, 228), (10, 3): (227, 228), (12, 0): (99, 100)}

# With `mma` and cp.async, which later ones have kept.
FROM_AMPERE = (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0)


@dataclasses.dataclass(frozen=True)
class Target:
    """The GPU that kernels are built for, and whether the CPU interprets them."""

    gpu: Gpu
    interpret: bool


pretended: contextvars.ContextVar[Target | None] = contextvars.ContextVar("target", default=None)


@contextlib.contextmanager
def pretend(gpu: Gpu, *, interpret: bool) -> Iterator[None]:
    """Within it kernels are built for `gpu`: interpreted here, or lowered for its absent self.

    Functions traced before keep what they chose then: trace what you test inside.
    """
    token = pretended.set(Target(gpu, interpret))
    try:
        yield
    finally:
        pretended.reset(token)


def here() -> Target | None:
    """The pretended target, or this machine's first GPU, or None on another platform."""
    if (target := pretended.get()) is not None:
        return target
    if jax.default_backend() not in ("gpu", "cuda"):
        return None
    return Target(described(jax.devices()[0]), interpret=False)


def described(device: jax.Device) -> Gpu:
    """The row of KNOWN that bears the device's name, or its limits with the peaks left at 0."""
    for gpu in KNOWN.values():
        if gpu.name == device.device_kind:
            return gpu
    major, minor = (int(part) for part in str(device.compute_capability).split("."))
    shared = SHARED.get((major, minor), (48, 48))
    return known(device.device_kind, (major, minor), device.core_count, *shared, 0, 0, 0, 0, 0)


def require(*capabilities: tuple[int, int]) -> Target:
    """The target, if its capability is among these; Unsupported otherwise, with what is there.

    Without capabilities any GPU will do.
    """
    if (target := here()) is None:
        raise Unsupported(f"the default device is a {jax.default_backend()}, not a GPU")
    wanted = " or ".join(f"{major}.{minor}" for major, minor in capabilities)
    if capabilities and target.gpu.capability not in capabilities:
        major, minor = target.gpu.capability
        raise Unsupported(f"{target.gpu.name} has capability {major}.{minor}, not {wanted}")
    return target
