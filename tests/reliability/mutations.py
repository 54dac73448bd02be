"""Damage to files, drawn from a seeded generator: random, and aimed at what the formats count on.

A mutation gives the new bytes and how many numbers of what is loaded it may change: none, unless it
lies within the numbers themselves, where a format without checksums cannot show it.
"""

import json
import struct
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

from gguf import GGML_QUANT_SIZES

from tests.checkpoints.gguf_files import File, text
from tests.checkpoints.torch_writer import Member, zip_of
from tests.checkpoints.torch_writer import number as pickle_number

Mutated = tuple[bytes, int]  # the new bytes, and how many loaded numbers they may change

NUMBERS = (
    0, 1, -1, 2, 3, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**53 + 1, 2**63 - 1, 2**63,
    2**64 - 1, 2**64, -(2**63), 10**30, 0.5, -0.0, 1e-320, 1e308,
)  # fmt: skip
TEXTS = (
    "", " ", ".", "..", "../x", "/etc/passwd", "a\\b", "C:x", "a\0b", "\x1b[2J", "\u202e",
    "x" * 999, "F16", "F64", "I8", "BOOL", "F8_E4M3", "float16", "null", "NaN", "{{ 1 }}",
    "(a+)+$", "LORA", "llama", "gemma2", "yarn", "longrope", "dynamic", "linear",
    "sliding_attention", "\ud800",
)  # fmt: skip
RAW = (
    "NaN", "Infinity", "-Infinity", "1e999", "9" * 5000, "[" * 200 + "]" * 200, "{}}", "tru", "'a'",
    "[1,]", '{"a":1,"a":1}', "0x10", "+1", "01", ".5", '"\n"', '"\\ud800"', "/**/1", "",
)  # fmt: skip
LARGEST = 64 * 32  # numbers of the tiny model's largest tensor
INSTRUCTIONS = (
    *(bytes([code]) for code in b"(.0123FINSTVXcbdeghijlopqrstu)]}"),
    *(b"\x80\x05", b"\x85", b"\x86", b"\x87", b"\x88", b"\x89", b"\x8a\xff", b"\x93", b"\x81"),
    *(b"\x92", b"\x82\x01", b"\x95" + b"\xff" * 8, b"\x8b\xff\xff\xff\x7f", b"h\x00", b"h\xff"),
    *(b"cos\nsystem\n", b"cbuiltins\neval\n", b"j\xff\xff\xff\xff", b"q\x00", b"P1\n", b"N", b"Q"),
    *(b"r\xff\xff\xff\x7f", b"X\xff\xff\xff\xff", b"J\xff\xff\xff\xff", b"K\x00", b"2" * 1000),
    *(b"(" * 1000, b"]" * 500 + b"a" * 499),
)
MARK = "\u241fraw\u241f"  # stands for text that is no JSON


def bits(data: bytes, rng: Random, start: int = 0) -> Mutated:
    """One to four flipped bits; those from byte `start` on lie within numbers."""
    spoiled, touched = bytearray(data), 0
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        place = rng.randrange(len(data))
        spoiled[place] ^= 1 << rng.randrange(8)
        touched += place >= start
    return bytes(spoiled), touched


def bits_in_front(data: bytes, rng: Random, start: int) -> Mutated:
    """Flipped bits before byte `start`."""
    return bits(data[:start], rng)[0] + data[start:], 0


def pieces(data: bytes, rng: Random) -> Mutated:
    """Bytes cut off, taken out, put in or doubled, so that the length changes."""
    start = rng.randrange(len(data))
    end = min(len(data), start + rng.choice((1, 2, 3, 8, 64, 4096)))
    piece = data[start:end]
    return rng.choice(
        (
            data[:start],
            data[start:],
            data[:start] + data[end:],
            data[:end] + piece + data[end:],
            data[:start] + rng.randbytes(len(piece)) + data[start:],
            data + rng.randbytes(rng.choice((1, 7, 32, 64, 4096))),
            data + b"\0" * 4096,
        )
    ), 0


