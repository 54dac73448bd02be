"""Damage to files of each format, aimed at what it counts on: lengths, tables, instructions."""

import json
import struct
from collections.abc import Callable
from random import Random

from gguf import GGML_QUANT_SIZES

from tests.checkpoints.gguf_files import File, text
from tests.checkpoints.torch_writer import Member, zip_of
from tests.checkpoints.torch_writer import number as pickle_number
from tests.reliability.damage import (
    NUMBERS,
    TEXTS,
    Mutated,
    bits,
    bits_in_front,
    number,
    one_of,
    pieces,
    scaled,
)
from tests.reliability.json_mutations import json_file, json_tree

LARGEST = 64 * 32  # numbers of the tiny model's largest tensor
INSTRUCTIONS = (
    *(bytes([code]) for code in b"(.0123FINSTVXcbdeghijlopqrstu)]}"),
    *(b"\x80\x05", b"\x85", b"\x86", b"\x87", b"\x88", b"\x89", b"\x8a\xff", b"\x93", b"\x81"),
    *(b"\x92", b"\x82\x01", b"\x95" + b"\xff" * 8, b"\x8b\xff\xff\xff\x7f", b"h\x00", b"h\xff"),
    *(b"cos\nsystem\n", b"cbuiltins\neval\n", b"j\xff\xff\xff\xff", b"q\x00", b"P1\n", b"N", b"Q"),
    *(b"r\xff\xff\xff\x7f", b"X\xff\xff\xff\xff", b"J\xff\xff\xff\xff", b"K\x00", b"2" * 1000),
    *(b"(" * 1000, b"]" * 500 + b"a" * 499),
)


def safetensors(data: bytes, rng: Random) -> Mutated:
    """A safetensors file with damage to its length, its header, or its numbers."""
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])

    def length() -> Mutated:
        claim = rng.choice((number(rng), (start - 8 + rng.randrange(-9, 9)).to_bytes(8, "little")))
        return claim + data[8:], 0

    def document() -> Mutated:
        spoiled = json_tree(header, rng, ("__metadata__",))
        return struct.pack("<Q", len(spoiled)) + spoiled + data[start:], 0

    def shape_and_offsets() -> Mutated:
        fields = header[rng.choice([name for name in header if name != "__metadata__"])]
        field = rng.choice(("shape", "data_offsets"))
        fields[field][rng.randrange(len(fields[field]))] = rng.choice(NUMBERS[:18])
        spoiled = json.dumps(header).encode()
        return struct.pack("<Q", len(spoiled)) + spoiled + data[start:], 0

    def spaces() -> Mutated:
        spoiled = b" " * rng.randrange(2) + data[8:start] + rng.choice((b" ", b"\n", b"\0", b"}"))
        return struct.pack("<Q", len(spoiled)) + spoiled + data[start:], 0

    return one_of(
        rng,
        (length, 2),
        (document, 8),
        (shape_and_offsets, 4),
        (spaces, 1),
        (lambda: bits_in_front(data, rng, start), 3),
        (lambda: bits(data, rng, start), 2),
        (lambda: pieces(data, rng), 3),
    )


