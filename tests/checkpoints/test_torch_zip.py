"""Every rule for the archive of a PyTorch file has a bad one and an error of its own."""

import dataclasses
import struct

import numpy as np
import pytest

from qlora_jax.checkpoints.torch_file import PICKLE_LIMIT, TorchFile
from qlora_jax.errors import InputError
from tests.checkpoints.safetensors_files import one_tensor
from tests.checkpoints.torch_writer import (
    Member,
    members_of,
    pickle_of,
    storage,
    tensor,
    text,
    zip_of,
)

PICKLE = pickle_of({"a": tensor(storage("Float", "0", 2), 0, [2], [1])})
DATA = np.float32([1, 2]).tobytes()
MEMBERS = members_of(PICKLE, {"0": DATA})
GOOD = zip_of(MEMBERS)
DIRECTORY = struct.unpack("<I", GOOD[-6:-2])[0]
HEADER = GOOD.index(b"m/data/0") - 30  # of the storage
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4900000000\n"


def but(name: str, **fields) -> bytes:
    """The good archive with one member's records changed."""
    return zip_of(
        [
            dataclasses.replace(member, **fields) if member.name == f"m/{name}" else member
            for member in MEMBERS
        ]
    )


def beside(name: str | bytes, data: bytes = b"", **fields) -> bytes:
    """The good archive with a member more."""
    return zip_of([*MEMBERS, Member(name, data, **fields)])


def without(name: str) -> bytes:
    return zip_of([member for member in MEMBERS if member.name != f"m/{name}"])


def patched(content: bytes, place: int, new: bytes) -> bytes:
    """Bytes at a place changed, counted from the end when it is negative."""
    place %= len(content)
    return content[:place] + new + content[place + len(new) :]


def wide_end(length: int = 44, disk: int = 0, disks: int = 1, **plain: int) -> bytes:
    """The good archive with a 64-bit end too; `plain` changes what the other one says."""
    body, count, size = zip_of(MEMBERS)[:-22], len(MEMBERS), len(GOOD) - 22 - DIRECTORY
    numbers = (b"PK\6\6", length, 45, 45, 0, 0, count, count, size, DIRECTORY)
    record = struct.pack("<4sQHHIIQQQQ", *numbers)
    locator = struct.pack("<4sIQI", b"PK\6\7", disk, len(body), disks)
    return body + record + locator + zip_of(MEMBERS, **plain)[-22:]


WIDE = {"start": 0xFFFFFFFF}  # said to stand in 64 bits

