"""A PyTorch .bin file of a state dict, read without PyTorch: one tensor in memory at a time."""

import zlib
from collections.abc import Iterator

import numpy as np

from qlora_jax.checkpoints.files import AGAIN, WeightFile, bytes_of
from qlora_jax.checkpoints.torch_pickle import read_state
from qlora_jax.checkpoints.torch_tensor import TorchEntry
from qlora_jax.checkpoints.torch_zip import Member, read_members
from qlora_jax.errors import InputError

PICKLE_LIMIT = 16 << 20  # bytes; a tensor takes about 200
SMALL_LIMIT = 64  # bytes of version and byteorder
PIECE = 4 << 20  # bytes read and summed together, while they are in the cache
VERSIONS = [b"%d" % number for number in range(1, 11)]  # that PyTorch reads


class TorchFile(WeightFile):
    """One open file of torch.save: its checked entries, and their bytes.

    A storage's checksum is verified when it is first read, all of it, whatever part is asked for.

    Raises:
      InputError: PT-... for the file, PK-... for the pickle in it.
    """

    area, ending = "PT", "bin"

    def read_entries(self) -> dict[str, TorchEntry]:
        """The tensors by name, in the state dict's order; tied ones have the same storage."""
        self.members = read_members(self.file, self.where)
        self.verified: set[Member] = set()
        version = self.whole("version", SMALL_LIMIT)
        if version.rstrip(b"\n") not in VERSIONS:
            raise InputError("PT-VERSION", self.where, f"version {version!r}", "1 to 10", AGAIN)
        order = self.whole("byteorder", SMALL_LIMIT) if "byteorder" in self.members else b"little"
        if order != b"little":
            raise InputError("PT-BYTEORDER", self.where, f"byteorder {order!r}", "little")
        pickle = self.whole("data.pkl", PICKLE_LIMIT)
        storages = {
            name.removeprefix("data/"): member.size
            for name, member in self.members.items()
            if name.startswith("data/")
        }
        return read_state(pickle, storages, self.where)

    def whole(self, name: str, limit: int) -> bytes:
        """A member that is no storage."""
        member = self.members[name]
        if member.size > limit:
            found = f"{member.size} bytes"
            raise InputError("PT-SIZE", f"{self.where}: {name}", found, f"at most {limit}", AGAIN)
        out = np.empty(member.size, np.uint8)
        self.read_member(member, 0, bytes_of(out))
        return out.tobytes()

    def read_bytes(self, entry: TorchEntry, out: np.ndarray) -> None:
        """Fills `out`; a tensor that is not contiguous needs its span of the storage besides."""
        assert out.nbytes == entry.nbytes, (out.nbytes, entry)
        member = self.members[f"data/{entry.storage.key}"]
        start = entry.start * entry.dtype.itemsize
        if entry.contiguous:
            self.read_member(member, start, bytes_of(out))
            return
        flat = np.empty(entry.span, entry.dtype)
        self.read_member(member, start, bytes_of(flat))
        strides = [step * entry.dtype.itemsize for step in entry.stride]
        strided = np.lib.stride_tricks.as_strided(flat, entry.shape, strides, writeable=False)
        np.copyto(out.reshape(-1).view(entry.dtype).reshape(entry.shape), strided)

    def pieces(self, entry: TorchEntry, memory: np.ndarray) -> Iterator[np.ndarray]:
        """An entry's bytes, as many at a time as fit into `memory` (uint8), the next over them."""
        member = self.members[f"data/{entry.storage.key}"]
        first = entry.start * entry.dtype.itemsize
        whole = np.empty(0 if entry.contiguous else entry.nbytes, np.uint8)
        if len(whole):
            self.read_bytes(entry, whole)
        for start in range(0, entry.nbytes, len(memory)):
            piece = memory[: entry.nbytes - start]
            if len(whole):
                piece[...] = whole[start : start + len(piece)]
            else:
                self.read_member(member, first + start, bytes_of(piece))
            yield piece

    def read_member(self, member: Member, start: int, view: memoryview) -> None:
        """Bytes of a member from `start` on; at the first time all of it is read and summed."""
        if member in self.verified:
            self.fill(view, member.offset + start)
            return
        crc, end = 0, start + len(view)
        scratch = memoryview(bytearray(min(PIECE, max(start, member.size - end))))
        for begin, stop in ((0, start), (start, end), (end, member.size)):
            for position in range(begin, stop, PIECE):
                size = min(PIECE, stop - position)
                inside = begin == start and stop == end
                piece = view[position - start :][:size] if inside else scratch[:size]
                self.fill(piece, member.offset + position)
                crc = zlib.crc32(piece, crc)
        if crc != member.crc:
            found = f"the checksum of its {member.size} bytes at byte {member.offset} is wrong"
            hint = AGAIN if member.crc else "torch.save with checksums, as is its default"
            raise InputError("PT-CRC", self.where, found, f"{member.crc:08x}, not {crc:08x}", hint)
        self.verified.add(member)
