"""The zip archive of a PyTorch file: where each member's bytes lie, after every rule is checked.

    NAME/data.pkl   what the tensors are called, and which bytes of which member they are
    NAME/byteorder  little
    NAME/data/0     the bytes of one storage, as they are in memory: never compressed
    NAME/version    of the format

Sizes, places and checksums are believed from the directory at the end, as the format demands, and
a member's own header must not contradict it. PyTorch does not verify checksums; we do, on reading.

Source: APPNOTE 6.3.10, sections 4.3 to 4.5; what torch.save writes (2.13, compared by hand).
"""

import os
import re
import struct
from typing import Any, NamedTuple

from qlora_jax.checkpoints.files import AGAIN, SAVE_AGAIN, refuse_foreign
from qlora_jax.errors import InputError, listed

MEMBERS_LIMIT = 100_000
DIRECTORY_LIMIT = 32 << 20  # bytes
NAME_LIMIT = 512  # bytes
BESIDE = {"data.pkl", "version", "byteorder"}
IGNORED = {".format_version", ".storage_alignment", ".data/serialization_id"}
STORAGE = re.compile(r"data/[0-9]{1,20}", re.ASCII)
SCRIPT = re.compile(r"(code|constants|ts_code)/|constants\.pkl")  # of torch.jit.save

LOCAL = struct.Struct("<4sHHHHHIIIHH")
CENTRAL = struct.Struct("<4sHHHHHHIIIHHHHHII")
END = struct.Struct("<4sHHHHIIH")
END64 = struct.Struct("<4sQHHIIQQQQ")
LOCATOR64 = struct.Struct("<4sIQI")
FULL16, FULL32 = 0xFFFF, 0xFFFFFFFF  # the number did not fit, and stands elsewhere in 64 bits
ENCRYPTED = 1 | 1 << 6 | 1 << 13
DESCRIPTOR, UTF8 = 1 << 3, 1 << 11  # sizes stand behind the data; the name is UTF-8

OLD_MAGIC = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."


class Member(NamedTuple):
    """One member's bytes: `size` of them from `offset` on, counted from the start of the file."""

    offset: int
    size: int
    crc: int


class Record(NamedTuple):
    """What the directory says about a member; `start` is where its own header is."""

    name: bytes
    flags: int
    method: int  # of compression; 0 is none
    crc: int
    size: int
    start: int


def read_members(file: int, where: str) -> dict[str, Member]:
    """The members of an open PyTorch file, by their names below the top folder.

    Raises:
      InputError: PT-...; `where` names the file.
    """
    refuse_foreign(file, where, "PT")
    size = os.fstat(file).st_size
    refuse_other_pickles(os.pread(file, 1024, 0), where)
    start, end, count = find_directory(file, size, where)
    records = read_records(os.pread(file, end - start, start), count, where)
    names = plain_names(records, where)
    members, previous = {}, 0
    for record in sorted(records, key=lambda record: (record.start, record.size)):
        name = names[record.name]
        member = locate(file, record, start, f"{where}: {name}")
        if record.start < previous:
            found = f"begins at byte {record.start}, inside the member before it"
            raise InputError("PT-OVERLAP", f"{where}: {name}", found, f"{previous} or later", AGAIN)
        previous = member.offset + member.size
        members[name] = member
    return members


def refuse_other_pickles(head: bytes, where: str) -> None:
    """Names PyTorch's older kinds of file, and what else is met under the name .bin."""
    if head.startswith(b"PK\x03\x04"):
        return
    if head[8:9] == b"{" and head[5:8] == bytes(3):
        found, hint = "is a safetensors file", "naming it NAME.safetensors"
        raise InputError("PT-SAFETENSORS", where, found, "PyTorch's zip format", hint)
    if head.startswith(OLD_MAGIC) or head[257:262] == b"ustar":
        found = "is in PyTorch's format of before 1.6"
        raise InputError("PT-LEGACY", where, found, "PyTorch's zip format", SAVE_AGAIN)
    if head[:1] == b"\x80" or head[:1] in b"(}]c":
        found = "is a bare pickle, which can hold a program"
        raise InputError("PT-PICKLE", where, found, "PyTorch's zip format", SAVE_AGAIN)
    raise InputError("PT-ZIP", where, "is no zip archive", "a file of torch.save", AGAIN)


