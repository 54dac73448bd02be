"""What can be wrong with what a user gives us: one line that says what, where, and what to do.

Every error that a user can cause is one of these; the command line prints the line and exits with
`exit_code`, a script catches the class. A bug of ours is never one of these.
"""

import difflib
import errno
from collections.abc import Iterable

SHOWN = 10  # names listed in one message; the rest is counted
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # what a system says when there is no room


class QloraError(Exception):
    """A state that a user can mend, told in one line.

    The text is `error[CODE]: where: found (expected ...). Try: hint.`

    Args:
      code: short and stable, upper case, prefixed by its area, such as `ST-LFS`.
      where: the file, key, or `file:line` that it is about.
      found: what came, with the value.
      expected: what was expected instead.
      hint: what to do: one command or one act.
    """

    exit_code = 1

    def __init__(self, code: str, where: str, found: str, expected: str = "", hint: str = ""):
        self.code, self.where, self.found = code, str(where), found
        self.expected, self.hint = expected, hint
        line = f"error[{code}]: {self.where}: {found}"
        if expected:
            line += f" (expected {expected})"
        line = line.rstrip(".") + "."
        if hint:
            line += f" Try: {hint.rstrip('.')}."
        super().__init__(printable(line))


class InputError(QloraError):
    """A file, a configuration, a row or an argument that cannot be used as it is."""

    exit_code = 2


class Note(UserWarning):
    """Something was passed over that does no harm; the command line prints it as one line."""


class ConfigMismatch(QloraError):
    """A run that is resumed with another configuration than it was started with."""

    exit_code = 3


class DoesNotFit(QloraError):
    """More memory or disk is needed than there is."""

    exit_code = 4


class StorageError(QloraError):
    """Reading or writing failed: a full disk, a damaged checkpoint."""

    exit_code = 5


class NonFinite(QloraError):
    """Loss or gradients were NaN or infinite for too many steps in a row."""

    exit_code = 6


class Locked(QloraError):
    """Another process works in the same folder."""

    exit_code = 7


def printable(text: str) -> str:
    """`text` with control characters escaped, since names in messages come from files."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def nearest(name: str, choices: Iterable[str]) -> list[str]:
    """The at most three `choices` that look most like `name`, best first; may be empty."""
    return difflib.get_close_matches(name, list(choices), n=3, cutoff=0.5)


def listed(names: Iterable[str]) -> str:
    """`a, b, c and 9 more`: at most ten names, so that a message stays one line."""
    names = list(names)
    shown = ", ".join(names[:SHOWN])
    return shown if len(names) <= SHOWN else f"{shown} and {len(names) - SHOWN} more"


def first_line(error: BaseException) -> str:
    """What another library's error says, cut to a line; the error's name if it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
