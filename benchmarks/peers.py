"""bitsandbytes as a contender: a process of its own, asked by lines of JSON."""

import json
import subprocess
from pathlib import Path
from typing import Any

PROGRAM = Path(__file__).with_name("bitsandbytes_peer.py")


class PeerError(RuntimeError):
    """The peer could not do what it was asked for; its own words."""


class Bitsandbytes:
    """The process; close it, or use it in `with`.

    Attributes:
      versions: of bitsandbytes and what it runs on, and where: cuda or cpu.
    """

    def __init__(self, python: str, *, double: bool):
        """Starts `python` (a path), which must have bitsandbytes; `double` quantizes the scales.

        Raises:
          PeerError: it has not, and says so itself on stderr; or there is no such program.
        """
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        try:
            self.process = subprocess.Popen([python, str(PROGRAM)], **pipes)
        except OSError as error:
            raise PeerError(str(error)) from error
        self.double = double
        try:
            hello = self.answer()
        except PeerError:
            self.__exit__()
            raise
        self.versions = {**hello["versions"], "bitsandbytes device": hello["device"]}

    def __enter__(self) -> "Bitsandbytes":
        return self

    def __exit__(self, *_: Any) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=30)
        self.process.stdout.close()

    def prepare(self, **request: Any) -> list[str]:
        """Makes weights for a shape; the names of what can be run for it now.

        Raises:
          PeerError: it failed.
        """
        return self.ask({"prepare": {**request, "double": self.double}})["names"]

    def run(self, name: str) -> float:
        """Seconds of one call."""
        return self.ask({"run": name})["seconds"]

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """The answer to one line."""
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self.answer()

    def answer(self) -> dict[str, Any]:
        """The next line of its output."""
        line = self.process.stdout.readline()
        if not line:
            raise PeerError(f"bitsandbytes' process ended with code {self.process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise PeerError(answer["error"])
        return answer