def number(rng: Random, size: int = 8) -> bytes:
    """A little-endian number that a length or count should not be, or just is not."""
    value = rng.choice([n for n in NUMBERS if isinstance(n, int)]) + rng.choice((-1, 0, 0, 1))
    return (value % (1 << 8 * size)).to_bytes(size, "little")


def value(rng: Random, old: Any) -> Any:
    """Another value than `old`: of another kind, out of range, or not JSON at all."""
    if isinstance(old, int | float) and not isinstance(old, bool) and rng.random() < 0.3:
        return rng.choice((old + 1, old - 1, -old, old * 2, old / 2, float(old), str(old), [old]))
    if isinstance(old, str) and rng.random() < 0.3:
        return rng.choice((old.upper(), old + " ", old[:-1], old * 2, "." + old, [old]))
    return rng.choice(
        (
            lambda: rng.choice(NUMBERS),
            lambda: rng.choice(TEXTS),
            lambda: MARK + rng.choice(RAW),
            lambda: rng.choice((None, True, False, [], {}, [[]], {"a": {}}, [None], [True])),
        )
    )()


def places(tree: Any, path: tuple = ()) -> Iterator[tuple]:
    """The path of every key and item of a JSON document."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, inner in items:
        yield (*path, key)
        if isinstance(inner, dict | list):
            yield from places(inner, (*path, key))


def json_tree(tree: Any, rng: Random, extra: tuple[str, ...] = ()) -> bytes:
    """A JSON document with one value, key or item spoiled; `extra` are keys that may be added."""
    tree = json.loads(json.dumps(tree))
    path = rng.choice(list(places(tree)))
    node = tree
    for key in path[:-1]:
        node = node[key]
    key = path[-1]
    acts = ["value", "value", "value", "value", "remove", "double"]
    acts += ["rename", "add", "double"] if isinstance(node, dict) else ["swap"]
    act = rng.choice(acts)
    if act == "value":
        node[key] = value(rng, node[key])
    elif act == "remove":
        del node[key]
    elif act == "rename":
        node[rng.choice((key + "_", key.upper(), rng.choice(TEXTS)))] = node.pop(key)
    elif act == "add":
        node[rng.choice((*extra, rng.choice(TEXTS)))] = value(rng, None)
    elif act == "swap":
        node[key], node[0] = node[0], node[key]
    elif isinstance(node, list):
        node.append(node[key])
    else:
        node[MARK + key] = node[key]
    return as_text(tree, rng)


def as_text(tree: Any, rng: Random) -> bytes:
    """JSON in which marked texts stand raw, and a marked key is its doubled self."""
    plain = json.dumps(tree, ensure_ascii=rng.random() < 0.5 or "\\ud800" in json.dumps(tree))
    for mark in (MARK, json.dumps(MARK)[1:-1]):
        while (start := plain.find(f'"{mark}')) >= 0:
            _, end = json.decoder.scanstring(plain, start + 1)
            inner = json.loads(plain[start:end])[len(MARK) :]
            is_key = plain[end : end + 1] == ":"
            plain = plain[:start] + (json.dumps(inner) if is_key else inner) + plain[end:]
    return plain.encode(errors="surrogatepass")


def json_file(data: bytes, rng: Random, extra: tuple[str, ...] = ()) -> Mutated:
    """A JSON file spoiled as a document, or as bytes."""
    if rng.random() < 0.15:
        return rng.choice((bits, pieces))(data, rng)[0], 0
    return json_tree(json.loads(data), rng, extra), 0


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


def scaled(mutated: Mutated, numbers: int) -> Mutated:
    """For a format in which a byte can change so many numbers."""
    return mutated[0], mutated[1] * numbers


def one_of(rng: Random, *weighted: tuple[Callable[[], Mutated], int]) -> Mutated:
    """What one of the functions gives, the heavier ones more often."""
    functions, weights = zip(*weighted, strict=True)
    return rng.choices(functions, weights)[0]()


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
