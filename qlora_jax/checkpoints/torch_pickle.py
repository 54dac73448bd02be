"""The pickle of a PyTorch state dict, read without running it: it names tensors, and no more.

A pickle is a program. This is an interpreter of the few instructions that torch.save writes for a
state dict. A global is looked up in a table of ours and never imported; the only calls are to
rebuild a tensor from a storage, to wrap it as a parameter, and to make an empty OrderedDict.
Nothing is walked, hashed or printed that a file could have made deep or large.
"""

import math
import struct
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from qlora_jax.checkpoints.files import AGAIN, SAVE_AGAIN
from qlora_jax.checkpoints.torch_tensor import DTYPES, Storage, TorchEntry, span
from qlora_jax.errors import InputError

PROTOCOL = 2  # torch.save's own
STEPS_LIMIT = 1_000_000  # instructions, about a second; a tensor takes 40
MEMO_LIMIT = 300_000  # a tensor takes 9
STACK_LIMIT = 10_000  # pickle adds to a dict in batches of 1000
DEPTH_LIMIT = 100  # marks within marks
NAME_LIMIT = 512  # bytes
RANK_LIMIT = 8

# What PyTorch itself writes for dtypes that are not read; v3 is of float8 and unsigned ints.
UNREAD = {
    *(f"torch Complex{kind}Storage" for kind in ("Float", "Double")),
    *(f"torch Q{kind}Storage" for kind in ("Int8", "UInt8", "Int32")),
    "torch._utils _rebuild_tensor_v3",
    "torch.storage UntypedStorage",
}
WRAPPERS = ("state_dict", "model", "model_state_dict", "module", "net")


class Global(NamedTuple):
    """A name in the pickle that we know, standing for itself."""

    name: str


class Nested(tuple):
    """A tuple with a tuple in it: the arguments of a call. None goes deeper."""


REBUILD = Global("torch._utils _rebuild_tensor_v2")
PARAMETER = Global("torch._utils _rebuild_parameter")
ORDERED_DICT = Global("collections OrderedDict")
STORAGES = {f"torch {name}": Global(f"torch {name}") for name in DTYPES}
GLOBALS = {known.name: known for known in (REBUILD, PARAMETER, ORDERED_DICT)} | STORAGES

MARK = Global("a mark")  # on the stack, where the arguments of a call begin


def read_state(pickle: bytes, sizes: Mapping[str, int], where: str) -> dict[str, TorchEntry]:
    """The tensors of a state dict by name, in its order.

    Args:
      pickle: data.pkl.
      sizes: bytes of each storage, by key.
      where: the file, for errors.

    Raises:
      InputError: PK-...
    """
    state = Machine(pickle, sizes, where).run()
    if not isinstance(state, dict):
        raise InputError("PK-STATE", where, f"holds {kind(state)}", "a state dict", SAVE_AGAIN)
    for name, value in state.items():
        if isinstance(value, dict) and name in WRAPPERS:
            found = f"the state dict is wrapped: it is the entry {name!r} of another dict"
            hint = f'torch.save(torch.load(PATH)["{name}"], PATH), or {SAVE_AGAIN}'
            raise InputError("PK-WRAPPED", where, found, "the state dict itself", hint)
    for name, value in state.items():
        if not name or not name.isprintable() or len(name.encode()) > NAME_LIMIT:
            found = f"the tensor name {name[:80]!r}"
            raise InputError("PK-NAME", where, found, f"1 to {NAME_LIMIT} printable bytes")
        if not isinstance(value, TorchEntry):
            found = f"is {kind(value)}"
            raise InputError("PK-STATE", f"{where}: {name}", found, "a tensor", SAVE_AGAIN)
    return state


