"""Where optimizer state goes, host or device: decided by numbers, and said with the reason."""

from typing import NamedTuple

from qlora_jax.errors import InputError
from qlora_jax.placement import HOST, free_device_bytes, has_host_memory

CHOICES = ("auto", "host", "device")
PAGES_IN_FLIGHT = 3  # one coming, one at work, one going


class MemoryChoice(NamedTuple):
    """Arguments of `Paged`, and why.

    Attributes:
      memory: `"host"` or `"device"`.
      resident: pages that stay on the device with `memory="host"`.
      reason: one line for the header of a run.
    """

    memory: str
    resident: int
    reason: str


def choose_memory(
    requested: str,
    *,
    state_bytes: int,
    pages: int,
    reserved_bytes: int = 0,
    free_bytes: int | None = None,
    own_bytes: int = 0,
    elementwise: bool = True,
) -> MemoryChoice:
    """Host memory only when asked for, or when the state does not fit beside the training step.

        fits: state_bytes <= free_bytes + own_bytes - reserved_bytes

    Args:
      requested: `optim_memory`: auto, host or device.
      state_bytes: of the whole optimizer state (`paged_adamw.state_bytes`).
      pages: how many pages it has (`Paged.pages`).
      reserved_bytes: what the training step will still allocate (gradients, activations): by the
        compiled step's memory analysis, or the planner's estimate.
      free_bytes: of the device; asked of the backend when None.
      own_bytes: of this state, already on the device and so not free.
      elementwise: whether the transform may be paged at all.

    Raises:
      InputError: an unknown word, or host memory that cannot be had.
    """
    if requested not in CHOICES:
        found = f"unknown {requested!r}"
        raise InputError("OPT-MEMORY", "optim_memory", found, ", ".join(CHOICES))
    if requested != "auto":
        return MemoryChoice(requested, 0, f"optimizer state on the {requested}: asked for")
    size = f"{state_bytes / 1e9:.2f} GB of optimizer state"
    if free_bytes is None:
        free_bytes = free_device_bytes()
    if free_bytes is None:
        return MemoryChoice("device", 0, f"{size} on the device: its free memory is unknown")
    room = max(0, free_bytes + own_bytes - reserved_bytes)
    have = f"{room / 1e9:.2f} GB are free beside the training step"
    if state_bytes <= room:
        return MemoryChoice("device", 0, f"{size} on the device: {have}")
    if not elementwise:
        return MemoryChoice("device", 0, f"{size} on the device: {have}, but it cannot be paged")
    if not has_host_memory():
        return MemoryChoice("device", 0, f"{size} on the device: {have}, but no {HOST} memory")
    page_bytes = state_bytes / pages
    resident = int(max(0, room // page_bytes - PAGES_IN_FLIGHT))
    text = f"{size} on the host, {resident} of {pages} pages on the device: {have}"
    return MemoryChoice("host", resident, text)