BAD = {
    "empty": (b"", "PT-EMPTY", "is empty (0 bytes)"),
    "lfs": (LFS, "PT-LFS", "not weights of 4.9 GB"),
    "html": (b"<!DOCTYPE html><html>", "PT-HTML", "HTML"),
    "gguf": (b"GGUF\x03\0\0\0" + bytes(99), "PT-GGUF", "GGUF"),
    "safetensors": (one_tensor(), "PT-SAFETENSORS", "is a safetensors file"),
    "tar": (b"data".ljust(257, b"\0") + b"ustar\0", "PT-LEGACY", "before 1.6"),
    "pickle": (PICKLE, "PT-PICKLE", "is a bare pickle"),
    "pickle 0": (b"cos\nsystem\n(S'x'\ntR.", "PT-PICKLE", "is a bare pickle"),
    "text": (b"hello there", "PT-ZIP", "is no zip archive"),
    "something before": (b"#!/bin/sh\n" + GOOD, "PT-ZIP", "is no zip archive"),
    "cut": (GOOD[:-1], "PT-TRUNCATED", "no end of a zip archive"),
    "cut short": (GOOD[:10], "PT-TRUNCATED", "no end of a zip archive"),
    "something behind": (GOOD + b"\0", "PT-TRUNCATED", "no end of a zip archive"),
    "comment": (zip_of(MEMBERS, b"x" * 22), "PT-TRUNCATED", "no end of a zip archive"),
    "comment claimed": (patched(GOOD, -2, b"\1\0"), "PT-END", "contradicts itself"),
    "two disks": (patched(GOOD, -18, b"\1\0"), "PT-END", "contradicts itself"),
    "count on this disk": (patched(GOOD, -14, b"\1\0"), "PT-END", "contradicts itself"),
    "directory elsewhere": (zip_of(MEMBERS, start=3), "PT-END", "contradicts itself"),
    "directory in 64 bits, not there": (zip_of(MEMBERS, **WIDE), "PT-END", "contradicts itself"),
    "count in 64 bits, not there": (
        zip_of(MEMBERS, count=0xFFFF),
        "PT-END",
        "contradicts itself",
    ),
    "two ends that differ": (wide_end(count=3), "PT-END", "contradicts itself"),
    "64-bit end longer": (wide_end(length=45), "PT-END", "64-bit end is damaged"),
    "64-bit end elsewhere": (wide_end(disk=1), "PT-END", "64-bit end is damaged"),
    "64-bit end of two": (wide_end(disks=2), "PT-END", "64-bit end is damaged"),
    "hole before the end": (
        GOOD[:-22] + b"PK\1\2" + GOOD[-22:],
        "PT-END",
        "contradicts itself",
    ),
    "64-bit end damaged": (
        GOOD[:-22] + struct.pack("<4sIQI", b"PK\6\7", 0, 0, 1) + GOOD[-22:],
        "PT-END",
        "64-bit end is damaged",
    ),
    "fewer entries": (zip_of(MEMBERS, count=3), "PT-DIRECTORY", "directory is damaged"),
    "more entries": (zip_of(MEMBERS, count=5), "PT-DIRECTORY", "directory is damaged"),
    "entry's magic": (patched(GOOD, DIRECTORY, b"XX"), "PT-DIRECTORY", "directory is damaged"),
    "entry's name too long": (
        patched(GOOD, DIRECTORY + 28, b"\xff\xff"),
        "PT-DIRECTORY",
        "directory is damaged",
    ),
    "packed is not size": (
        patched(GOOD, DIRECTORY + 20, b"\1"),
        "PT-DIRECTORY",
        "directory is damaged",
    ),
    "another disk": (patched(GOOD, DIRECTORY + 34, b"\1"), "PT-DIRECTORY", "damaged"),
    "odd flag": (but("data/0", flags=1 << 5), "PT-DIRECTORY", "directory is damaged"),
    "64-bit size, not there": (but("data/0", size=0xFFFFFFFF), "PT-DIRECTORY", "damaged"),
    "encrypted": (but("data/0", flags=1), "PT-ENCRYPTED", "is encrypted"),
    "strongly encrypted": (but("data/0", flags=1 << 6), "PT-ENCRYPTED", "is encrypted"),
    "compressed": (but("data/0", method=8), "PT-COMPRESSED", "is compressed (method 8)"),
    "doubled": (beside("m/data/0", DATA), "PT-DOUBLE", "m/data/0: is in the archive twice"),
    "doubled pickle": (beside("m/data.pkl", PICKLE), "PT-DOUBLE", "is in the archive twice"),
    "dots": (beside("m/../../x"), "PT-NAME", "'m/../../x'"),
    "absolute": (beside("/m/data/1"), "PT-NAME", "'/m/data/1'"),
    "no folder": (beside("data.pkl", PICKLE), "PT-NAME", "'data.pkl'"),
    "a folder": (beside("m/"), "PT-NAME", "'m/'"),
    "backslash": (beside("m\\..\\x/version"), "PT-NAME", "x/version"),
    "no UTF-8": (beside(b"m/data/\xff"), "PT-NAME", r"\xff"),
    "NUL": (beside("m/data/1\0"), "PT-NAME", "m/data/1"),
    "long": (beside("m" * 600 + "/version"), "PT-NAME", "mmm"),
    "two folders": (beside("n/data/1"), "PT-FOLDER", "several folders: m, n"),
    "another pickle": (beside("m/other.pkl", PICKLE), "PT-MEMBER", "m/other.pkl"),
    "nested archive": (beside("m/data/1.zip", GOOD), "PT-MEMBER", "m/data/1.zip"),
    "storage no number": (beside("m/data/x"), "PT-MEMBER", "m/data/x"),
    "script": (beside("m/code/x.py"), "PT-MEMBER", "belongs to a TorchScript program"),
    "no pickle": (without("data.pkl"), "PT-MEMBER", "lacks data.pkl"),
    "no version": (without("version"), "PT-MEMBER", "lacks version"),
    "no members": (zip_of([Member("m/version", b"3\n")]), "PT-MEMBER", "lacks data.pkl"),
    "another name": (but("data/0", local_name="m/data/9"), "PT-HEADER", "contradicts"),
    "a longer name": (but("data/0", local_name="m/data/00"), "PT-HEADER", "contradicts"),
    "another flag": (patched(GOOD, HEADER + 6, b"\1"), "PT-HEADER", "contradicts"),
    "another method": (patched(GOOD, HEADER + 8, b"\x08"), "PT-HEADER", "contradicts"),
    "another checksum": (patched(GOOD, HEADER + 14, bytes(4)), "PT-HEADER", "contradicts"),
    "another size": (but("data/0", local_size=7), "PT-HEADER", "contradicts"),
    "no header there": (but("data/0", start=3), "PT-HEADER", "contradicts"),
    "overlapping": (
        but("data.pkl", size=len(PICKLE) + 9),
        "PT-OVERLAP",
        "inside the member before",
    ),
    "into the directory": (but("version", size=99), "PT-OVERLAP", "reach into the directory"),
    "begins in the directory": (but("data/0", start=DIRECTORY), "PT-OVERLAP", "begins at byte"),
    "version": (but("version", data=b"99\n"), "PT-VERSION", "version b'99"),
    "version no number": (but("version", data=b""), "PT-VERSION", "version b''"),
    "version long": (but("version", data=b"3" * 99), "PT-SIZE", "99 bytes"),
    "big-endian": (but("byteorder", data=b"big"), "PT-BYTEORDER", "byteorder b'big'"),
    "large pickle": (but("data.pkl", data=bytes(PICKLE_LIMIT + 1)), "PT-SIZE", "data.pkl"),
    "pickle's checksum": (but("data.pkl", crc=5), "PT-CRC", "the checksum of its"),
    "no pickle in it": (but("data.pkl", data=text("x")), "PK-PROTOCOL", "has no protocol"),
}


