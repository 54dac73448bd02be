"""The time of each file of tests: the slowest are printed, and the quick tier has a budget a file.

Seconds of a file are the lesser of the clock's and of the CPU time of its process and children: a
busy machine slows the clock and not the CPU, and several threads use more CPU than the clock shows.
"""

import os
import time
from collections import Counter
from pathlib import Path

import pytest

FILE_BUDGET = 75.0  # seconds that a file of the quick tier may take; the aim is 30
SHOWN = 10
TICKS = os.sysconf("SC_CLK_TCK")


class Budget:
    """The seconds of each file; of a worker they travel to the process that prints them."""

    def __init__(self, config: pytest.Config):
        self.config, self.seconds, self.started = config, Counter(), None

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: pytest.Item | None):
        """Counts from the first test of a file to its last, as far as this worker has them."""
        if self.started is None:
            self.started = time.perf_counter(), cpu_seconds()
        result = yield
        if nextitem is None or nextitem.path != item.path:
            spent = time.perf_counter() - self.started[0], cpu_seconds() - self.started[1]
            self.seconds[item.location[0]] += min(spent)
            self.started = None
        return result

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if worker := getattr(self.config, "workeroutput", None):
            worker["seconds"] = dict(self.seconds)
        elif self.over_budget():
            session.exitstatus = session.exitstatus or pytest.ExitCode.TESTS_FAILED

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node) -> None:
        """A worker of xdist has ended."""
        self.seconds.update(getattr(node, "workeroutput", {}).get("seconds", {}))

    def over_budget(self) -> list[str]:
        """The files that take too long, of a run of the quick tier."""
        if "not slow" not in self.config.option.markexpr:
            return []
        return [file for file, seconds in self.seconds.items() if seconds > FILE_BUDGET]

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if len(self.seconds) > SHOWN:
            terminalreporter.section(f"the {SHOWN} slowest of {len(self.seconds)} files, seconds")
            for file, seconds in self.seconds.most_common(SHOWN):
                terminalreporter.write_line(f"{seconds:7.1f}  {file}")
        for file in self.over_budget():
            terminalreporter.write_line(
                f"FAILED {file}: {self.seconds[file]:.1f} s, a file of the quick tier may take "
                f"{FILE_BUDGET:.0f} (mark what is one more case of a class as slow)",
                red=True,
            )


def cpu_seconds() -> float:
    """CPU time of this process, of its ended children, and of those that still run."""
    return sum(os.times()[:4]) + sum(map(cpu_of, running_children()))


def running_children() -> list[int]:
    """Their numbers, where the system lists them."""
    try:
        tasks = [path.read_text() for path in Path("/proc/self/task").glob("*/children")]
    except OSError:
        return []
    return [int(number) for text in tasks for number in text.split()]


def cpu_of(process: int) -> float:
    """CPU time of a process and of its ended children; 0 when it is gone."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return sum(map(int, fields[11:15])) / TICKS