def gguf(make: Callable[[], File], rng: Random, block: int = 32) -> Mutated:
    """A GGUF file with damage to its counts, keys, tensor table, or numbers."""
    file = make()
    clean = file.tobytes()
    start = clean.rindex(text("output_norm.weight")) + len(text("output_norm.weight")) + 24

    def counts() -> Mutated:
        claims = [len(file.tensors), len(file.keys)]
        which = rng.randrange(2)
        claims[which] = rng.choice(
            (struct.unpack("<q", number(rng))[0], claims[which] + rng.choice((-1, 1)))
        )
        file.counts = tuple(claims)
        return file.tobytes(), 0

    def frame() -> Mutated:
        file.version = rng.choice((0, 1, 2, 4, 3 << 24, 2**32 - 1))
        return file.tobytes(), 0

    def key() -> Mutated:
        place = rng.randrange(len(file.keys))
        name, (kind, payload) = file.keys[place]
        file.keys[place] = rng.choice(
            (
                lambda: (name, (rng.choice((*range(14), 2**32 - 1)), payload)),
                lambda: (name, (kind, rng.randbytes(len(payload)))),
                lambda: (name, (kind, number(rng)[: len(payload)] + payload[8:])),
                lambda: (name, (kind, payload[:4] + number(rng) + payload[12:])),
                lambda: (rng.choice([text for text in TEXTS if text != "\ud800"]), (kind, payload)),
                lambda: file.keys[rng.randrange(len(file.keys))],
            )
        )()
        return file.tobytes(), 0

    def less() -> Mutated:
        del file.keys[rng.randrange(len(file.keys))]
        return file.tobytes(), 0

    def tensor() -> Mutated:
        name = rng.choice([n for n in file.tensors if n != "output.weight"])  # without it: tied
        dims, kind, payload = file.tensors[name]
        act = rng.choice(("dims", "rank", "kind", "offset", "name", "double", "remove", "payload"))
        if act == "dims":
            place = rng.randrange(len(dims))
            size = struct.unpack("<q", number(rng))[0]
            dims = (*dims[:place], rng.choice((size, dims[place] + 32, 32)), *dims[place + 1 :])
        elif act == "rank":
            dims = rng.choice(((), (*dims, 1), (*dims, *dims, *dims), dims[::-1]))
        elif act == "kind":
            kind = rng.choice((*range(42), 99, 2**32 - 1))
        elif act == "offset":
            file.offsets[name] = rng.choice((0, 32, 33, 2**40, 2**63, 2**64 - 32))
        elif act == "double":
            file.doubled = name
        elif act == "payload":
            payload = payload[: rng.randrange(len(payload) - 32)]  # more than padding makes up
        sizes = [GGML_QUANT_SIZES.get(k) for k in (file.tensors[name][1], kind)]
        alike = act == "kind" and sizes[0] == sizes[1]  # Q4_0 and IQ4_NL: nothing else tells them
        file.tensors[name] = dims, kind, payload
        if act == "name":
            other = rng.choice(("", "x" * 64, "blk.9.attn_q.weight", "../x", name + "\0"))
            file.tensors = {(other if n == name else n): t for n, t in file.tensors.items()}
        elif act == "remove":
            del file.tensors[name]
        return file.tobytes(), LARGEST * block // 32 if alike else 0

    return one_of(
        rng,
        (counts, 2),
        (frame, 1),
        (key, 6),
        (less, 1),
        (tensor, 6),
        (lambda: bits_in_front(clean, rng, start), 4),
        (lambda: scaled(bits(clean, rng, start), block), 2),
        (lambda: pieces(clean, rng), 3),
    )


def torch(make: Callable[[], list[Member]], rng: Random) -> Mutated:
    """A .bin file with damage to its archive or, under checksums that are right, to its pickle.

    Without checksums a pickle can be as good as the clean one and name other places of a storage.
    """
    members = make()
    clean = zip_of(members)
    pickle = members[0].data

    def damaged_pickle() -> Mutated:
        members[0].data = rng.choice((bits, pieces))(pickle, rng)[0]
        return zip_of(members), 4 * LARGEST

    def instruction() -> Mutated:
        start = rng.randrange(len(pickle))
        put = rng.choice(INSTRUCTIONS)
        cut = rng.choice((0, 1, len(put)))
        members[0].data = pickle[:start] + put + pickle[start + cut :]
        return zip_of(members), LARGEST

    def sizes() -> Mutated:
        found = [place for place in range(len(pickle)) if pickle[place : place + 1] in b"KM"]
        start = rng.choice(found)
        put = pickle_number(rng.choice([n for n in NUMBERS if isinstance(n, int)]))
        members[0].data = pickle[:start] + put + pickle[start + 2 + (pickle[start] == 77) :]
        return zip_of(members), LARGEST

    def member() -> Mutated:
        place = rng.randrange(len(members))
        one = members[place]
        act = rng.randrange(10)
        large = int.from_bytes(number(rng, 4), "little")
        if act == 0:
            one.crc = large
        elif act == 1:
            one.size = large
        elif act == 2:
            one.start = large
        elif act == 3:
            one.flags = rng.choice((1, 8, 0x40, 0x800))
        elif act == 4:
            one.method = rng.choice((1, 8, 12, 14, 93))
        elif act == 5:
            one.local_name = "m/other"
        elif act == 6:
            one.local_size = large
        elif act == 7:
            one.name = rng.choice(("m/../x", "/m/x", "m/data/x", "m/other.pkl", "", "M/data/0"))
        elif act == 8:
            members.append(one)
        else:
            del members[place]
        return zip_of(members), 0

    def end() -> Mutated:
        field = rng.choice(("count", "length", "start"))
        claim = int.from_bytes(number(rng, 2 if field == "count" else 4), "little")
        return zip_of(members, **{field: claim}), 0

    return one_of(
        rng,
        (damaged_pickle, 5),
        (instruction, 5),
        (sizes, 5),
        (member, 5),
        (end, 2),
        (lambda: (bits(clean, rng)[0], 0), 4),
        (lambda: pieces(clean, rng), 4),
    )


def anything(data: bytes, rng: Random) -> Mutated:
    """Damage to a file of any format, from which no number may come out changed."""
    if not data:
        return rng.randbytes(8), 0
    if data[:1] == b"{" and rng.random() < 0.4:
        try:
            return json_file(data, rng)
        except ValueError:
            pass
    spoiled = rng.choice((bits, pieces))(data, rng)[0]
    return (spoiled if spoiled != data else data + b"x"), 0
