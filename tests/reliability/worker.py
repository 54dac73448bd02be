"""A process that opens damaged files, so that a crash, a hang or a bomb ends it and not the tests.

    worker = Worker("weights")
    worker.learn(clean).grown       bytes, for comparison
    worker.load(folder).outcome     loaded, refused, crashed, killed or late

Within it memory is limited by RLIMIT_AS, and an audit hook notes every file that is opened, every
program and every connection. Its peak memory is set back before each file.
"""

import contextlib
import multiprocessing
import os
import re
import resource
import sys
import traceback
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qlora_jax.errors import QloraError

LIMIT_SECONDS = 5.0  # then the process is killed
MEMORY = 2 << 30  # bytes of address space beyond what it takes after its first file
BAD_EVENTS = ("subprocess.Popen", "os.exec", "os.posix_spawn", "os.system", "socket.connect")
# Python's own modules, and what a process reads about itself.
OWN_FILES = (sys.prefix, sys.base_prefix, "/proc/self", "/sys/", "/dev/null", "/dev/urandom")


@dataclass
class Report:
    """What came of one file.

    Attributes:
      outcome: loaded; refused, by an error of ours; crashed, by another; killed by a signal; late.
      code, text: of the error.
      exit_code: what the command line would end with.
      seconds: of CPU time that it took, its children's included: the clock's would be a busy
        machine's. What waits instead is late.
      grown: bytes that the process needed at most beyond what it had before.
      outside: files opened outside the folder, and programs started.
      values: what was loaded.
    """

    outcome: str
    code: str = ""
    text: str = ""
    exit_code: int = 0
    seconds: float = 0.0
    grown: int = 0
    outside: list[str] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)


class Worker:
    """Loads files with one of loaders.py, one at a time; a process that ended is replaced."""

    def __init__(self, loader: str):
        self.loader = loader
        self.start()

    def start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(self.loader, theirs), daemon=True)
        self.process.start()
        theirs.close()

    def learn(self, clean: Path) -> Report:
        """The report on a folder that stays as it is, and that others are compared with."""
        self.clean_path = clean
        for _ in range(2):  # imports and compiled programs are no file's growth
            report = self.ask(clean, seconds=120)
            assert report.outcome == "loaded", report
        return report

    def load(self, path: Path) -> Report:
        """The report on the file or folder `path`."""
        report = self.ask(path, LIMIT_SECONDS)
        if report.outcome in ("killed", "late"):
            self.stop()
            self.start()
            self.learn(self.clean_path)
        return report

    def ask(self, path: Path, seconds: float) -> Report:
        try:
            self.pipe.send(path)
            if self.pipe.poll(seconds):
                return self.pipe.recv()
        except (EOFError, ConnectionError):
            self.process.join(10)
            return Report("killed", text=f"exit status {self.process.exitcode}")
        return Report("late", text=f"no answer after {seconds} s", seconds=seconds)

    def stop(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def serve(loader: str, pipe: Any) -> None:
    """The process: paths come in, reports go out."""
    from tests.reliability import loaders

    opened: list[str] = []
    sys.addaudithook(lambda event, args: note(opened, event, args))
    load, files = getattr(loaders, loader), 0
    while True:
        try:
            path = pipe.recv()
        except EOFError:
            return
        pipe.send(report_on(load, path, opened))
        files += 1
        if files == 2:
            limit_memory()


def note(opened: list[str], event: str, args: tuple) -> None:
    """Keeps what was opened or started."""
    if event == "open" and isinstance(args[0], str | bytes):
        opened.append(os.fsdecode(args[0]))
    elif event in BAD_EVENTS and args[0] != sys.executable:  # as our own children are
        opened.append(f"{event} {args[0]}")


def report_on(load: Any, path: Path, opened: list[str]) -> Report:
    """Loads one file and says what came of it."""
    opened.clear()
    before = reset_peak()
    started = cpu_seconds()
    report = Report("loaded")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            report.values = load(path)
    except QloraError as error:
        report = Report("refused", error.code, str(error), error.exit_code)
    except BaseException as error:
        report = Report("crashed", type(error).__name__, traceback.format_exc())
    report.seconds = cpu_seconds() - started
    report.grown = peak() - before
    report.outside = [name for name in opened if outside(name, path)]
    return report


def cpu_seconds() -> float:
    """CPU time of this process and of its children that have ended."""
    return sum(os.times()[:4])


def outside(name: str, path: Path) -> bool:
    """Whether a file is neither within `path` nor one of Python's own."""
    real = os.path.realpath(name)
    return not real.startswith((os.path.realpath(path), *map(os.path.realpath, OWN_FILES)))


def reset_peak() -> int:
    """Sets the process's peak memory back; what it has now, in bytes."""
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    return peak()


def peak() -> int:
    """The most memory that the process had since `reset_peak`, in bytes."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) << 10


def limit_memory() -> None:
    """Lets the process's address space grow by MEMORY and no more."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    allowed = pages * os.sysconf("SC_PAGE_SIZE") + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (allowed, allowed))
