"""Regular expressions from users and files, matched against module paths within a time limit.

A pattern of 30 characters can keep Python's `re` busy for years, and `re` has no time limit. So
what holds more than letters, digits, `_`, `.` and `-` is matched in a child process (about 30 ms)
whose CPU time is limited; the plain rest, such as `q_proj`, is matched here.
"""

import json
import re
import subprocess
import sys
from collections.abc import Sequence

from qlora_jax.errors import InputError

MAX_LENGTH = 512  # characters of one pattern
CPU_SECONDS = 1  # of the child, its start included
WALL_SECONDS = 60  # for a machine so busy that the child hardly runs

PLAIN = re.compile(r"[\w.-]*")

CHILD = """
import json, re, sys
try:
    import resource
    resource.setrlimit(resource.RLIMIT_CPU, (int(sys.argv[1]), int(sys.argv[1])))
except ImportError:
    pass
pattern, paths = json.load(sys.stdin)
try:
    pattern = re.compile(pattern)
    answer = [pattern.fullmatch(path) is not None for path in paths]
except (re.error, RecursionError, OverflowError) as problem:
    answer = str(problem) or type(problem).__name__
json.dump(answer, sys.stdout)
"""


def full_matches(pattern: str, paths: Sequence[str], where: str) -> list[bool]:
    """Whether `pattern` matches each whole path, as `re.fullmatch` says.

    Raises:
      InputError: `LORA-REGEX` when the pattern is too long, no regular expression, or too slow.
    """
    return matches(pattern, pattern, paths, where)


def end_matches(pattern: str, paths: Sequence[str], where: str) -> list[bool]:
    r"""Whether `pattern` matches the end of each path, from its start or a dot on.

    PEFT's rule for rank_pattern and alpha_pattern: `re.match(rf"(.*\.)?({pattern})$", path)`.

    Raises:
      InputError: as `full_matches`.
    """
    return matches(pattern, rf"(.*\.)?({pattern})", paths, where)


def matches(written: str, whole: str, paths: Sequence[str], where: str) -> list[bool]:
    """Whether each path matches `whole`, which is made around what the user has `written`."""
    if len(written) > MAX_LENGTH:
        found = f"a pattern of {len(written)} characters"
        raise InputError("LORA-REGEX", where, found, f"at most {MAX_LENGTH}")
    if PLAIN.fullmatch(written):
        return [re.fullmatch(whole, path) is not None for path in paths]
    answer = match_in_child(whole, paths)
    if answer is None:
        found = f"the regular expression {written!r} takes too long to match"
        raise InputError("LORA-REGEX", where, found, hint="a pattern without nested repeats")
    if isinstance(answer, str):
        found = f"{written!r} is not a regular expression: {answer}"
        raise InputError("LORA-REGEX", where, found)
    return answer


def match_in_child(pattern: str, paths: Sequence[str]) -> list[bool] | str | None:
    """The matches, or what is wrong with the pattern, or None when the time is spent."""
    command = [sys.executable, "-I", "-S", "-W", "ignore", "-c", CHILD, str(CPU_SECONDS)]
    question = json.dumps([pattern, list(paths)])
    try:
        child = subprocess.run(
            command, input=question, capture_output=True, text=True, timeout=WALL_SECONDS
        )
    except subprocess.TimeoutExpired:
        return None
    return json.loads(child.stdout) if child.returncode == 0 else None
