"""bitsandbytes as a contender: a program of its own, which is asked by lines of JSON.

bitsandbytes needs PyTorch, which this repository does not touch: the program is the user's own. It
says hello, and answers each line on its input with a line on its output:

                                                {"versions": {name: version}, "device": "cuda"}
    {"prepare": {"op": "nf4_matmul", "direction": "forward", "m": 16, "n": 4096, "k": 4096,
                 "calls": 4, "double": true}}   {"names": ["bitsandbytes"]}
    {"run": "bitsandbytes"}                     {"seconds": 7.1e-6}       of one call
    anything that fails                         {"error": "in its own words"}

`prepare` makes `calls` bfloat16 weights (n, k) and quantizes them to NF4 in blocks of 64, and the
scales again if `double`; `run` calls each once. Operations: nf4_matmul, forward by matmul_4bit (and
for one row by gemv_4bit too, "bitsandbytes gemv"), backward as dy times the dequantized weight; and
dequantize.

    {"prepare": {"op": "quantize", "path": FOLDER, "names": [NAME, ...], "double": true}}

reads those tensors of a folder's safetensors files, and `run` quantizes each once.

    {"prepare": {"op": "generate", "path": FOLDER, "tokens": 8, "rows": 1, "double": true}}

loads the folder's model in 4 bits, once for each dtype, and `run` gives the seconds of one more
token of all rows: from generating 1 and 9 tokens, greedily, behind a prompt of 16.
"""

import json
import shlex
import subprocess
from typing import Any


class PeerError(RuntimeError):
    """The peer could not do what it was asked for; its own words."""


class Bitsandbytes:
    """The process; close it, or use it in `with`.

    Attributes:
      versions: of bitsandbytes and what it runs on, and where: cuda or cpu.
    """

    def __init__(self, command: str, *, double: bool):
        """Starts the program; `double` quantizes the scales.

        Raises:
          PeerError: there is no such program, or it ends without a word.
        """
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        try:
            self.process = subprocess.Popen(shlex.split(command), **pipes)
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
