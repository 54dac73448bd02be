"""The workers; and the results, written to the file that RELIABILITY_JSON names.

A test module says which rule it shows: RULE = "R20". Each of its tests is a case, unless the test
records `cases` and `passed` itself, as pytest's properties. Why tests of a rule were skipped stands
beside its numbers, which are smaller then.
"""

import datetime
import importlib.metadata
import json
import os
import platform
from pathlib import Path

import pytest

from tests.reliability.worker import Worker

PACKAGES = ("jax", "numpy", "tokenizers", "transformers", "jinja2", "orbax-checkpoint")
MAXIMA = ("slowest_seconds", "largest_rss_growth_bytes")


@pytest.fixture(scope="session")
def worker_of():
    """The worker of a loader, one for the whole run: to start one takes seconds."""
    workers: dict[str, Worker] = {}

    def worker_of(loader: str) -> Worker:
        if loader not in workers:
            workers[loader] = Worker(loader)
        return workers[loader]

    yield worker_of
    for worker in workers.values():
        worker.stop()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """Leaves the rule with the report, since reports know no module."""
    report = (yield).get_result()
    if rule := getattr(item.module, "RULE", None):
        report.user_properties.append(("rule", rule))


class Results:
    """Gathers reports and writes them at the end."""

    def __init__(self, path: Path):
        self.path, self.rules = path, {}

    def pytest_runtest_logreport(self, report) -> None:
        found = dict(report.user_properties)
        if "rule" not in found or (report.when != "call" and report.passed):
            return
        row = self.rules.setdefault(found["rule"], {"cases": 0, "passed": 0})
        if report.skipped:
            reasons = row.setdefault("skipped", {})
            reason = report.longrepr[2].removeprefix("Skipped: ")
            reasons[reason] = reasons.get(reason, 0) + 1
            return
        row["cases"] += found.get("cases", 1)
        row["passed"] += found.get("passed", 1) if report.passed or "passed" in found else 0
        found.setdefault("slowest_seconds", report.duration if "cases" not in found else 0.0)
        for key in MAXIMA:
            if key in found:
                row[key] = max(row.get(key, 0), found[key])

    def pytest_sessionfinish(self) -> None:
        content = {
            "date": datetime.date.today().isoformat(),
            "machine": f"{os.cpu_count()} cores of {processor()}",
            "versions": {"python": platform.python_version()}
            | {name: importlib.metadata.version(name) for name in PACKAGES},
            "rules": {
                rule: {key: rounded(value) for key, value in self.rules[rule].items()}
                for rule in sorted(self.rules, key=lambda rule: int(rule[1:]))
            },
        }
        self.path.write_text(json.dumps(content, indent=2) + "\n")


def pytest_configure(config) -> None:
    if path := os.environ.get("RELIABILITY_JSON"):
        config.pluginmanager.register(Results(Path(path)))


def rounded(value: float) -> float:
    """Seconds to the millisecond."""
    return round(value, 3) if isinstance(value, float) else value


def processor() -> str:
    """The processor's name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
