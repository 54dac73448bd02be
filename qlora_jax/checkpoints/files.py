"""Files of strangers: opened so that nothing outside their folder is reached and nothing blocks."""

import abc
import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from qlora_jax.errors import InputError

COPY = "copy the file itself into the folder"
AGAIN = "download it again"
SAVE_AGAIN = "save_pretrained in transformers, which writes safetensors"


@contextlib.contextmanager
def opened(path: str | Path, missing: str = "FILE-MISSING") -> Iterator[int]:
    """`open_regular` as a context manager."""
    file = open_regular(path, missing)
    try:
        yield file
    finally:
        os.close(file)


def open_regular(path: str | Path, missing: str = "FILE-MISSING") -> int:
    """A descriptor for reading; a pipe, device or folder is refused and never waited for.

    Raises:
      InputError: the code `missing`, FILE-KIND, or FILE-READ (no permission, a loop of links).
    """
    try:
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(missing, str(path), "no such file") from None
    except OSError as error:
        raise InputError("FILE-READ", str(path), f"cannot be opened: {error.strerror}") from None
    mode = os.fstat(file).st_mode
    if not stat.S_ISREG(mode):
        os.close(file)
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe or device"
        raise InputError("FILE-KIND", str(path), f"is {kind}", "a regular file")
    return file


def inside(folder: str | Path, name: str) -> Path:
    """The real path of the file `name` of `folder`, which need not exist.

    Links are followed within the folder and, as in Hugging Face's cache, from
    `snapshots/REVISION/` to its sibling `blobs/`.

    Raises:
      InputError: FILE-OUTSIDE when it lies elsewhere.
    """
    home, real = Path(os.path.realpath(folder)), Path(os.path.realpath(Path(folder) / name))
    homes = [home]
    if home.parent.name == "snapshots":
        homes.append(home.parent.parent / "blobs")
    if not any(real.is_relative_to(place) for place in homes):
        found = f"leads outside the folder, to {real}"
        raise InputError("FILE-OUTSIDE", str(Path(folder) / name), found, "a file inside it", COPY)
    return real


class OpenFile(abc.ABC):
    """One open file of a stranger: what it holds, checked, and its bytes as they were then.

    Files are read with `pread` and never mapped: a mapped file that another program shortens kills
    the process.

    Args:
      path: what is opened.
      where: what errors call it.

    Attributes:
      entries: the tensors by name; each has at least shape and nbytes.
      stamp: size and time when it was opened.
    """

    area = ""  # what its error codes begin with
    missing = ""  # the code for no such file, if it is not AREA-MISSING

    def __init__(self, path: Path, where: str):
        self.where = where
        self.file = open_regular(path, missing=self.missing or f"{self.area}-MISSING")
        try:
            self.stamp = self.size_and_time()
            self.entries = self.read_entries()
        except BaseException:
            self.close()
            raise

    @abc.abstractmethod
    def read_entries(self) -> dict[str, Any]:
        """Checks the whole of the file but its tensors' bytes, and says which tensors it has."""

    def fill(self, view: memoryview, offset: int) -> None:
        """Reads bytes from `offset` on until `view` is full, or says that the file changed."""
        done = 0
        while done < len(view):
            got = os.preadv(self.file, [view[done : done + (1 << 30)]], offset + done)
            if got == 0:
                break
            done += got
        if done < len(view) or self.size_and_time() != self.stamp:
            found, hint = "changed while it was being read", "wait until its writer is done"
            raise InputError(f"{self.area}-CHANGED", self.where, found, hint=hint)

    def size_and_time(self) -> tuple[int, int]:
        status = os.fstat(self.file)
        return status.st_size, status.st_mtime_ns

    def close(self) -> None:
        """Closes the file; closing twice is allowed."""
        if self.file >= 0:
            os.close(self.file)
            self.file = -1


class WeightFile(OpenFile):
    """A file of dense tensors that are read as they are stored, one of a folder's or an adapter's.

    Each entry has a dtype too.
    """

    ending = ""  # of its name

    @abc.abstractmethod
    def read_bytes(self, entry: Any, out: np.ndarray) -> None:
        """Fills `out`: C-contiguous, and of exactly as many bytes as the entry."""

    @abc.abstractmethod
    def pieces(self, entry: Any, memory: np.ndarray) -> Iterator[np.ndarray]:
        """An entry's bytes, as many at a time as fit into `memory` (uint8), the next over them."""


def bytes_of(array: np.ndarray) -> memoryview:
    """The memory of a C-contiguous array."""
    return memoryview(array.reshape(-1).view(np.uint8))


def refuse_foreign(file: int, where: str, area: str) -> None:
    """Names what a file is that holds no weights but is often met in their place.

    Args:
      file: an open file.
      where: what errors call it.
      area: what their codes begin with, such as ST.

    Raises:
      InputError: ...-EMPTY, ...-LFS (Git-LFS pointer), ...-HTML, ...-GGUF.
    """
    size, head = os.fstat(file).st_size, os.pread(file, 1024, 0)
    if size == 0:
        raise InputError(f"{area}-EMPTY", where, "is empty (0 bytes)", "weights", AGAIN)
    if head.startswith(b"version https://git-lfs"):
        fields = dict(line.split(b" ", 1) for line in head.splitlines() if b" " in line)
        claim = fields.get(b"size", b"")
        real = f" of {int(claim) / 1e9:.3g} GB" if claim[:15].isdigit() and len(claim) < 16 else ""
        found = f"is a Git-LFS pointer ({size} bytes), not weights{real}"
        raise InputError(f"{area}-LFS", where, found, hint="git lfs pull")
    if head.lstrip()[:1] == b"<" and 0 not in head[:8]:  # a header's length ends with zeros
        found = f"is an HTML or XML page ({size} bytes), not weights"
        raise InputError(
            f"{area}-HTML", where, found, hint="download it again, logged in if needed"
        )
    if head.startswith(b"GGUF"):
        raise InputError(f"{area}-GGUF", where, "is a GGUF file", hint="name it NAME.gguf")
