"""A pytest plugin: notes the messages of every code of ours that a run sees, each with its test.

    MESSAGES_OUT=found.json pytest -p tests.reliability.recorder tests/checkpoints tests/data

What differs from run to run or by machine is written as DIR, GOLDEN, N and DIGEST.
"""

import json
import os
import re
from pathlib import Path

import pytest

from qlora_jax.errors import QloraError
from tests.golden_data import GOLDEN

ROOT = Path(__file__).parents[2]
FOUND: dict[str, dict[str, str]] = {}


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_call(item):
    """Listens while a test runs."""
    if hasattr(item.obj, "hypothesis"):  # no two runs say the same
        yield
        return
    real = QloraError.__init__

    def noting(self, *args, **kwargs):
        real(self, *args, **kwargs)
        FOUND.setdefault(self.code, {}).setdefault(steady(str(self)), item.nodeid.partition("[")[0])

    QloraError.__init__ = noting
    try:
        yield
    finally:
        QloraError.__init__ = real


def pytest_sessionfinish() -> None:
    text = json.dumps(dict(sorted(FOUND.items())), indent=1, ensure_ascii=False)
    Path(os.environ["MESSAGES_OUT"]).write_text(text + "\n")


def steady(message: str) -> str:
    """`message` without what a run leaves in it."""
    message = message.replace(str(GOLDEN), "GOLDEN").replace(str(ROOT), "ROOT")
    message = re.sub(r"/[^ ,;']*?/pytest-of-[^ ,;'/]*/pytest-\d+/[^ ,;'/]*\d", "DIR", message)
    message = re.sub(r"/tmp/[^ ,;'/:]*", "DIR", message)
    message = re.sub(r"\d[\d.]* (GB|bytes)( are)? free", r"N \1\2 free", message)
    return re.sub(r"\b(?=\d*[a-f])[0-9a-f]{12}\b", "DIGEST", message)
