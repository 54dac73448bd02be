"""Files of strangers: opened so that nothing outside their folder is reached and nothing blocks."""

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from qlora_jax.errors import InputError

COPY = "copy the file itself into the folder"


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


def refuse_foreign(file: int, where: str) -> None:
    """Names what a file is that is no safetensors file but is often met in its place.

    Raises:
      InputError: ST-EMPTY, ST-LFS (Git-LFS pointer), ST-HTML, ST-ZIP (PyTorch's own), ST-GGUF.
    """
    size, head = os.fstat(file).st_size, os.pread(file, 1024, 0)
    if size == 0:
        raise InputError("ST-EMPTY", where, "is empty (0 bytes)", "weights", "download it again")
    if head.startswith(b"version https://git-lfs"):
        fields = dict(line.split(b" ", 1) for line in head.splitlines() if b" " in line)
        claim = fields.get(b"size", b"")
        real = f" of {int(claim) / 1e9:.3g} GB" if claim[:15].isdigit() and len(claim) < 16 else ""
        found = f"is a Git-LFS pointer ({size} bytes), not weights{real}"
        raise InputError("ST-LFS", where, found, hint="git lfs pull")
    if head.lstrip()[:1] == b"<" and 0 not in head[:8]:  # a header's length ends with zeros
        found = f"is an HTML or XML page ({size} bytes), not weights"
        raise InputError("ST-HTML", where, found, hint="download it again, logged in if needed")
    if head.startswith(b"PK\x03\x04"):
        found = "is a zip archive, as PyTorch's .bin and .pt files are"
        raise InputError("ST-ZIP", where, found, "safetensors", "save_pretrained in transformers")
    if head.startswith(b"GGUF"):
        raise InputError("ST-GGUF", where, "is a GGUF file", "safetensors", "name it NAME.gguf")
