"""Forty hostile PyTorch files: programs, bombs and archives that two readers read differently.

Each one that is `live` does its work when Python's own pickle reads it: it makes the file CANARY in
the current folder. The lists of fickling, picklescan and modelscan are where the kinds come from.
"""

import marshal
import pickle
import zlib
from dataclasses import dataclass, replace

import numpy as np

from tests.checkpoints.torch_writer import (
    EMPTY_DICT,
    EMPTY_TUPLE,
    MARK,
    ORDERED_DICT,
    REBUILD,
    REDUCE,
    START,
    STOP,
    Member,
    members_of,
    name,
    pickle_of,
    storage,
    tensor,
    text,
    tuple_of,
    zip_of,
)

CANARY = "canary"
PYTHON = f"open({CANARY!r}, 'w').close()"
SHELL = f"touch {CANARY}"
BIN, SAFE = "pytorch_model.bin", "model.safetensors"


@dataclass
class Case:
    """A hostile file.

    Attributes:
      content: the file.
      code: of the error that refuses it.
      program: the pickle in it, when Python's pickle runs it and the canary appears.
      named: the file's name in a model's folder.
    """

    content: bytes
    code: str
    program: bytes = b""
    named: str = BIN


class Touch:
    """An object whose pickle is a call of os.system."""

    def __reduce__(self) -> tuple:
        import os

        return os.system, (SHELL,)


def call(module: str, attribute: str, *arguments: bytes) -> bytes:
    return name(module, attribute) + tuple_of(*arguments) + REDUCE


def in_zip(pickle: bytes, code: str, live: bool = False, **storages: bytes) -> Case:
    """The pickle as data.pkl of an archive that is right."""
    stored = {key.lstrip("s"): data for key, data in storages.items()}
    return Case(zip_of(members_of(pickle, stored)), code, pickle if live else b"")


def program(*instructions: bytes, code: str = "PK-GLOBAL", live: bool = True) -> Case:
    """The value of a state dict's only entry is made by these instructions."""
    value = text("weight") + b"".join(instructions) + b"s"
    return in_zip(START + EMPTY_DICT + value + STOP, code, live)


def harmless(*instructions: bytes, code: str) -> Case:
    """One that does nothing in Python, for want of a module or because it is no program."""
    return program(*instructions, code=code, live=False)


OS = call("builtins", "__import__", text("os"))
EVIL = START + call("os", "system", text(SHELL)) + STOP
FOUR = np.float32([1, 2, 3, 4]).tobytes()
GOOD = pickle_of({"weight": tensor(storage("Float", "0", 4), 0, [4], [1])})
MEMBERS = members_of(GOOD, {"0": FOUR})
FUNCTION = marshal.dumps(compile(f"__import__('os').system({SHELL!r})", "x", "exec"))
LATIN = call("_codecs", "encode", text(FUNCTION.decode("latin-1")), text("latin-1"))

