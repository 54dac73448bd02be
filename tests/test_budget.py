"""A file of the quick tier that takes too long fails the run; the slow tier has no budget."""

from types import SimpleNamespace

import pytest

from tests.budget import FILE_BUDGET, Budget


def ended(markexpr: str, seconds: dict[str, float]) -> int:
    """The exit status of a run of two workers, whose files took so long."""
    budget = Budget(SimpleNamespace(option=SimpleNamespace(markexpr=markexpr)))
    for _ in range(2):
        budget.pytest_testnodedown(SimpleNamespace(workeroutput={"seconds": seconds}))
    session = SimpleNamespace(exitstatus=pytest.ExitCode.OK)
    budget.pytest_sessionfinish(session)
    return session.exitstatus


def test_a_slow_file_fails_the_quick_tier():
    """Also when each of two workers had a part of it."""
    half = FILE_BUDGET / 2
    assert ended("not gpu and not slow", {"a.py": half + 1, "b.py": 1}) == 1
    assert ended("not gpu and not slow", {"a.py": half - 1, "b.py": half - 1}) == 0
    assert ended("not gpu", {"a.py": half + 1}) == 0
