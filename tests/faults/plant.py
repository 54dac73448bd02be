"""Faults planted in the source, one at a time, and whether the quick tier catches each.

    python -m tests.faults.plant                    those that name a test, against that file
    python -m tests.faults.plant 3 17 --everywhere  two of them, against the whole quick tier

A fault is a row of faults.json: `what` it is, the `file`, the text `old` that stands there exactly
once, the `new` text, and `test`, a file of the quick tier that fails for it; empty where none has
been found yet. The tree is copied, changed and tested in a process of its own; the compile cache is
shared, since its keys are the programs.
"""

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
LIST = Path(__file__).with_name("faults.json")


@dataclasses.dataclass(frozen=True)
class Fault:
    """One row."""

    what: str
    file: str
    old: str
    new: str
    test: str

    def __str__(self) -> str:
        return f"{self.file}: {self.what}"


def faults() -> list[Fault]:
    """All rows."""
    return [Fault(**row) for row in json.loads(LIST.read_text())]


def planted(source: str, fault: Fault) -> str:
    """The source with the fault in it.

    Raises:
      ValueError: the text is not there, or more than once.
    """
    found = source.count(fault.old)
    if found != 1:
        raise ValueError(f"{fault}: {fault.old!r} stands there {found} times, not once")
    return source.replace(fault.old, fault.new)


def fails(tests: list[str], fault: Fault | None = None) -> bool:
    """Whether a test of the quick tier among `tests` fails with the fault in the source, if any.

    Raises:
      RuntimeError: the tests could not be run.
    """
    with tempfile.TemporaryDirectory() as folder:
        copy_tree(Path(folder))
        if fault is not None:
            path = Path(folder, fault.file)
            path.write_text(planted(path.read_text(), fault))
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": folder, "JAX_COMPILATION_CACHE_DIR": cache()},
            capture_output=True,
            text=True,
        )
    if done.returncode not in (0, 1):
        raise RuntimeError(f"{fault}: pytest ended with {done.returncode}\n{done.stdout[-3000:]}")
    return done.returncode == 1


def copy_tree(target: Path) -> None:
    """All that git does not ignore."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, target / name)


def cache() -> str:
    """The compile cache of this tree's own tests."""
    return os.environ.get("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))


def main() -> int:
    """Plants what the command line names; the exit code is 1 when a fault is not caught."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("number", type=int, nargs="*", help="of a fault")
    parser.add_argument("--everywhere", action="store_true", help="against the whole quick tier")
    args = parser.parse_args()
    rows, missed = faults(), 0
    known = [number for number, fault in enumerate(rows) if fault.test]
    for number in args.number or known:
        fault = rows[number]
        found = fails(["-n", "2"] if args.everywhere or not fault.test else [fault.test], fault)
        missed += not found
        print(f"{'caught' if found else 'MISSED'}  {number:3}  {fault}", flush=True)
    print(f"{missed} missed")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