PROGRAMS = {
    "os.system": program(call("os", "system", text(SHELL))),
    "subprocess": program(call("subprocess", "getoutput", text(SHELL))),
    "eval": program(call("builtins", "eval", text(PYTHON))),
    "eval by its old name": program(call("__builtin__", "eval", text(PYTHON))),
    "getattr of an import": program(
        call("builtins", "getattr", OS, text("system")), tuple_of(text(SHELL)), REDUCE
    ),
    "importlib": program(
        call("builtins", "getattr", call("importlib", "import_module", text("os")), text("system")),
        tuple_of(text(SHELL)),
        REDUCE,
    ),
    "marshal": program(
        call("types", "FunctionType", call("marshal", "loads", LATIN), EMPTY_DICT),
        EMPTY_TUPLE,
        REDUCE,
    ),
    "runpy": program(call("runpy", "_run_code", text(PYTHON), EMPTY_DICT)),
    "methodcaller": program(
        call("operator", "methodcaller", text("system"), text(SHELL)), tuple_of(OS), REDUCE
    ),
    "numpy's f2py": program(
        call("numpy.f2py.crackfortran", "getlincoef", text(PYTHON), EMPTY_DICT)
    ),
    "numpy's runstring": program(  # at this place in some versions only
        call("numpy.testing._private.utils", "runstring", text(PYTHON), EMPTY_DICT), live=False
    ),
    "torch.load in it": harmless(call("torch", "load", text(CANARY)), code="PK-GLOBAL"),
    "a name in a known name": harmless(
        name("collections", "OrderedDict.fromkeys"), tuple_of(text("a")), REDUCE, code="PK-GLOBAL"
    ),
    "INST": program(MARK, text(SHELL), b"ios\nsystem\n", code="PK-OPCODE"),
    "OBJ": harmless(MARK, name("torch", "FloatStorage"), b"o", code="PK-OPCODE"),
    "NEWOBJ": harmless(name("torch", "FloatStorage"), EMPTY_TUPLE, b"\x81", code="PK-OPCODE"),
    "NEWOBJ_EX": harmless(ORDERED_DICT, EMPTY_TUPLE, EMPTY_DICT, b"\x92", code="PK-OPCODE"),
    "EXT1": harmless(b"\x82\x01", EMPTY_TUPLE, REDUCE, code="PK-OPCODE"),
    "STACK_GLOBAL": program(
        *(text("os"), text("system"), b"\x93", tuple_of(text(SHELL)), REDUCE), code="PK-OPCODE"
    ),
    "BUILD with __setstate__": harmless(
        *(ORDERED_DICT, EMPTY_DICT, text("__setstate__"), REBUILD, b"sb"), code="PK-BUILD"
    ),
    **{
        f"protocol {number}": in_zip(pickle.dumps(Touch(), number), "PK-PROTOCOL", live=True)
        for number in (0, 1, 3, 4, 5)
    },
    "bare pickle": Case(EVIL, "PT-PICKLE", EVIL),
    "legacy tar": Case(b"pickle".ljust(257, b"\0") + b"ustar\0".ljust(255, b"\0"), "PT-LEGACY"),
    "pickle named safetensors": Case(EVIL, "ST-HEADER", EVIL, SAFE),
}

# Lists of lists: the last one would have 10^20 members if someone walked it.
LAUGHS = b"]q\x00" + b"".join(
    b"](" + b"h%c" % level * 10 + b"eq%c" % (level + 1) for level in range(20)
)
TALL = b"".join(b"r" + number.to_bytes(4, "little") for number in range(400_000))

BOMBS = {
    "billion laughs": harmless(MARK, LAUGHS, b"t", code="PK-STATE"),
    "memory without end": harmless(b"N", TALL, code="PK-MEMO"),
    "stride 0 of 2^40": in_zip(
        pickle_of({"weight": tensor(storage("Float", "0", 4), 0, [2**20] * 2, [0, 0])}),
        "PK-STRIDE",
        s0=FOUR,
    ),
    "deep tuples": harmless(b"N", b"\x85" * 100_000, code="PK-DEPTH"),
    "text of 4 GB": harmless(b"X\xff\xff\xff\xff", code="PK-TRUNCATED"),
}

DEFLATED = zlib.compress(bytes(10 << 20), 9)[2:-4]
HOSTILE = replace(MEMBERS[0], data=EVIL)

ARCHIVES = {
    "two data.pkl": Case(zip_of([*MEMBERS, HOSTILE]), "PT-DOUBLE", EVIL),
    "another pickle": Case(zip_of([*MEMBERS, Member("m/constants.pkl", EVIL)]), "PT-MEMBER", EVIL),
    "an archive in it": Case(zip_of([*MEMBERS, Member("m/x.zip", zip_of(MEMBERS))]), "PT-MEMBER"),
    "broken checksum": Case(zip_of([replace(MEMBERS[0], crc=1), *MEMBERS[1:]]), "PT-CRC"),
    "compressed 1:1000": Case(
        zip_of([*MEMBERS[:2], replace(MEMBERS[2], data=DEFLATED, method=8), MEMBERS[3]]),
        "PT-COMPRESSED",
    ),
    "overlapping": Case(
        zip_of([replace(MEMBERS[0], size=len(GOOD) + 40), *MEMBERS[1:]]), "PT-OVERLAP"
    ),
    "two names": Case(
        zip_of([replace(HOSTILE, name="m/data/1", local_name="m/data.pkl"), *MEMBERS]),
        "PT-HEADER",
        EVIL,
    ),
}

CASES = PROGRAMS | BOMBS | ARCHIVES
