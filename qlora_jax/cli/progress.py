"""Progress bars on what is long: drawn on a terminal only, on stderr, and gone when it is done."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


@contextmanager
def bar(label: str) -> Iterator[Callable[..., None]]:
    """Yields what to call with (done, total) or with more; without a terminal it does nothing.

    with bar("loading") as progress:
        load(path, progress=progress)
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda *done: None
        return
    with drawn(console, transient=True) as progress:
        task = progress.add_task(label, total=None)

        def update(done: int, total: int | None = None, *rest: Any) -> None:
            progress.update(task, completed=done, total=total)

        yield update


def drawn(console: Console, *, transient: bool) -> Progress:
    """A bar with a label, what is done of all, and the time it took and will take."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=transient,
    )
