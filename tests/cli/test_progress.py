"""Where there is no terminal, a row from time to time; on one, a bar that leaves nothing behind."""

import io

import pytest
from rich.console import Console

from qlora_jax.cli import progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is set."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_rows_come_every_ten_seconds(clock, capsys):
    with progress.bar("quantizing") as update:
        for seconds, done in ((4, 1), (10, 2), (19, 3), (25, 4)):
            clock[0] = 100.0 + seconds
            update(done * 10**9, 8 * 10**9, f"layer.[{done}]")
    assert capsys.readouterr().err.splitlines() == [
        "quantizing: 2.00 of 8.00 GB, 200 MB/s, 30 s left, layer.[2]",
        "quantizing: 4.00 of 8.00 GB, 160 MB/s, 25 s left, layer.[4]",
    ]


def test_what_is_counted_has_no_bytes(clock, capsys):
    with progress.counter("evaluating") as update:
        clock[0] += 20
        update(1, 5)
    assert capsys.readouterr().err == "evaluating: 1 of 5, 80 s left\n"


def test_a_terminal_gets_bytes_speed_and_time(monkeypatch):
    console = Console(force_terminal=True, record=True, width=120, file=io.StringIO())
    monkeypatch.setattr(progress, "Console", lambda stderr: console)
    with progress.bar("quantizing") as update:
        update(10**9, 4 * 10**9, "layer")
        update(2 * 10**9, 4 * 10**9, "layer")
    text = console.export_text()
    assert "quantizing" in text
    assert "2.0/4.0 GB" in text
    assert "/s" in text