class Machine:
    """The stack machine of one pickle; `run` gives what the pickle holds."""

    def __init__(self, pickle: bytes, sizes: Mapping[str, int], where: str):
        self.pickle, self.sizes, self.where = pickle, sizes, where
        self.position, self.marks = 0, 0
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, Storage] = {}

    def run(self) -> Any:
        if self.pickle[:1] != b"\x80":
            raise self.bad("PK-PROTOCOL", "has no protocol", f"protocol {PROTOCOL}", SAVE_AGAIN)
        for _ in range(STEPS_LIMIT):
            code = self.take(1)[0]
            if code == STOP:
                return self.result()
            if code not in ACTS:
                found = f"the instruction 0x{code:02x} at byte {self.position - 1}"
                raise self.bad("PK-OPCODE", found, "those of a state dict", SAVE_AGAIN)
            ACTS[code](self)
        raise self.bad("PK-STEPS", "too many instructions", f"at most {STEPS_LIMIT}")

    def result(self) -> Any:
        """The one value that is left at the end."""
        value = self.pop()
        if self.stack:
            raise self.bad("PK-STACK", "more than one value is left at the end", "one")
        if self.position != len(self.pickle):
            raise self.bad("PK-TRAILING", "bytes behind its end", f"{self.position} bytes")
        return value

    def bad(self, code: str, found: str, expected: str = "", hint: str = AGAIN) -> InputError:
        return InputError(code, f"{self.where}: data.pkl", found, expected, hint)

    # Bytes in

    def take(self, count: int) -> bytes:
        piece = self.pickle[self.position : self.position + count]
        if len(piece) < count:
            raise self.bad("PK-TRUNCATED", f"is truncated at byte {self.position}")
        self.position += count
        return piece

    def unsigned(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little")

    def signed(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little", signed=True)

    def text(self, raw: bytes) -> str:
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise self.bad("PK-TEXT", f"no UTF-8 before byte {self.position}") from None

    def line(self) -> str:
        end = self.pickle.find(b"\n", self.position, self.position + 256)
        if end < 0:
            raise self.bad("PK-TEXT", f"no end of the name at byte {self.position}")
        return self.text(self.take(end + 1 - self.position)[:-1])

    # Stack and memo

    def top(self) -> Any:
        if not self.stack or self.stack[-1] is MARK:
            raise self.bad("PK-STACK", f"the stack is empty at byte {self.position}")
        return self.stack[-1]

    def pop(self) -> Any:
        value = self.top()
        self.stack.pop()
        return value

    def push(self, value: Any) -> None:
        self.stack.append(value)
        if len(self.stack) > STACK_LIMIT:
            raise self.bad("PK-STACK", "the stack grows", f"at most {STACK_LIMIT} values")

    def pop_to_mark(self) -> list[Any]:
        items = []
        while self.stack:
            if (value := self.stack.pop()) is MARK:
                self.marks -= 1
                return items[::-1]
            items.append(value)
        raise self.bad("PK-STACK", f"no mark at byte {self.position}")

    def mark(self) -> None:
        self.marks += 1
        if self.marks > DEPTH_LIMIT:
            raise self.bad("PK-DEPTH", "nested too deep", f"at most {DEPTH_LIMIT}")
        self.push(MARK)

    def protocol(self) -> None:
        found = self.take(1)[0]
        if found != PROTOCOL or self.position != 2:
            hint = f"torch.save without pickle_protocol, or {SAVE_AGAIN}"
            raise self.bad("PK-PROTOCOL", f"protocol {found}", f"{PROTOCOL}, once", hint)

    def put(self, index: int) -> None:
        self.memo[index] = self.top()
        if len(self.memo) > MEMO_LIMIT:
            raise self.bad("PK-MEMO", "too many remembered values", f"at most {MEMO_LIMIT}")

    def get(self, index: int) -> None:
        if index not in self.memo:
            raise self.bad("PK-MEMO", f"value {index} is not there at byte {self.position}")
        self.push(self.memo[index])

    # Values

    def long_number(self) -> None:
        size = self.unsigned(1)
        if size > 9:
            raise self.bad("PK-NUMBER", f"a number of {size} bytes", "64 bits")
        self.push(self.signed(size))

    def tuple_of(self, items: list[Any]) -> None:
        if any(type(item) is Nested for item in items):
            raise self.bad("PK-DEPTH", "tuples nested too deep", "a tuple in a tuple")
        flat = not any(type(item) is tuple for item in items)
        self.push(tuple(items) if flat else Nested(items))

    def last(self, count: int) -> list[Any]:
        return [self.pop() for _ in range(count)][::-1]

    def named(self) -> None:
        name = f"{self.line()} {self.line()}"
        if name not in GLOBALS:
            shown = name[:120].replace(" ", ".")
            if name in UNREAD:
                expected = f"one of {', '.join(DTYPES)}"
                raise self.bad("PK-DTYPE", f"holds {shown}", expected, SAVE_AGAIN)
            found = f"asks for {shown}, which no state dict needs"
            raise self.bad("PK-GLOBAL", found, "tensors only", "the model's safetensors")
        self.push(GLOBALS[name])

    def append(self, items: list[Any]) -> None:
        target = self.pop()
        if type(target) is not list:
            raise self.bad("PK-TARGET", f"appends to {kind(target)}", "a list")
        target += items
        self.push(target)

    def set_items(self, items: list[Any]) -> None:
        target = self.pop()
        if not isinstance(target, dict) or len(items) % 2:
            raise self.bad("PK-TARGET", f"sets {len(items)} items of {kind(target)}", "a dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) is not str:
                raise self.bad("PK-KEY", f"a key is {kind(key)}", "text")
            if key in target:
                raise self.bad("PK-KEY", f"the key {key[:80]!r} is doubled")
            target[key] = value
        self.push(target)

    # Calls

    def reduce(self) -> None:
        arguments, function = self.pop(), self.pop()
        call = type(arguments) in (tuple, Nested)
        if function is ORDERED_DICT and call and not arguments:
            self.push(OrderedDict())
        elif function is REBUILD and call:
            self.push(self.tensor(arguments))
        elif function is PARAMETER and call:
            self.push(self.parameter(arguments))
        else:
            raise self.bad("PK-REDUCE", f"calls {kind(function)}", "a known function", SAVE_AGAIN)

    def build(self) -> None:
        """PyTorch keeps versions of modules beside the entries; they say nothing about weights."""
        state, target = self.pop(), self.pop()
        versions = type(state) is dict and len(state) == 1 and "_metadata" in state
        if type(target) is not OrderedDict or not versions:
            found = f"sets the state of {kind(target)}"
            raise self.bad("PK-BUILD", found, "_metadata of a state dict", SAVE_AGAIN)
        self.push(target)

    def storage(self) -> None:
        fields = self.pop()
        if type(fields) is not tuple or len(fields) != 5 or fields[0] != "storage":
            raise self.bad("PK-STORAGE", f"a reference that is {kind(fields)}", "a storage")
        _, name, key, place, count = fields
        known = type(name) is Global and name.name in STORAGES
        if not known or type(key) is not str or type(place) is not str or not natural(count):
            raise self.bad("PK-STORAGE", "a reference of another form", "type, key, place, numbers")
        found = Storage(key, DTYPES[name.name.removeprefix("torch ")], count)
        if key not in self.sizes:
            raise self.bad("PK-STORAGE", f"data/{key[:80]} is not in the archive")
        if count * found.dtype.itemsize != self.sizes[key]:
            text = f"data/{key} has {self.sizes[key]} bytes"
            raise self.bad("PK-STORAGE", text, f"{count} numbers of {found.dtype.name}")
        if self.storages.setdefault(key, found) != found:
            raise self.bad("PK-STORAGE", f"data/{key} has two types", "one")
        self.push(found)

    def tensor(self, arguments: tuple[Any, ...]) -> TorchEntry:
        if len(arguments) != 6:
            raise self.bad("PK-TENSOR", f"a tensor of {len(arguments)} parts", "6", SAVE_AGAIN)
        storage, start, shape, stride, grad, hooks = arguments
        plain = natural(start) and naturals(shape) and naturals(stride)
        if type(storage) is not Storage or not plain or len(shape) != len(stride):
            expected = f"storage, start, shape and stride, of up to {RANK_LIMIT} sizes"
            raise self.bad("PK-TENSOR", "a tensor of another form", expected)
        self.check_flags(grad, hooks)
        if math.prod(filter(None, shape)) >= 2**59:
            raise self.bad("PK-TENSOR", f"a tensor of shape {shape}", "a size that a file can have")
        end = start + span(shape, stride)
        if end > storage.count or math.prod(shape) > storage.count:
            found = f"a tensor of shape {shape} and stride {stride} from {start} on"
            text = f"inside the {storage.count} numbers of data/{storage.key}"
            if end <= storage.count:  # some stand for several
                raise self.bad("PK-STRIDE", f"an expanded tensor: {found[2:]}", text, SAVE_AGAIN)
            raise self.bad("PK-STRIDE", found, text)
        return TorchEntry(storage.dtype, shape, storage, start, stride)

    def parameter(self, arguments: tuple[Any, ...]) -> TorchEntry:
        if len(arguments) != 3 or type(arguments[0]) is not TorchEntry:
            raise self.bad("PK-TENSOR", "a parameter of another form", "a tensor, grad, hooks")
        self.check_flags(*arguments[1:])
        return arguments[0]

    def check_flags(self, grad: Any, hooks: Any) -> None:
        if type(grad) is not bool or type(hooks) is not OrderedDict or hooks:
            raise self.bad("PK-HOOKS", "a tensor with hooks", "none", SAVE_AGAIN)


STOP = ord(".")
ACTS: dict[int, Callable[[Machine], None]] = {
    0x80: Machine.protocol,
    ord("("): Machine.mark,
    ord("}"): lambda m: m.push({}),
    ord("]"): lambda m: m.push([]),
    ord(")"): lambda m: m.push(()),
    ord("t"): lambda m: m.tuple_of(m.pop_to_mark()),
    0x85: lambda m: m.tuple_of(m.last(1)),
    0x86: lambda m: m.tuple_of(m.last(2)),
    0x87: lambda m: m.tuple_of(m.last(3)),
    ord("N"): lambda m: m.push(None),
    0x88: lambda m: m.push(True),
    0x89: lambda m: m.push(False),
    ord("J"): lambda m: m.push(m.signed(4)),
    ord("K"): lambda m: m.push(m.unsigned(1)),
    ord("M"): lambda m: m.push(m.unsigned(2)),
    0x8A: Machine.long_number,
    ord("G"): lambda m: m.push(struct.unpack(">d", m.take(8))[0]),
    ord("X"): lambda m: m.push(m.text(m.take(m.unsigned(4)))),
    ord("h"): lambda m: m.get(m.unsigned(1)),
    ord("j"): lambda m: m.get(m.unsigned(4)),
    ord("q"): lambda m: m.put(m.unsigned(1)),
    ord("r"): lambda m: m.put(m.unsigned(4)),
    ord("a"): lambda m: m.append(m.last(1)),
    ord("e"): lambda m: m.append(m.pop_to_mark()),
    ord("s"): lambda m: m.set_items(m.last(2)),
    ord("u"): lambda m: m.set_items(m.pop_to_mark()),
    ord("c"): Machine.named,
    ord("R"): Machine.reduce,
    ord("b"): Machine.build,
    ord("Q"): Machine.storage,
}


def natural(value: Any) -> bool:
    """Whether `value` is an int from 0 to 2^63 - 1; True is none."""
    return type(value) is int and 0 <= value < 2**63


def naturals(values: Any) -> bool:
    """Whether `values` is a tuple of few of them; a long one is not looked at."""
    return type(values) is tuple and len(values) <= RANK_LIMIT and all(map(natural, values))


def kind(value: Any) -> str:
    """A value in words, however large it is."""
    if type(value) is Global:
        return value.name.replace(" ", ".")
    return "a tensor" if type(value) is TorchEntry else f"a value of type {type(value).__name__}"
