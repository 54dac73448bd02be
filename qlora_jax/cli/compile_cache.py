"""Compiled programs kept from one command to the next, in the user's cache folder.

XLA takes seconds to minutes for a model's programs; a second run of the same shapes reads them from
files. Commands turn JAX's persistent compilation cache on by its own environment variables, before
JAX is imported; importing the library sets nothing. JAX_COMPILATION_CACHE_DIR puts the cache
elsewhere, unbounded as JAX makes it; JAX_ENABLE_COMPILATION_CACHE=false turns it off.
"""

import os
import sys
from pathlib import Path

FOLDER = "JAX_COMPILATION_CACHE_DIR"
SIZE = "JAX_COMPILATION_CACHE_MAX_SIZE"
SHORTEST = "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"
BYTES = 2 << 30  # at most; what was used least recently goes first
SECONDS = 0.3  # what compiles quicker is not kept


def use_compile_cache() -> None:
    """Sets the cache up for this process and its children, where nobody has done so."""
    if FOLDER in os.environ or "jax" in sys.modules:
        return
    try:
        folder = user_folder()
        folder.mkdir(parents=True, exist_ok=True)
        if SIZE not in os.environ:
            remove_unfinished(folder)
    except (OSError, RuntimeError):  # no home, or none that can be written: compiled each time
        return
    os.environ[FOLDER] = str(folder)
    os.environ.setdefault(SIZE, str(BYTES))
    os.environ.setdefault(SHORTEST, str(SECONDS))


def user_folder() -> Path:
    """Where this user's programs are kept.

    Raises:
      RuntimeError: the user has no home.
    """
    home = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    return Path(home) / "qlora_jax" / "compiled"


def remove_unfinished(folder: Path) -> None:
    """Removes programs that a killed process wrote in part: JAX would warn of each, every time.

    JAX writes NAME-cache and then, where the size is bounded, NAME-atime, both under one lock.

    Raises:
      OSError: the folder cannot be written.
    """
    from filelock import FileLock, Timeout

    try:
        with FileLock(folder / ".lockfile", timeout=1):
            for path in folder.glob("*-cache"):
                if not path.with_name(f"{path.name.removesuffix('cache')}atime").exists():
                    path.unlink()
    except Timeout:  # another process is writing; the next command looks again
        return
