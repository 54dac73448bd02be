"""Where rows come from: a file, a folder with one file a split, what `datasets` saved, or a list.

Parquet and folders of `datasets`, which have types and no lines, are read by `datasets`: streamed,
so that nothing is cached on disk.
"""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from qlora_jax.data.text_rows import Row, as_row, read_csv, read_json, read_lines
from qlora_jax.errors import InputError, listed

LFS_POINTER = b"version https://git-lfs"


def read_rows(source: Any, *, split: str = "train") -> Iterator[Row]:
    """The rows of a file, a folder, a `datasets.Dataset` or any iterable of dicts, in their order.

    Args:
      source: a path that ends in .jsonl, .json (an array, or JSON lines), .csv, .tsv or .parquet; a
        folder with such a file for each split (`train.jsonl`), or as `datasets` saves it; or rows.
      split: which file of a folder.

    Raises:
      InputError: the file as a whole cannot be read. What is wrong with one row is in its `Row`.
    """
    if not isinstance(source, str | os.PathLike):
        return (as_row(f"row {number}", row) for number, row in enumerate(source, 1))
    path = Path(source)
    if path.is_dir():
        if any((path / name).exists() for name in ("dataset_dict.json", "dataset_info.json")):
            return read_saved(path, split)
        path = file_of_split(path, split)
    elif split != "train":
        raise InputError(
            "DATA-SPLIT", path, f"split {split} of a single file", "a folder", "split=train"
        )
    check_file(path)
    return READERS[path.suffix.lower()](path)


def file_of_split(folder: Path, split: str) -> Path:
    """The one data file `folder/SPLIT.suffix`."""
    found = [folder / f"{split}{suffix}" for suffix in READERS]
    found = [path for path in found if path.exists()]
    if len(found) != 1:
        names = listed(sorted(path.name for path in folder.iterdir())) or "no files"
        count = "several files" if found else "no file"
        raise InputError(
            "DATA-SPLIT", folder, f"{count} of split {split} in {names}", f"one {split}.jsonl"
        )
    return found[0]


def missing(path: str | Path, expected: str) -> InputError:
    """The error for a file that is not there."""
    return InputError("DATA-MISSING", path, "no such file", expected, "check the path")


def check_file(path: Path) -> None:
    """Refuse what is not a data file before a parser's own message hides the reason."""
    if not path.exists():
        raise missing(path, "a data file")
    if not path.is_file():
        raise InputError("DATA-FILE", path, "not a regular file", "a data file")
    if path.suffix.lower() not in READERS:
        raise InputError(
            "DATA-SUFFIX", path, f"unknown suffix {path.suffix!r}", " ".join(READERS), "rename it"
        )
    with open(path, "rb") as file:
        start = file.read(len(LFS_POINTER))
    if not start:
        raise InputError("DATA-EMPTY", path, "the file is empty", "at least one row")
    if start == LFS_POINTER:
        raise InputError("DATA-LFS", path, "a Git LFS pointer, not the data", hint="git lfs pull")


def read_parquet(path: Path) -> Iterator[Row]:
    """A Parquet file, a row group at a time; a row has a number and no line."""
    import datasets  # half a second that the other formats need not wait for

    try:
        rows = datasets.load_dataset("parquet", data_files=str(path), split="train", streaming=True)
        for number, row in enumerate(rows, 1):
            yield as_row(f"{path}:row {number}", without_nulls(row))
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as problem:
        found = f"not a whole Parquet file ({type(problem).__name__})"
        raise InputError("DATA-PARQUET", path, found, hint="download or write it again") from None


def read_saved(folder: Path, split: str) -> Iterator[Row]:
    """A folder as `datasets.Dataset.save_to_disk` or `DatasetDict.save_to_disk` writes it."""
    import datasets

    try:
        rows = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, RuntimeError, KeyError) as problem:
        found = f"not a whole saved dataset ({type(problem).__name__})"
        raise InputError("DATA-SAVED", folder, found, hint="save it again") from None
    if isinstance(rows, datasets.DatasetDict):
        if split not in rows:
            raise InputError("DATA-SPLIT", folder, f"no split {split}", listed(rows))
        rows = rows[split]
    for number, row in enumerate(rows, 1):
        yield as_row(f"{folder}:row {number}", without_nulls(row))


def without_nulls(value: Any) -> Any:
    """Arrow gives every row every key of its column, null where the row had none: take them out."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, Iterable) and not isinstance(value, str | bytes):
        return [without_nulls(item) for item in value]
    return value


READERS = {
    ".jsonl": read_lines,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_csv,
    ".parquet": read_parquet,
}
