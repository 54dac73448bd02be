"""Chat templates rendered in a process of their own, since a template is code from a stranger.

Why a process: jinja2's sandbox stops code but neither memory nor time (`'a' * 2e8` took 782 MB), an
alarm signal works in the main thread only and not inside one long C call, and a fork of a process
that runs JAX can hang. The child is started once, answers a conversation in a fraction of a
millisecond, ends with this process, and is replaced after a limit has ended it.
"""

import atexit
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, NamedTuple

from qlora_jax.errors import InputError

MAX_TEMPLATE = 64 << 10  # bytes
WORKER = Path(__file__).with_name("template_worker.py")
CODES = {
    "syntax": ("CHAT-SYNTAX", "is not a template"),
    "security": ("CHAT-UNSAFE", "does what templates may not do"),
    "undefined": ("CHAT-UNDEFINED", "uses what is not there"),
    "raised": ("CHAT-RAISED", "refuses the messages"),
    "output": ("CHAT-OUTPUT", "writes too much"),
    "memory": ("CHAT-MEMORY", "needs too much memory"),
    "failed": ("CHAT-FAILED", "fails"),
}


class Rendered(NamedTuple):
    """A rendered text, and the [start, end) pieces of it that `{% generation %}` marks."""

    text: str
    spans: list[tuple[int, int]]


class Renderer:
    """Renders templates in a child process, one request at a time, from any thread or fork."""

    def __init__(self):
        self.lock = threading.Lock()
        self.child: subprocess.Popen | None = None
        self.hooked = False

    def render(
        self, template: str, calls: list[dict[str, Any]], where: str = "chat template"
    ) -> list[Rendered]:
        """`template` with each of the variables in `calls`, as transformers renders it.

        Args:
          template: Jinja, at most 64 KiB.
          calls: JSON values by name; together they may take 2 s of CPU time, and each may write
            1 MiB.

        Raises:
          InputError: CHAT-SIZE, CHAT-MESSAGES for values that are not JSON, CHAT-SYNTAX,
            CHAT-UNSAFE, CHAT-UNDEFINED, CHAT-RAISED with the template's own words, CHAT-OUTPUT,
            CHAT-MEMORY, CHAT-TIME, CHAT-FAILED.
        """
        if len(template.encode(errors="surrogatepass")) > MAX_TEMPLATE:
            raise InputError("CHAT-SIZE", where, "is too large", f"at most {MAX_TEMPLATE} bytes")
        try:
            request = json.dumps({"template": template, "calls": calls})
        except (TypeError, ValueError, RecursionError) as error:
            found = f"a message is not plain JSON: {error}"
            raise InputError("CHAT-MESSAGES", where, found) from None
        with self.lock:
            reply = self.ask(request, where)
        if "error" in reply:
            code, found = CODES[reply["error"]]
            raise InputError(code, where, f"{found}: {reply['message']}")
        return [
            Rendered(text, [tuple(span) for span in spans])
            for text, spans in zip(reply["texts"], reply["spans"], strict=True)
        ]

    def ask(self, request: str, where: str) -> dict[str, Any]:
        if self.child is None:
            self.start()
        try:
            self.child.stdin.write(request + "\n")
            self.child.stdin.flush()
            line = self.child.stdout.readline()
        except BrokenPipeError:
            line = ""
        except BaseException:  # Ctrl-C: the answer that still comes must not meet another question
            self.close()
            raise
        if line:
            return json.loads(line)
        status = self.close()
        if status == -signal.SIGPROF:
            raise InputError("CHAT-TIME", where, "takes too long to render", "2 s of CPU time")
        raise InputError("CHAT-FAILED", where, f"its renderer ended with status {status}")

    def start(self) -> None:
        # -P: the folder of the program is not searched for modules.
        self.child = subprocess.Popen(
            [sys.executable, "-P", str(WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            encoding="utf-8",
        )
        if not self.hooked:
            atexit.register(self.close)
            os.register_at_fork(after_in_child=self.forget)
            self.hooked = True

    def close(self) -> int | None:
        """Ends the child; its exit status."""
        child, self.child = self.child, None
        if child is None:
            return None
        close_pipes(child)
        try:
            return child.wait(timeout=5)
        except subprocess.TimeoutExpired:
            child.kill()
            return child.wait()

    def forget(self) -> None:
        """In a fork: the child is the parent's to end, and its pipes would outlive the parent."""
        child, self.child = self.child, None
        self.lock = threading.Lock()
        if child is not None:
            close_pipes(child)
            child.returncode = 0  # not ours to wait for


def close_pipes(child: subprocess.Popen) -> None:
    """Closes our ends: the child, which reads until the end of its input, ends."""
    child.stdout.close()
    with contextlib.suppress(BrokenPipeError):  # it died with a request half read
        child.stdin.close()


RENDERER = Renderer()
