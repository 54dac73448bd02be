"""Every rule for the pickle of a state dict has a bad one and an error of its own."""

import contextlib
import pickle
import struct
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_jax.checkpoints.torch_pickle import (
    ACTS,
    DEPTH_LIMIT,
    MEMO_LIMIT,
    STACK_LIMIT,
    STEPS_LIMIT,
    read_state,
)
from qlora_jax.errors import InputError
from tests.checkpoints.torch_writer import (
    EMPTY_DICT,
    EMPTY_TUPLE,
    MARK,
    ORDERED_DICT,
    REBUILD,
    REDUCE,
    START,
    STOP,
    dict_of,
    name,
    number,
    numbers,
    pickle_of,
    storage,
    tensor,
    text,
    tuple_of,
)

SIZES = {"0": 24, "1": 0}
SIX = storage("Float", "0", 6)
GOOD = tensor(SIX, 0, [2, 3], [3, 1])
NOTHING, TRUE, FALSE = b"N", b"\x88", b"\x89"
PARAMETER = name("torch._utils", "_rebuild_parameter")


def whole(*instructions: bytes) -> bytes:
    return START + b"".join(instructions) + STOP


def one(*value: bytes) -> bytes:
    return pickle_of({"a": b"".join(value)})


def rebuilt(*fields: bytes) -> bytes:
    return one(REBUILD, tuple_of(*fields), REDUCE)


def reference(*fields: bytes) -> bytes:
    return one(tensor(tuple_of(*fields) + b"Q", 0, [1], [1]))


CODES = [*ACTS, STOP[0], 0xFF]
FLOAT = name("torch", "FloatStorage")
HOOK = dict_of({"h": NOTHING})
VERSIONS = text("_metadata") + ORDERED_DICT + b"s"