@pytest.mark.parametrize("case", BAD)
def test_refuses(tmp_path, case):
    content, code, words = BAD[case]
    path = tmp_path / "x.bin"
    path.write_bytes(content)
    with pytest.raises(InputError) as error:
        TorchFile(path, "x.bin")
    assert error.value.code == code, str(error.value)
    assert words in str(error.value)
    assert len(str(error.value)) < 500


def test_two_members_cannot_share_their_bytes(tmp_path):
    """Two entries of one local header: 1000 of them would be a bomb."""
    shared = Member("m/data/1", b"", crc=MEMBERS[2].true_crc(), size=len(DATA))
    shared.start = GOOD.index(b"PK\x03\x04", GOOD.index(b"little"))
    (tmp_path / "x.bin").write_bytes(zip_of([*MEMBERS, shared]))
    with pytest.raises(InputError, match=r"PT-HEADER|PT-OVERLAP"):
        TorchFile(tmp_path / "x.bin", "x.bin")


def test_an_end_in_64_bits_may_say_what_the_other_says(tmp_path):
    (tmp_path / "x.bin").write_bytes(wide_end())
    file = TorchFile(tmp_path / "x.bin", "x.bin")
    assert list(file.entries) == ["a"]
    file.close()


def test_checksums_behind_the_data_are_as_good(tmp_path):
    """As PyTorch writes: the member's own header has zeros for size and checksum."""
    (tmp_path / "x.bin").write_bytes(but("data/0", flags=8 | 1 << 11, local_size=0))
    file = TorchFile(tmp_path / "x.bin", "x.bin")
    out = np.empty(2, np.float32)
    file.read_bytes(file.entries["a"], out)
    file.close()
    assert out.tolist() == [1, 2]


@pytest.mark.parametrize(("count", "extra"), [(100_001, 0), (600, 60_000)])
def test_too_many_members(tmp_path, count, extra):
    """Or a directory that is too large, of 36 MB."""
    entry = Member("m/data/0", extra=bytes(extra)).central(0)
    with (tmp_path / "x.bin").open("wb") as file:
        file.write(GOOD[:DIRECTORY] + entry * count)
        length = count * len(entry)
        numbers = (0, 0, 0xFFFF, 0xFFFF, length, DIRECTORY)
        end = (b"PK\6\6", 44, 45, 45, 0, 0, count, count, length, DIRECTORY)
        file.write(struct.pack("<4sQHHIIQQQQ", *end))
        file.write(struct.pack("<4sIQI", b"PK\6\7", 0, DIRECTORY + length, 1))
        file.write(struct.pack("<4sHHHHIIH", b"PK\5\6", *numbers, 0))
    with pytest.raises(InputError, match=r"PT-COUNT.*at most 100000"):
        TorchFile(tmp_path / "x.bin", "x.bin")
