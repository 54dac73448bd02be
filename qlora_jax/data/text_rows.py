"""JSON lines, JSON and CSV to rows, strictly: every bad row has its file, its line and a reason.

These are read here and not through `datasets`, which infers one type a column (the text "1.0" of a
CSV becomes a number, an absent key becomes null) and names no line. A message never holds text of a
row: it may be private, and logs travel.
"""

import csv
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from qlora_jax.errors import InputError

MAX_LINE_BYTES = 16 << 20  # of one JSON line: about four million tokens, more than any model reads
BOM = b"\xef\xbb\xbf"


class Row(NamedTuple):
    """One row of a file: `value` is its columns, or the error that says why it has none."""

    where: str
    value: dict[str, Any] | InputError


def as_row(where: str, value: Any) -> Row:
    """The row, or the error that it is no object."""
    if isinstance(value, dict):
        return Row(where, value)
    return Row(where, InputError("DATA-OBJECT", where, f"the row is {kind(value)}", "an object"))


def kind(value: Any) -> str:
    """What a JSON value is, in the words of a JSON user and without its text."""
    names = {dict: "an object", list: "an array", str: "a string", bool: "a boolean"}
    return names.get(type(value), "null" if value is None else "a number")


class StrictJSON:
    """A JSON decoder that notes what the standard one lets pass: NaN, Infinity and doubled keys.

    They are noted and not raised, so that the end of the value is known and the next row is read.
    """

    def __init__(self):
        self.problem = ""
        self.decoder = json.JSONDecoder(
            object_pairs_hook=self.object, parse_constant=self.constant, parse_float=self.number
        )

    def object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(pairs)
        if len(fields) < len(pairs):
            self.problem = "an object has the same key twice (a doubled key)"
        return fields

    def constant(self, name: str) -> None:
        self.problem = f"{name} is not JSON"

    def number(self, text: str) -> float:
        if math.isinf(value := float(text)):
            self.problem = "a number is not finite"
        return value

    def decode(self, text: str, start: int, where: str) -> tuple[Row, int]:
        """The row that begins at `text[start]`, and its end; ValueError when it is no JSON."""
        self.problem = ""
        value, end = self.decoder.raw_decode(text, start)
        if self.problem:
            return Row(where, InputError("DATA-JSON", where, self.problem, "strict JSON")), end
        return as_row(where, value), end


def read_lines(path: Path) -> Iterator[Row]:
    """JSON lines: one object a line; lines end in LF or CRLF, blank ones are passed over."""
    with open(path, "rb") as file:
        for number, line in enumerate(bounded_lines(file), 1):
            where = f"{path}:{number}"
            try:
                if line is None or line.strip():
                    yield parse_line(line, where)
            except InputError as problem:
                yield Row(where, problem)


def bounded_lines(file: IO[bytes]) -> Iterator[bytes | None]:
    """The lines of `file`; None for one over the limit, which is read in pieces and not kept."""
    while line := file.readline(MAX_LINE_BYTES + 1):
        if len(line) <= MAX_LINE_BYTES:
            yield line
            continue
        while line and not line.endswith(b"\n"):
            line = file.readline(MAX_LINE_BYTES)
        yield None


def parse_line(line: bytes | None, where: str) -> Row:
    """The object of one line; InputError says in plain words what it is instead."""
    if line is None:
        raise InputError("DATA-LINE", where, f"a line of more than {MAX_LINE_BYTES:,} bytes")
    if line.startswith(BOM):
        found = "a byte order mark (BOM) before the row"
        raise InputError("DATA-BOM", where, found, hint="save the file as UTF-8 without BOM")
    if b"\0" in line:
        raise InputError("DATA-NUL", where, "a NUL byte", "text")
    try:
        text = line.decode().strip(" \t\r\n")
    except UnicodeDecodeError as problem:
        found = f"byte {problem.start + 1} of the line is not UTF-8"
        raise InputError("DATA-UTF8", where, found, hint="save the file as UTF-8") from None
    try:
        row, end = StrictJSON().decode(text, 0, where)
    except json.JSONDecodeError as problem:
        found = f"bad JSON at column {problem.colno}: {problem.msg}"
        raise InputError("DATA-JSON", where, found, "one object a line") from None
    except (ValueError, RecursionError):  # a number of over 4300 digits; brackets without end
        raise InputError("DATA-JSON", where, "bad JSON: too large or too deep") from None
    if end < len(text):
        found = f"bad JSON at column {end + 1}: more after the row's end"
        raise InputError("DATA-JSON", where, found, "one object a line")
    return row