BAD = {
    "nothing": (b"", "PK-PROTOCOL", "has no protocol"),
    "protocol 0": (pickle.dumps({}, 0), "PK-PROTOCOL", "has no protocol"),
    "protocol 1": (pickle.dumps({}, 1), "PK-PROTOCOL", "has no protocol"),
    "protocol 3": (pickle.dumps({}, 3), "PK-PROTOCOL", "protocol 3"),
    "protocol 5": (pickle.dumps({}, 5), "PK-PROTOCOL", "protocol 5"),
    "protocol twice": (START + whole(EMPTY_DICT), "PK-PROTOCOL", "protocol 2"),
    "no end": (START + EMPTY_DICT, "PK-TRUNCATED", "truncated at byte 3"),
    "cut number": (START + b"M\x01", "PK-TRUNCATED", "truncated at byte 3"),
    "cut text": (START + b"X\xff\xff\xff\xffabc", "PK-TRUNCATED", "truncated"),
    "bytes behind": (whole(EMPTY_DICT) + b"x", "PK-TRAILING", "bytes behind its end"),
    "unknown instruction": (whole(b"\xff"), "PK-OPCODE", "the instruction 0xff at byte 2"),
    "name without end": (START + b"cos" + b"s" * 300, "PK-TEXT", "no end of the name"),
    "no UTF-8": (whole(b"X\x01\0\0\0\xff"), "PK-TEXT", "no UTF-8"),
    "long number": (whole(b"\x8a\xff" + b"\1" * 255), "PK-NUMBER", "a number of 255 bytes"),
    "empty stack": (whole(b"s"), "PK-STACK", "the stack is empty"),
    "empty end": (START + STOP, "PK-STACK", "the stack is empty"),
    "two values": (whole(EMPTY_DICT, EMPTY_DICT), "PK-STACK", "more than one value"),
    "no mark": (whole(b"t"), "PK-STACK", "no mark"),
    "a mark as value": (whole(EMPTY_DICT, MARK, NOTHING, b"s"), "PK-STACK", "the stack is empty"),
    "high stack": (whole(NOTHING * (STACK_LIMIT + 1)), "PK-STACK", "the stack grows"),
    "memory never set": (whole(b"h\x07"), "PK-MEMO", "value 7 is not there"),
    "nothing to remember": (whole(b"q\x00"), "PK-STACK", "the stack is empty"),
    "long memory": (
        whole(NOTHING, *(b"r" + struct.pack("<I", i) for i in range(MEMO_LIMIT + 1))),
        "PK-MEMO",
        "too many remembered values",
    ),
    "endless": (whole(NOTHING, b"q\x00" * STEPS_LIMIT), "PK-STEPS", "too many instructions"),
    "deep marks": (whole(MARK * (DEPTH_LIMIT + 1)), "PK-DEPTH", "nested too deep"),
    "deep tuples": (whole(NOTHING, b"\x85" * 3), "PK-DEPTH", "tuples nested too deep"),
    "program": (one(name("os", "system")), "PK-GLOBAL", "asks for os.system"),
    "class of torch": (one(name("torch", "device")), "PK-GLOBAL", "asks for torch.device"),
    "name in a name": (one(name("torch", "FloatStorage.mro")), "PK-GLOBAL", "FloatStorage.mro"),
    "complex": (one(name("torch", "ComplexFloatStorage")), "PK-DTYPE", "ComplexFloatStorage"),
    "untyped": (one(name("torch.storage", "UntypedStorage")), "PK-DTYPE", "UntypedStorage"),
    "call of a text": (one(text("f"), EMPTY_TUPLE, REDUCE), "PK-REDUCE", "of type str"),
    "call of a type": (one(FLOAT, EMPTY_TUPLE, REDUCE), "PK-REDUCE", "torch.FloatStorage"),
    "call with a list": (one(REBUILD, b"]", REDUCE), "PK-REDUCE", "_rebuild_tensor_v2"),
    "dict of items": (
        one(name("collections", "OrderedDict"), b"]\x85", REDUCE),
        "PK-REDUCE",
        "calls collections.OrderedDict",
    ),
    "append to a dict": (one(EMPTY_DICT, NOTHING, b"a"), "PK-TARGET", "appends to a value of type"),
    "items of a list": (one(b"]", text("a"), NOTHING, b"s"), "PK-TARGET", "sets 2 items"),
    "odd items": (one(EMPTY_DICT, MARK, text("a"), b"u"), "PK-TARGET", "sets 1 items"),
    "items of a tensor": (one(GOOD, text("a"), NOTHING, b"s"), "PK-TARGET", "of a tensor"),
    "key no text": (whole(EMPTY_DICT, number(1), GOOD, b"s"), "PK-KEY", "of type int"),
    "key a tuple": (whole(EMPTY_DICT, EMPTY_TUPLE, GOOD, b"s"), "PK-KEY", "of type tuple"),
    "doubled key": (
        whole(EMPTY_DICT, (text("a") + GOOD + b"s") * 2),
        "PK-KEY",
        "the key 'a' is doubled",
    ),
    "state of a tensor": (one(GOOD, EMPTY_DICT, b"b"), "PK-BUILD", "the state of a tensor"),
    "state of a dict": (one(EMPTY_DICT, EMPTY_DICT, VERSIONS, b"b"), "PK-BUILD", "of type dict"),
    "other state": (one(ORDERED_DICT, HOOK, b"b"), "PK-BUILD", "of type OrderedDict"),
    "more than versions": (
        one(ORDERED_DICT, EMPTY_DICT, VERSIONS, text("x"), NOTHING, b"sb"),
        "PK-BUILD",
        "of type OrderedDict",
    ),
    "state no dict": (one(ORDERED_DICT, NOTHING, b"b"), "PK-BUILD", "of type OrderedDict"),
    "reference no tuple": (one(number(1), b"Q"), "PK-STORAGE", "of type int"),
    "reference of 6": (
        reference(text("storage"), FLOAT, text("0"), text("cpu"), number(6), NOTHING),
        "PK-STORAGE",
        "a reference that is",
    ),
    "reference of another kind": (
        reference(text("module"), FLOAT, text("0"), text("cpu"), number(6)),
        "PK-STORAGE",
        "a reference that is",
    ),
    "storage of no type": (
        reference(text("storage"), REBUILD, text("0"), text("cpu"), number(6)),
        "PK-STORAGE",
        "a reference of another form",
    ),
    "storage of a text": (
        reference(text("storage"), text("FloatStorage"), text("0"), text("cpu"), number(6)),
        "PK-STORAGE",
        "a reference of another form",
    ),
    "storage of a number": (
        reference(text("storage"), FLOAT, number(0), text("cpu"), number(6)),
        "PK-STORAGE",
        "a reference of another form",
    ),
    "storage at no place": (
        reference(text("storage"), FLOAT, text("0"), NOTHING, number(6)),
        "PK-STORAGE",
        "a reference of another form",
    ),
    "storage of -1": (one(storage("Float", "0", -1)), "PK-STORAGE", "another form"),
    "storage not there": (one(storage("Float", "7", 6)), "PK-STORAGE", "data/7 is not in"),
    "storage a path": (one(storage("Float", "../../x", 6)), "PK-STORAGE", "data/../../x"),
    "storage too large": (one(storage("Float", "0", 7)), "PK-STORAGE", "data/0 has 24 bytes"),
    "storage of 2^62": (one(storage("Float", "0", 2**62)), "PK-STORAGE", "data/0 has 24 bytes"),
    "storage of two types": (
        pickle_of({"a": GOOD, "b": tensor(storage("Int", "0", 6), 0, [6], [1])}),
        "PK-STORAGE",
        "data/0 has two types",
    ),
    "tensor of 7 parts": (
        rebuilt(SIX, number(0), numbers([6]), numbers([1]), FALSE, ORDERED_DICT, EMPTY_DICT),
        "PK-TENSOR",
        "a tensor of 7 parts",
    ),
    "tensor of no storage": (
        rebuilt(NOTHING, number(0), numbers([6]), numbers([1]), FALSE, ORDERED_DICT),
        "PK-TENSOR",
        "another form",
    ),
    "start below 0": (one(tensor(SIX, -1, [2], [1])), "PK-TENSOR", "another form"),
    "size below 0": (one(tensor(SIX, 0, [-1], [1])), "PK-TENSOR", "another form"),
    "stride below 0": (one(tensor(SIX, 5, [6], [-1])), "PK-TENSOR", "another form"),
    "size no number": (
        rebuilt(SIX, number(0), tuple_of(TRUE), numbers([1]), FALSE, ORDERED_DICT),
        "PK-TENSOR",
        "another form",
    ),
    "more sizes than strides": (one(tensor(SIX, 0, [2, 3], [1])), "PK-TENSOR", "another form"),
    "rank 9": (one(tensor(SIX, 0, [1] * 9, [1] * 9)), "PK-TENSOR", "of up to 8 sizes"),
    "empty and huge": (
        one(tensor(storage("Float", "1", 0), 0, [0, 2**60], [1, 1])),
        "PK-TENSOR",
        "a size that a file can have",
    ),
    "hooks": (one(tensor(SIX, 0, [6], [1], hooks=HOOK)), "PK-HOOKS", "with hooks"),
    "flag no flag": (
        rebuilt(SIX, number(0), numbers([6]), numbers([1]), number(1), ORDERED_DICT),
        "PK-HOOKS",
        "with hooks",
    ),
    "hooks no dict": (one(tensor(SIX, 0, [6], [1], hooks=NOTHING)), "PK-HOOKS", "with hooks"),
    "parameter of a number": (
        one(PARAMETER, tuple_of(number(1), TRUE, ORDERED_DICT), REDUCE),
        "PK-TENSOR",
        "a parameter of another form",
    ),
    "parameter with hooks": (
        one(PARAMETER, tuple_of(GOOD, TRUE, HOOK), REDUCE),
        "PK-HOOKS",
        "with hooks",
    ),
    "behind the storage": (one(tensor(SIX, 1, [2, 3], [3, 1])), "PK-STRIDE", "inside the 6"),
    "start behind": (one(tensor(SIX, 7, [0], [1])), "PK-STRIDE", "from 7 on"),
    "large stride": (
        one(tensor(SIX, 0, [2], [2**62])),
        "PK-STRIDE",
        "stride (4611686018427387904,",
    ),
    "stride 0": (one(tensor(SIX, 0, [7], [0])), "PK-STRIDE", "an expanded tensor"),
    "stride 0 of 2^40": (one(tensor(SIX, 0, [2**20] * 2, [0, 0])), "PK-STRIDE", "inside the 6"),
    "a list": (whole(b"]"), "PK-STATE", "holds a value of type list"),
    "a tensor alone": (whole(GOOD), "PK-STATE", "holds a tensor"),
    "a number in it": (one(number(1)), "PK-STATE", "of type int"),
    "a dict in it": (one(EMPTY_DICT), "PK-STATE", "of type dict"),
    "wrapped": (
        pickle_of({"epoch": number(3), "model": dict_of({"a": GOOD})}),
        "PK-WRAPPED",
        "it is the entry 'model'",
    ),
    "name empty": (pickle_of({"": GOOD}), "PK-NAME", "the tensor name ''"),
    "name long": (pickle_of({"a" * 70_000: GOOD}), "PK-NAME", "1 to 512"),
    "name not printable": (pickle_of({"a\x1b[0m": GOOD}), "PK-NAME", r"a\x1b[0m"),
}


