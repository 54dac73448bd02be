"""What a saved folder holds, down to the digest of every file and leaf, and whether it still does.

A manifest is one line of JSON in a fixed form that ends with its own digest, so that every changed
byte of it shows; it is written last. Formats that others own do not notice a flipped bit (of 60 in
an Orbax data file, 60 were restored silently).
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from qlora_jax.checkpoints.files import inside, opened
from qlora_jax.checkpoints.strict_json import parse_json, read_json
from qlora_jax.errors import InputError, StorageError, listed

NAME = "manifest.json"
VERSION = 1
LIMIT_BYTES = 64 << 20
CHUNK = 1 << 20
DAMAGED = "another copy or an older checkpoint; this one is damaged"


def write_manifest(folder: Path, content: dict[str, Any]) -> None:
    """Writes `folder/manifest.json` with the digests of all files that are in `folder` by now.

    Raises:
      InputError: `content` holds what JSON does not have, such as NaN.
    """
    body = {"format_version": VERSION, **content, "files": digests(folder)}
    try:
        text = line(body)
        same = parse_json(text, NAME) == body
    except (TypeError, ValueError) as error:
        raise InputError("ORB-METADATA", "metadata", f"is not JSON: {error}") from None
    if not same:
        expected = "text keys, lists and finite numbers"
        raise InputError("ORB-METADATA", "metadata", "JSON does not give it back", expected)
    (folder / NAME).write_bytes(line({**body, "sha256": hashlib.sha256(text).hexdigest()}))


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of `folder`, itself verified; the files that it names are not looked at.

    Raises:
      InputError: ORB-MISSING, there is none; ORB-VERSION, a later version wrote it.
      StorageError: ORB-MANIFEST, a byte of it changed.
    """
    path = Path(folder) / NAME
    if not path.is_file():
        what = "has no manifest.json" if path.parent.is_dir() else "missing: no such folder"
        expected = "a folder that save_orbax wrote"
        raise InputError("ORB-MISSING", str(folder), what, expected)
    path = inside(folder, NAME)
    try:
        found = read_json(path, LIMIT_BYTES)
        body = {key: value for key, value in found.items() if key != "sha256"}
        whole = found.get("sha256") == hashlib.sha256(line(body)).hexdigest()
        if not whole or path.read_bytes() != line(found):
            raise StorageError("ORB-MANIFEST", str(path), "is damaged: its digest differs")
    except InputError as error:
        raise StorageError("ORB-MANIFEST", str(path), f"is damaged: {error.found}") from None
    if (version := found.get("format_version")) != VERSION:
        version = f"format version {version}"
        raise InputError("ORB-VERSION", str(path), version, str(VERSION), "a newer qlora-jax")
    return found


@contextlib.contextmanager
def understood(folder: str | Path) -> Iterator[None]:
    """A manifest whose digest is right may still be forged; what it cannot mean is one error.

    Raises:
      StorageError: ORB-MANIFEST.
    """
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        found = "describes nothing that save_orbax writes"
        raise StorageError("ORB-MANIFEST", str(Path(folder) / NAME), found, hint=DAMAGED) from error


def verify_files(folder: Path, manifest: dict[str, Any]) -> None:
    """Compares every file below `folder` with its digest.

    Raises:
      StorageError: ORB-FILES, naming those that are missing, changed or new.
    """
    saved, found = manifest["files"], digests(folder)
    problems = [f"{name} is missing" for name in sorted(saved.keys() - found.keys())]
    problems += [f"{name} is not in the manifest" for name in sorted(found.keys() - saved.keys())]
    problems += [
        f"{name} has {found[name]['bytes']} bytes instead of {saved[name]['bytes']}"
        if found[name]["bytes"] != saved[name]["bytes"]
        else f"{name} is damaged: its digest differs"
        for name in sorted(saved.keys() & found.keys())
        if saved[name] != found[name]
    ]
    if problems:
        raise StorageError("ORB-FILES", str(folder), listed(problems), hint=DAMAGED)


def digests(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file below `folder` but its manifest, by relative path."""
    names = sorted(
        os.path.relpath(os.path.join(root, name), folder)
        for root, _, files in os.walk(folder)
        for name in files
    )
    return {name: file_digest(inside(folder, name)) for name in names if name != NAME}


def file_digest(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of one file, read a piece at a time."""
    digest, size = hashlib.sha256(), 0
    with opened(path) as file:
        while piece := os.read(file, CHUNK):
            digest.update(piece)
            size += len(piece)
    return {"bytes": size, "sha256": digest.hexdigest()}


def array_digest(array: np.ndarray) -> str:
    """SHA-256 of the values in row-major order."""
    return hashlib.sha256(np.ascontiguousarray(array).reshape(-1).view(np.uint8)).hexdigest()


def line(body: dict[str, Any]) -> bytes:
    """The one form in which a manifest is written."""
    return json.dumps(body, allow_nan=False, separators=(",", ":")).encode() + b"\n"
