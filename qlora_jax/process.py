"""What memory this process may still get: of the system, of its container, by its own limit."""

import os
import resource
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
EXHAUSTED = "RESOURCE_EXHAUSTED"  # how XLA begins when an allocation fails
# (limit, used) of a container, of version 2 and of version 1.
LIMITS = (
    ("memory.max", "memory.current"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
)


def available() -> tuple[int, str]:
    """(bytes, what bounds them): the least of what system, container and address space leave."""
    rooms = [(system_room(), "free memory of this machine")]
    for limit, used in LIMITS:
        maximum, current = number(CGROUPS / limit), number(CGROUPS / used)
        if maximum is not None and current is not None:
            # What caches of files hold is counted as used, and given up when it is asked for.
            rooms.append((maximum - current + file_cache(), "the container's limit"))
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft != resource.RLIM_INFINITY:
        rooms.append((soft - address_space(), "ulimit -v"))
    room, why = min(rooms)
    return max(room, 0), why


def ran_out(error: BaseException) -> bool:
    """Whether an error, Python's or XLA's, says that an allocation failed."""
    xla = isinstance(error, RuntimeError) and EXHAUSTED in str(error)  # JaxRuntimeError is one
    return xla or isinstance(error, MemoryError)


def system_room() -> int:
    """What the system can give without swapping; where it does not say, all that it has."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:  # macOS
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    (line,) = (line for line in lines if line.startswith("MemAvailable:"))
    return 1024 * int(line.split()[1])


def number(path: Path) -> int | None:
    """The number in a file of the kernel; None for `max`, and where there is no such file."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def file_cache() -> int:
    """Bytes of the container's cached files."""
    try:
        lines = (CGROUPS / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))


def resident() -> int:
    """Bytes of memory that this process has now."""
    return statm(1)


def address_space() -> int:
    """Bytes of address space that this process has taken."""
    return statm(0)


def statm(field: int) -> int:
    """A figure of the process's memory in bytes; 0 where the system does not say."""
    try:
        pages = Path("/proc/self/statm").read_text().split()[field]
    except OSError:
        return 0
    return int(pages) * resource.getpagesize()