@pytest.mark.parametrize("case", BAD)
def test_refuses(case):
    content, code, words = BAD[case]
    started = time.perf_counter()
    with pytest.raises(InputError) as error:
        read_state(content, SIZES, "x.bin")
    assert error.value.code == code, str(error.value)
    assert words in str(error.value)
    assert len(str(error.value)) < 500
    assert time.perf_counter() - started < 5  # seconds; about 1 on an idle machine


def test_instructions_are_the_few_of_torch_save():
    """Nothing that makes an object, imports by a value, or is of another protocol."""
    names = """
        PROTO MARK EMPTY_DICT EMPTY_LIST EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 NONE NEWTRUE
        NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE BINGET LONG_BINGET BINPUT
        LONG_BINPUT APPEND APPENDS SETITEM SETITEMS GLOBAL REDUCE BUILD BINPERSID
    """
    assert {getattr(pickle, each)[0] for each in names.split()} == ACTS.keys()


@pytest.mark.parametrize("code", sorted(set(range(256)) - ACTS.keys() - {ord(".")}))
def test_refuses_every_other_instruction(code):
    with pytest.raises(InputError, match="PK-OPCODE"):
        read_state(START + bytes([code]) + b"os\nsystem\n" * 9, {}, "x.bin")


def test_many_tensors_are_not_deep():
    names = [f"t{number}" for number in range(DEPTH_LIMIT + 1)]
    assert list(read_state(pickle_of(dict.fromkeys(names, GOOD)), SIZES, "x.bin")) == names


