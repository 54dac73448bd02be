"""SIGINT and SIGTERM as a request that a run meets between two steps, with a checkpoint."""

import dataclasses
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qlora_jax.errors import QloraError


class Stopped(QloraError):
    """A run that a signal ended; its checkpoint is written and the run can be resumed."""

    def __init__(self, number: int, checkpoint: Path):
        name = signal.Signals(number).name
        super().__init__(
            "RUN-STOPPED", checkpoint, f"stopped by {name}, checkpoint saved", hint="--resume auto"
        )
        self.exit_code = 128 + number


@dataclasses.dataclass
class StopRequest:
    """The signal that asked the run to stop, if one did."""

    signal: int = 0


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Within the block SIGINT and SIGTERM are noted, not obeyed; a second one ends the process.

    Outside the main thread Python lets nobody handle signals, and nothing changes.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def note(number: int, frame: object) -> None:
        request.signal = number
        signal.signal(number, before[number])

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
