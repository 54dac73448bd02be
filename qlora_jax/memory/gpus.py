"""GPUs by name, and sizes such as 24GB: how much memory programs get, how fast it is all moved.

    total       as CUDA reports it: less than what is printed on the box
    programs    total * XLA_CLIENT_MEM_FRACTION, by default 0.75 of it, and no more than leaves
                CONTEXT bytes for the driver, CUDA's context and its libraries
    link        PCI Express between host and device; what copies reach is LINK_SHARE of its rate

The GPUs that kernels are compiled and judged for are pallas_kernels.gpu.KNOWN; here are others, and
the link of each.
"""

import dataclasses
import os
import re

from pallas_kernels.gpu import KNOWN, SHARED, Gpu, known
from qlora_jax.errors import InputError, nearest

CONTEXT = 600_000_000  # CUDA's context, cuBLAS's and cuDNN's handles: 0.4 to 0.6 GB (nvidia-smi)
XLA_SHARE = 0.75  # what XLA takes of a GPU unless it is told
# docs.jax.dev, GPU memory allocation; the second is the older name of the first.
SHARE_VARIABLES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
PINNED_LIMIT = 64 << 30  # XLA's pool of pinned host memory, unless it is told
PINNED_VARIABLE = "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"

LANES_16 = {3: 15.75e9, 4: 31.5e9, 5: 63.0e9}  # bytes a second each way, by generation
# An assumption: what large copies from pinned memory are reported to reach, about 25 of 31.5 GB/s.
LINK_SHARE = 0.8


def row(name, capability, sms, bandwidth, flops, clock, l2, memory) -> Gpu:
    """A row as those of KNOWN, with the shared memory of its capability."""
    shared = SHARED.get(capability, (48, 64))
    return known(name, capability, sms, *shared, bandwidth, flops, clock, l2, memory)


# Sources: NVIDIA's data sheets and architecture whitepapers (GeForce: dense, float32 accumulation,
# half of the figure with float16 accumulation); memory as CUDA reports it, rounded down. A T4 has
# no bfloat16: its products run in float32.
OTHERS = {
    "t4": row("Tesla T4", (7, 5), 40, 0.32, 8.1, 1.59, 4, 15.6),
    "rtx3060-12gb": row("NVIDIA GeForce RTX 3060", (8, 6), 28, 0.36, 25.5, 1.777, 3, 12.6),
    "rtx3090": row("NVIDIA GeForce RTX 3090", (8, 6), 82, 0.936, 71.0, 1.695, 6, 25.4),
    "a10g": row("NVIDIA A10G", (8, 6), 80, 0.6, 70.0, 1.71, 6, 23.6),
    "a100-40gb": row("NVIDIA A100-SXM4-40GB", (8, 0), 108, 1.555, 312.0, 1.41, 40, 42.3),
    "rtx4060": row("NVIDIA GeForce RTX 4060", (8, 9), 24, 0.272, 30.2, 2.46, 24, 8.1),
    "rtx4060ti-16gb": row("NVIDIA GeForce RTX 4060 Ti", (8, 9), 34, 0.288, 44.1, 2.535, 32, 16.7),
    "rtx4070": row("NVIDIA GeForce RTX 4070", (8, 9), 46, 0.504, 58.3, 2.475, 36, 12.4),
    "rtx4080": row("NVIDIA GeForce RTX 4080", (8, 9), 76, 0.717, 97.5, 2.505, 64, 16.7),
    "l4": row("NVIDIA L4", (8, 9), 58, 0.3, 121.0, 2.04, 48, 23.6),
    "l40s": row("NVIDIA L40S", (8, 9), 142, 0.864, 362.0, 2.52, 96, 47.6),
    "rtx5090": row("NVIDIA GeForce RTX 5090", (12, 0), 170, 1.792, 209.5, 2.407, 96, 33.6),
}
GPUS = {**OTHERS, "a100-80gb": KNOWN["a100"], **KNOWN}
# (generation, lanes) of PCI Express; 4.0 x16 where nothing is said.
LINKS = {"t4": (3, 16), "rtx4060": (4, 8), "rtx4060ti-16gb": (4, 8)}
LINKS |= dict.fromkeys(("rtx5090", "h100", "h200", "b200"), (5, 16))