def test_a_remembered_tensor_is_the_same_tensor():
    state = whole(EMPTY_DICT, text("a"), GOOD, b"q\x05s", text("b"), b"h\x05s")
    found = read_state(state, SIZES, "x.bin")
    assert found["a"] is found["b"]


def test_lists_and_cycles_beside_the_weights_do_no_harm():
    """`_metadata` may hold anything; nobody looks into it."""
    cycle = b"]q\x01h\x01a" + number(1) + b"a" + MARK + NOTHING + b"G" + bytes(8) + b"e"
    state = text("_metadata") + cycle + b"s"
    found = read_state(whole(dict_of({"a": GOOD}), EMPTY_DICT, state, b"b"), SIZES, "x.bin")
    assert list(found) == ["a"]
    assert found["a"].shape == (2, 3)


@given(
    st.lists(st.tuples(st.integers(0, 400), st.integers(0, 2), st.sampled_from(CODES)), max_size=4)
)
def test_a_spoiled_pickle_is_read_or_refused(edits):
    """Whatever the instructions, nothing but tensors or an error of ours comes out."""
    spoiled = bytearray(pickle_of({"a": GOOD + b"q\x05", "b": tensor(SIX, 1, [5], [1])}))
    for place, removed, code in edits:
        spoiled[place : place + removed] = bytes([code])
    with contextlib.suppress(InputError):
        found = read_state(bytes(spoiled), SIZES, "x.bin")
        assert all(entry.span <= 6 for entry in found.values())