def find_directory(file: int, size: int, where: str) -> tuple[int, int, int]:
    """First byte, end and number of entries of the directory, which the file's end names."""
    tail_start = max(0, size - END.size - LOCATOR64.size - END64.size)
    tail = os.pread(file, size - tail_start, tail_start)
    if len(tail) < END.size or tail[-END.size :][:4] != b"PK\x05\x06":
        raise InputError("PT-TRUNCATED", where, "is truncated: no end of a zip archive", "", AGAIN)
    _, disk, first, here, count, length, start, comment = END.unpack(tail[-END.size :])
    plain = (disk, first, here, count, length, start)
    end, wide = size - END.size, plain
    locator = tail[-END.size - LOCATOR64.size : -END.size]
    if locator[:4] == b"PK\x06\x07":
        end, wide = read_end64(tail, locator, tail_start, where)
    limits = (FULL16, FULL16, FULL16, FULL16, FULL32, FULL32)
    agree = all(p in (w, full) for p, w, full in zip(plain, wide, limits, strict=True))
    unread = wide is plain and any(p == f for p, f in zip(plain, limits, strict=True))
    disk, first, here, count, length, start = wide
    if comment or not agree or unread or disk or first or here != count or start + length != end:
        found = "the end of the zip archive contradicts itself or the file"
        raise InputError("PT-END", where, found, "one directory, right before it", AGAIN)
    if count > MEMBERS_LIMIT or length > DIRECTORY_LIMIT:
        found = f"{count} members in a directory of {length} bytes"
        expected = f"at most {MEMBERS_LIMIT}, {DIRECTORY_LIMIT} bytes"
        raise InputError("PT-COUNT", where, found, expected)
    return start, end, count


def read_end64(tail: bytes, locator: bytes, tail_start: int, where: str) -> tuple[int, tuple]:
    """Where the 64-bit end record is, and its numbers in the order of the plain one."""
    _, disk, position, disks = LOCATOR64.unpack(locator)
    record = tail[: -END.size - LOCATOR64.size]
    whole = len(record) == END64.size and record[:4] == b"PK\x06\x06"
    if not whole or disk or disks != 1 or position != tail_start:
        raise InputError("PT-END", where, "the zip archive's 64-bit end is damaged", "", AGAIN)
    _, length, _, _, *numbers = END64.unpack(record)
    if length != END64.size - 12:
        raise InputError("PT-END", where, "the zip archive's 64-bit end is damaged", "", AGAIN)
    return position, tuple(numbers)


def read_records(directory: bytes, count: int, where: str) -> list[Record]:
    """The directory's entries; it must be filled by them exactly."""
    records, position = [], 0
    for _ in range(count):
        head = directory[position : position + CENTRAL.size]
        if len(head) < CENTRAL.size or head[:4] != b"PK\x01\x02":
            raise damaged_directory(where)
        fields = CENTRAL.unpack(head)
        name_end = position + CENTRAL.size + fields[10]
        extra_end = name_end + fields[11]
        name = directory[position + CENTRAL.size : name_end]
        position = extra_end + fields[12]
        if position > len(directory):
            raise damaged_directory(where)
        records.append(read_record(fields, name, directory[name_end:extra_end], where))
    if position != len(directory):
        raise damaged_directory(where)
    return records


def read_record(fields: tuple[Any, ...], name: bytes, extra: bytes, where: str) -> Record:
    """One entry of the directory, with its 64-bit numbers put in place."""
    flags, method, crc, packed, size = fields[3], fields[4], *fields[7:10]
    disk, start = fields[13], fields[16]
    if size == FULL32 or packed == FULL32 or start == FULL32:
        wide = iter(wide_numbers(extra))
        try:
            size = next(wide) if size == FULL32 else size
            packed = next(wide) if packed == FULL32 else packed
            start = next(wide) if start == FULL32 else start
        except StopIteration:
            raise damaged_directory(where) from None
    if disk or (method == 0 and packed != size):
        raise damaged_directory(where)
    return Record(name, flags, method, crc, size, start)


