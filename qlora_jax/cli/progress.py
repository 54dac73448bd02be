"""Progress of what is long, on stderr: a bar on a terminal, gone at the end; rows elsewhere."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

EVERY = 10.0  # seconds between rows where there is no terminal

Update = Callable[[int, int, str], None]  # done, of, what was done last


@contextmanager
def bar(label: str) -> Iterator[Update]:
    """Yields what to call with (bytes done, bytes in all, name).

    with bar("loading") as progress:
        load(path, progress=progress)
    """
    with shown(label, (DownloadColumn(), TransferSpeedColumn()), in_bytes) as update:
        yield update


@contextmanager
def counter(label: str) -> Iterator[Update]:
    """The same for things that are counted: (done, of)."""
    with shown(label, (MofNCompleteColumn(),), in_numbers) as update:
        yield update


@contextmanager
def shown(
    label: str, columns: tuple[ProgressColumn, ...], amount: Callable[[int, int, float], str]
) -> Iterator[Update]:
    """Yields what draws the bar, or prints a row from time to time."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield rows(console, label, amount)
        return
    progress, tasks = drawn(console, *columns, transient=True), []

    def update(done: int, of: int, name: str = "") -> None:
        if not tasks:  # only now: a download may come first, and has a bar of its own
            progress.start()
            tasks.append(progress.add_task(label))
        progress.update(tasks[0], completed=done, total=of)

    try:
        yield update
    finally:
        progress.stop()


def rows(console: Console, label: str, amount: Callable[[int, int, float], str]) -> Update:
    """Prints what is done every EVERY seconds; what ends sooner prints nothing."""
    begun = last = time.monotonic()

    def update(done: int, of: int, name: str = "") -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= EVERY:
            last = now
            left = (now - begun) * (of - done) / max(done, 1)
            text = f"{label}: {amount(done, of, now - begun)}, {left:.0f} s left, {name}"
            console.print(text.rstrip(", "), soft_wrap=True, highlight=False, markup=False)

    return update


def in_bytes(done: int, of: int, seconds: float) -> str:
    """`1.2 of 2.5 GB, 310 MB/s`."""
    return f"{done / 1e9:.2f} of {of / 1e9:.2f} GB, {done / 1e6 / seconds:.0f} MB/s"


def in_numbers(done: int, of: int, seconds: float) -> str:
    """`3 of 12`."""
    return f"{done} of {of}"


def drawn(console: Console, *columns: ProgressColumn, transient: bool) -> Progress:
    """A bar with a label, what is done of all, and the time it took and will take."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        *(columns or (MofNCompleteColumn(),)),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=transient,
    )
