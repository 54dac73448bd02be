"""Files and folders that appear whole or not at all, also when the process is killed.

Everything is written under a temporary name beside the final one, flushed to the disk, and renamed.
A temporary folder is locked while its writer lives, so that the ones of dead writers are known, and
are removed by the next writer of the same name. A single file is written inside such a folder too.
"""

import contextlib
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from qlora_jax.errors import FULL, InputError, StorageError

CLAIMED: set[str] = set()  # temporary folders that this process holds the lock of


@contextlib.contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """Yields a temporary folder that becomes `path` when the block ends without an exception.

    Missing parents are made. On any exception nothing is left behind.

    Raises:
      InputError: OUT-EXISTS when there is something at `path`, before or after the block.
      StorageError: OUT-FULL or OUT-WRITE when the system refuses to write.
    """
    with appearing(Path(path).absolute()) as folder:
        yield folder


@contextlib.contextmanager
def new_file(path: str | Path) -> Iterator[Path]:
    """As `new_folder`, for one file: the block writes the file whose temporary path it gets."""
    path = Path(path).absolute()
    with appearing(path, inside=path.name) as file:
        yield file


@contextlib.contextmanager
def appearing(path: Path, inside: str = "") -> Iterator[Path]:
    """Yields what becomes `path`: a claimed folder or, with `inside`, a name within one."""
    refuse_existing(path)
    made = [parent for parent in path.parents if not os.path.lexists(parent)]
    done = False
    with storage_errors(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with claimed(path) as temporary:
                yield temporary / inside
                flush_tree(temporary)
                with locked(path.parent):
                    refuse_existing(path)
                    (temporary / inside).rename(path)
                for parent in (path.parent, *(folder.parent for folder in made)):
                    flush(parent)
                done = True
        finally:
            if not done:
                for parent in made:
                    with contextlib.suppress(OSError):
                        parent.rmdir()


def write_file(path: str | Path, data: bytes) -> None:
    """Writes the file `path`, replacing an older one: a reader sees the old or the new, whole.

    Raises:
      StorageError: OUT-FULL or OUT-WRITE; the older file is then as it was.
    """
    path = Path(path)
    temporary = path.with_name(temporary_name(path))
    with storage_errors(path):
        try:
            with open(temporary, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        flush(path.parent)


def refuse_existing(path: str | Path) -> None:
    """Nothing is ever overwritten; also asked before minutes of work."""
    if os.path.lexists(path):
        hint = "another name, or remove it first"
        raise InputError("OUT-EXISTS", str(path), "exists already", "a new path", hint)


@contextlib.contextmanager
def claimed(path: Path) -> Iterator[Path]:
    """A new locked folder beside `path`; those that dead writers left are removed first."""
    with locked(path.parent):
        for old in path.parent.iterdir():
            if is_temporary(old.name, path) and abandoned(old):
                shutil.rmtree(old)
        temporary = path.with_name(temporary_name(path))
        temporary.mkdir()
        lock = os.open(temporary, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX)
    CLAIMED.add(str(temporary))
    try:
        yield temporary
    finally:
        CLAIMED.discard(str(temporary))
        shutil.rmtree(temporary, ignore_errors=True)
        os.close(lock)


def temporary_name(path: Path) -> str:
    """A name beside `path` that says whose it is."""
    return f".{path.name}.{secrets.token_hex(4)}.tmp"


def is_temporary(name: str, path: Path) -> bool:
    """Whether `temporary_name` may have made a name; `.model.old.tmp` is a user's."""
    return re.fullmatch(rf"\.{re.escape(path.name)}\.[0-9a-f]{{8}}\.tmp", name) is not None


def abandoned(folder: Path) -> bool:
    """Whether no living process holds the lock of a temporary folder."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    file = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(file)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps other writers away for a moment: between making a folder and locking it.

    A new folder inside one that is being written needs nobody kept away, and its lock, which this
    process holds already, would never come free.
    """
    if str(folder) in CLAIMED:
        yield
        return
    file = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        os.close(file)


def flush_tree(folder: Path) -> None:
    """Every file and folder from the leaves up, then `folder` itself, to the disk."""
    for root, _, names in os.walk(folder, topdown=False):
        for name in names:
            flush(Path(root, name))
        flush(Path(root))


def flush(path: Path) -> None:
    """Waits until a file, or a folder's list of names, is on the disk."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


@contextlib.contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turns the system's refusals into one line that says where, and how much space is left."""
    try:
        yield
    except OSError as error:
        place = next(p for p in (path, *path.absolute().parents) if os.path.exists(p))
        free = f"{shutil.disk_usage(place).free / 1e9:.3g} GB free"
        if error.errno in FULL:
            hint = "free some space and run it again; nothing is left half-written"
            raise StorageError(
                "OUT-FULL", str(path), f"{error.strerror}: {free}", hint=hint
            ) from error
        raise StorageError(
            "OUT-WRITE", str(path), f"cannot be written: {error.strerror}"
        ) from error


def refuse_too_large(folder: Path, needed: int) -> None:
    """Refuses before the first byte what the disk of `folder` has no room for.

    Raises:
      StorageError: OUT-FULL with the bytes needed and the bytes free.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        found = f"needs {needed} bytes ({needed / 1e9:.3g} GB), {free} bytes are free"
        raise StorageError("OUT-FULL", str(folder), found, hint="free some space")