def wide_numbers(extra: bytes) -> tuple[int, ...]:
    """The 64-bit numbers of an entry's extra field; none if it has none."""
    while len(extra) >= 4:
        kind, length = struct.unpack_from("<HH", extra)
        if kind == 1 and length % 8 == 0 and 4 + length <= len(extra):
            return struct.unpack_from(f"<{length // 8}Q", extra, 4)
        extra = extra[4 + length :]
    return ()


def plain_names(records: list[Record], where: str) -> dict[bytes, str]:
    """The members' names below the one top folder, each known and there once."""
    names, folders = {}, set()
    for record in records:
        name = checked_name(record.name, where)
        folder, _, rest = name.partition("/")
        folders.add(folder)
        if record.name in names:
            raise InputError("PT-DOUBLE", f"{where}: {name}", "is in the archive twice", "", AGAIN)
        if rest not in BESIDE | IGNORED and not STORAGE.fullmatch(rest):
            script = SCRIPT.match(rest)
            found = "belongs to a TorchScript program" if script else "is no member of torch.save's"
            raise InputError("PT-MEMBER", f"{where}: {name}", found, "a state dict", SAVE_AGAIN)
        names[record.name] = rest
    if len(folders) > 1:
        found = f"several folders: {listed(sorted(folders))}"
        raise InputError("PT-FOLDER", where, found, "one top folder")
    if missing := {"data.pkl", "version"} - set(names.values()):
        found = f"lacks {listed(sorted(missing))}"
        raise InputError("PT-MEMBER", where, found, "a file of torch.save", SAVE_AGAIN)
    return names


def checked_name(raw: bytes, where: str) -> str:
    """A member's name: printable, and a path that stays where it is."""
    name = raw.decode(errors="surrogateescape")
    parts = name.split("/")
    bad = not name.isprintable() or len(raw) > NAME_LIMIT or "\\" in name
    if bad or len(parts) < 2 or {"", ".", ".."} & set(parts):
        shown = raw[:80].decode(errors="backslashreplace")
        raise InputError("PT-NAME", where, f"the member name {shown!r}", "NAME/data.pkl and alike")
    return name


def locate(file: int, record: Record, limit: int, where: str) -> Member:
    """A member's bytes, from its own header, which must agree with the directory."""
    if record.flags & ENCRYPTED:
        raise InputError("PT-ENCRYPTED", where, "is encrypted", "a file of torch.save")
    if record.method:
        found = f"is compressed (method {record.method})"
        raise InputError("PT-COMPRESSED", where, found, "stored members", SAVE_AGAIN)
    if record.flags & ~(DESCRIPTOR | UTF8):
        raise damaged_directory(where)
    length = LOCAL.size + len(record.name)
    if record.start + length > limit:
        found = f"begins at byte {record.start}"
        raise InputError("PT-OVERLAP", where, found, f"an end before byte {limit}", AGAIN)
    head = os.pread(file, length, record.start)
    if len(head) < length:  # the file was longer a moment ago
        raise InputError("PT-TRUNCATED", where, "is truncated: its header is cut off", "", AGAIN)
    magic, _, flags, method, _, _, crc, packed, size, name, extra = LOCAL.unpack_from(head)
    unset = (0,) if record.flags & DESCRIPTOR else ()
    agree = (
        (magic, flags, method) == (b"PK\x03\x04", record.flags, 0)
        and name == len(record.name)
        and head[LOCAL.size :] == record.name
        and crc in (record.crc, *unset)
        and {packed, size} <= {record.size, FULL32, *unset}
    )
    if not agree:
        found = "its own header contradicts the directory"
        raise InputError("PT-HEADER", where, found, "the same name, size and checksum", AGAIN)
    offset = record.start + LOCAL.size + name + extra
    if offset + record.size > limit:
        found = f"{record.size} bytes from byte {offset} on reach into the directory"
        raise InputError("PT-OVERLAP", where, found, f"an end before byte {limit}", AGAIN)
    return Member(offset, record.size, record.crc)


def damaged_directory(where: str) -> InputError:
    """The error for entries that contradict themselves or their number."""
    return InputError("PT-DIRECTORY", where, "the zip archive's directory is damaged", "", AGAIN)
