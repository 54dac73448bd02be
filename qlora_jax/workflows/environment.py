"""What a run stands on: versions, devices, memory, variables; for `doctor` and environment.json."""

import os
import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

PACKAGES = (
    *("qlora-jax", "jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "flax", "optax"),
    *("orbax-checkpoint", "transformers", "tokenizers", "datasets", "safetensors", "numpy"),
    "ml_dtypes",
)
VARIABLES = ("XLA_", "JAX_", "CUDA_VISIBLE_DEVICES", "TF_GPU_ALLOCATOR")
MEMORY = ("bytes_limit", "bytes_in_use", "peak_bytes_in_use")
NVIDIA_SMI = ("nvidia-smi", "--format=csv,noheader,nounits")


def environment() -> dict[str, Any]:
    """Plain data, ready for JSON: python, packages, backend, devices, gpu, memory, variables.

    Bytes are bytes. A package that is not installed and a tool that is not there are left out.
    """
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "packages": {name: found for name in PACKAGES if (found := version(name))},
        "backend": jax.default_backend(),
        "devices": [described(device) for device in jax.local_devices()],
        "gpu": nvidia(),
        "memory": host_memory(),
        "variables": {key: os.environ[key] for key in sorted(os.environ) if watched(key)},
    }


def version(name: str) -> str | None:
    """The installed version of a package."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def watched(key: str) -> bool:
    """Whether an environment variable changes what JAX does."""
    return key.startswith(VARIABLES)


def described(device: jax.Device) -> dict[str, Any]:
    """One device: its kind, the memories it can address, and what JAX holds of them."""
    stats = device.memory_stats() or {}
    return {
        "id": device.id,
        "kind": device.device_kind,
        "memories": sorted(memory.kind for memory in device.addressable_memories()),
        **{key: stats[key] for key in MEMORY if key in stats},
    }


def host_memory() -> dict[str, int]:
    """Total and available bytes of the host, as far as the system tells them."""
    page = os.sysconf("SC_PAGE_SIZE")
    names = {"total": "SC_PHYS_PAGES", "available": "SC_AVPHYS_PAGES"}  # macOS has the first only
    memory = {key: page * os.sysconf(n) for key, n in names.items() if n in os.sysconf_names}
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:
        return memory
    lines = dict(line.split(":", 1) for line in text.splitlines())
    if (
        "MemAvailable" in lines
    ):  # counts caches that can be given up, which SC_AVPHYS_PAGES does not
        memory["available"] = 1024 * int(lines["MemAvailable"].split()[0])
    return memory


def disk(folder: str | Path = ".") -> dict[str, int]:
    """Total and free bytes of the file system that holds `folder`."""
    usage = shutil.disk_usage(folder)
    return {"total": usage.total, "free": usage.free}


def nvidia() -> dict[str, Any]:
    """Driver, memory of each GPU and who holds it, as nvidia-smi says; empty without one."""
    gpus = smi("--query-gpu=name,driver_version,memory.total,memory.used")
    if not gpus:
        return {}
    holders = smi("--query-compute-apps=pid,process_name,used_memory")
    return {
        "driver": gpus[0][1],
        "gpus": [
            {"name": name, "total_mib": total, "used_mib": used} for name, _, total, used in gpus
        ],
        "held_by": [
            {"pid": pid, "process": process, "used_mib": used} for pid, process, used in holders
        ],
    }


def smi(query: str) -> list[list[str]]:
    """The rows of one nvidia-smi query; none where it is missing, fails or hangs."""
    try:
        done = subprocess.run(
            [*NVIDIA_SMI, query], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return [[cell.strip() for cell in row.split(",")] for row in done.stdout.splitlines() if row]
