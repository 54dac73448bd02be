"""Runs commands in processes that end themselves by SIGKILL at a chosen moment.

    with Killer() as run:
        run(["quantize", model, out])           Ended(code=0, steps=57)
        run(["quantize", model, out], kill=30)  Ended(code=-9, steps=30)

A step is a call that changes what is on the disk: a file is made or written, flushed, cut, renamed.
The kill comes before the step of that number. All processes are forked from one that has imported
what they need and has no threads yet.
"""

import io
import multiprocessing
import os
import signal
import sys
from typing import Any, NamedTuple

CALLS = ("pwrite", "write", "fsync", "ftruncate")
EVENTS = ("os.rename", "os.mkdir", "os.remove", "os.rmdir")


class Ended(NamedTuple):
    """How a command ended: its exit code, -9 when it was killed, and the steps that it took."""

    code: int
    steps: int


class Killer:
    """The process that the commands are forked from."""

    def __enter__(self) -> "Killer":
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()
        return self

    def __exit__(self, *error: object) -> None:
        self.pipe.close()
        self.process.join()

    def __call__(self, arguments: list[str], kill: int = 0) -> Ended:
        """Runs `qlora-jax ARGUMENTS`, killed before step `kill` if that is not 0."""
        self.pipe.send((arguments, kill))
        return Ended(*self.pipe.recv())


def serve(pipe: Any) -> None:
    """Forks a process for each command that comes in, and tells how it ended."""
    # JAX's cache is read and never written: its writes would be steps of some runs only.
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "1e9"
    from qlora_jax.cli.main import main
    from qlora_jax.workflows import checked_merge, convert  # noqa: F401  # for all that follow

    while True:
        try:
            arguments, kill = pipe.recv()
        except EOFError:
            return
        steps, counted = os.pipe()
        child = os.fork()
        if child == 0:
            sys.stdout = sys.stderr = io.StringIO()
            count_steps(counted, kill)
            os._exit(main(arguments))
        os.close(counted)
        with os.fdopen(steps, "rb") as file:
            number = len(file.read())
        pipe.send((os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), number))


def count_steps(counted: int, kill: int) -> None:
    """Writes a byte a step, and ends this process before step `kill`."""
    taken, write = 0, os.write

    def step() -> None:
        nonlocal taken
        taken += 1
        if taken == kill:
            os.kill(os.getpid(), signal.SIGKILL)
        write(counted, b".")

    def counting(call: Any) -> Any:
        def counted_call(*args: Any, **options: Any) -> Any:
            step()
            return call(*args, **options)

        return counted_call

    def hook(event: str, args: tuple) -> None:
        if event in EVENTS or (event == "open" and "w" in str(args[1])):
            step()

    for name in CALLS:
        setattr(os, name, counting(getattr(os, name)))
    sys.addaudithook(hook)