def read_json(path: Path) -> Iterator[Row]:
    """A JSON array of objects; a .json file that begins otherwise is read as JSON lines.

    A row's line is the one on which it begins. After bad JSON nothing more can be read: it raises.
    """
    raw = path.read_bytes()
    if not raw.lstrip().startswith(b"["):
        yield from read_lines(path)
        return
    try:
        text = raw.decode()
    except UnicodeDecodeError as problem:
        line = raw.count(b"\n", 0, problem.start) + 1
        raise InputError("DATA-UTF8", f"{path}:{line}", "a byte that is not UTF-8") from None
    decoder, line, seen, number = StrictJSON(), 1, 0, 0

    def after_space(at: int) -> int:
        while at < len(text) and text[at] in " \t\r\n":
            at += 1
        return at

    at = after_space(text.index("[") + 1)
    while text[at : at + 1] != "]":
        line, seen = line + text.count("\n", seen, at), at
        number += 1
        where = f"{path}:{line} (row {number})"
        try:
            row, at = decoder.decode(text, at, where)
        except (ValueError, RecursionError) as problem:
            line = getattr(problem, "lineno", line)
            found = f"bad JSON: {getattr(problem, 'msg', 'too large or too deep')}"
            raise InputError("DATA-JSON", f"{path}:{line}", found, "an array of objects") from None
        yield row
        at = after_space(at)
        if text[at : at + 1] == ",":
            at = after_space(at + 1)
        elif text[at : at + 1] != "]":
            found = "bad JSON: the array goes on without a comma, or has no end"
            raise InputError("DATA-JSON", where, found, "an array of objects")
    if after_space(at + 1) < len(text):
        raise InputError("DATA-JSON", path, "bad JSON: more after the array's end")


def read_csv(path: Path) -> Iterator[Row]:
    """Comma (.csv) or tab (.tsv) separated text; the first line names the columns, all are text."""
    separator = "\t" if path.suffix.lower() == ".tsv" else ","
    # What is not UTF-8 becomes a lone surrogate, which the check of each field reports.
    with open(path, encoding="utf-8", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file, delimiter=separator, strict=True)
        try:
            header = next(reader, [])
        except csv.Error as problem:
            raise InputError("DATA-CSV", f"{path}:1", f"bad CSV: {problem}") from None
        if header and header[0].startswith("\ufeff"):
            hint = "save the file as UTF-8 without BOM"
            raise InputError("DATA-BOM", f"{path}:1", "a byte order mark (BOM)", hint=hint)
        if len(set(header)) < len(header):
            raise InputError("DATA-CSV", f"{path}:1", "a column name is doubled")
        while True:
            where = f"{path}:{reader.line_num + 1}"
            try:
                fields = next(reader, None)
                if fields is None:
                    return
                if fields and len(fields) != len(header):
                    found = f"{len(fields)} fields"
                    raise InputError("DATA-CSV", where, found, f"{len(header)}, as in the header")
                if fields:
                    yield Row(where, dict(zip(header, fields, strict=True)))
            except csv.Error as problem:
                yield Row(where, InputError("DATA-CSV", where, f"bad CSV: {problem}"))
            except InputError as problem:
                yield Row(where, problem)