UNITS = {"kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12}
UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
SIZE = re.compile(r"(\d{1,12}(?:\.\d{1,12})?)\s*([a-z]*)", re.ASCII)


@dataclasses.dataclass(frozen=True)
class Card:
    """A GPU, or a size, as the planner sees it.

    Attributes:
      name: for people.
      memory: bytes that programs get.
      how: in words, how that was computed.
      gpu: the GPU whose programs are looked at; for a size, one of the commonest kind.
      bandwidth, flops: of the device, a second; None for a size.
      link: bytes a second between host and device, each way; None for a size.
    """

    name: str
    memory: int
    how: str
    gpu: Gpu
    bandwidth: float | None = None
    flops: float | None = None
    link: float | None = None


def card(text: str) -> Card:
    """The GPU of this name, or a size with a unit: `rtx4090`, `24GB`, `8GiB`.

    A size is what programs get: nothing is taken off it.

    Raises:
      InputError: GPU-SIZE, a size without a unit, of none or too large; GPU-NAME, unknown, with the
        nearest names.
    """
    name = text.strip().lower()
    if size := SIZE.fullmatch(name):
        return of_size(text, *size.groups())
    if name not in GPUS:
        close = nearest(name, GPUS)
        hint = " or ".join(f"--gpu {other}" for other in close) if close else "--gpu 24GB"
        expected = f"a size such as 24GB, or one of {', '.join(sorted(GPUS))}"
        raise InputError("GPU-NAME", "--gpu", f"unknown GPU {text[:80]!r}", expected, hint)
    return of_gpu(GPUS[name], name)


def of_size(text: str, number: str, unit: str) -> Card:
    """A card of which the memory alone is known."""
    if unit not in UNITS:
        found = f"{text[:80]!r} has no unit" if not unit else f"unknown unit in {text[:80]!r}"
        hint = f"--gpu {number}GB"
        raise InputError("GPU-SIZE", "--gpu", found, "a size with a unit, such as 24GB", hint)
    memory = int(float(number) * UNITS[unit])
    if not 0 < memory <= 10**15:
        found = f"{text[:80]!r} is no memory of a GPU"
        raise InputError("GPU-SIZE", "--gpu", found, "more than 0 bytes and at most 1000TB")
    return Card(text.strip(), memory, "all of it for programs", KNOWN["rtx4090"])


def of_gpu(gpu: Gpu, name: str) -> Card:
    """A card of a known kind, as XLA's settings in the environment leave it."""
    share, why = xla_share()
    memory = int(min(gpu.memory * share, gpu.memory - CONTEXT))
    how = f"{gpu.memory / 1e9:.1f} GB as CUDA reports it, of which XLA takes {share:.0%} ({why})"
    generation, lanes = LINKS.get(name, (4, 16))
    link = LANES_16[generation] * lanes / 16 * LINK_SHARE
    return Card(gpu.name, memory, how, gpu, gpu.bandwidth, gpu.flops, link)


def xla_share() -> tuple[float, str]:
    """(what share of a GPU XLA takes, why)."""
    for name in SHARE_VARIABLES:
        try:
            share = float(os.environ.get(name, ""))
        except ValueError:
            continue
        if 0 < share <= 1:
            return share, name
    return XLA_SHARE, f"its default; {SHARE_VARIABLES[0]} changes it"


def name_of(device_kind: str) -> str | None:
    """The name here of a GPU by CUDA's name for it; None for one that is not known."""
    return next((name for name, gpu in GPUS.items() if gpu.name == device_kind), None)
