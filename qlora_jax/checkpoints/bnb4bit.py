"""4-bit weights as bitsandbytes serializes them, read and written bit for bit.

    NAME                                uint8 (ceil(n / 2), 1)   two codes a byte, n = out * in;
                                        the same bytes may be stored as another dtype (..., 1)
    NAME.absmax                         float32 (blocks,), or uint8 when double-quantized (nested)
    NAME.quant_map                      float32 (16,)            what each code stands for
    NAME.nested_absmax                  float32 (ceil(blocks / 256),)
    NAME.nested_quant_map               float32 (256,)
    NAME.quant_state.bitsandbytes__nf4  uint8: JSON (kind, block size, dense dtype, shape, offset)

Behaviour: `QuantState.as_dict` and `from_dict` of bitsandbytes 0.50; `int4` is a kind of ours.
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import numpy as np

from pallas_kernels.codebooks import CODEBOOKS, DYNAMIC_SIGNED
from pallas_kernels.quantize.api import BLOCK_SIZES, DoubleQuantized
from qlora_jax.checkpoints.aligned import aligned_empty
from qlora_jax.checkpoints.finite import check_finite
from qlora_jax.checkpoints.safetensors_header import Spec
from qlora_jax.checkpoints.shards import Shards
from qlora_jax.checkpoints.strict_json import parse_json
from qlora_jax.errors import InputError, listed
from qlora_jax.quantization.tensor import QuantizedTensor

STATE = "quant_state.bitsandbytes__"
SIDE = re.compile(r"(.+)\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..+)")
STATE_LIMIT = 4096  # bytes
NESTED_BLOCK = 256
DENSE_DTYPES = ("float32", "bfloat16", "float16")
FLOAT32_MAX = float(np.finfo(np.float32).max)
FIELDS = ("quant_type", "blocksize", "dtype", "shape")
NESTED_FIELDS = ("nested_blocksize", "nested_dtype", "nested_offset")
MAP_ATOL = 1e-6  # bitsandbytes calls states with maps this close equal
U8, F32 = np.dtype(np.uint8), np.dtype(np.float32)
# Dtypes in which transformers lets codes be stored, and their bytes.
STORAGES = {"uint8": 1, "int8": 1, "float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
UNKNOWN = math.nan  # the offset of scales that are not made yet
LONGEST = -2.2250738585072014e-308  # no float has more letters


@dataclass(frozen=True)
class QuantState:
    """What one 4-bit weight's JSON says: dense `shape` and `dtype`; `offset` None if not nested.

    An `offset` of UNKNOWN stands for one that is known only when the weight is quantized.
    """

    kind: str
    block_size: int
    dtype: str
    shape: tuple[int, ...]
    offset: float | None

    @property
    def unknown(self) -> bool:
        """Whether the offset is not known yet."""
        return self.offset is not None and math.isnan(self.offset)

    @property
    def blocks(self) -> int:
        return -(-math.prod(self.shape) // self.block_size)

    def to_json(self) -> np.ndarray:
        """The JSON as bitsandbytes spells it, as uint8."""
        fields: dict[str, Any] = {
            "quant_type": self.kind,
            "blocksize": self.block_size,
            "dtype": self.dtype,
            "shape": list(self.shape),
        }
        if self.offset is not None:
            fields["nested_blocksize"] = NESTED_BLOCK
            fields["nested_dtype"] = "float32"
            fields["nested_offset"] = self.offset
        return np.frombuffer(json.dumps(fields).encode(), np.uint8)

    def maps(self) -> dict[str, np.ndarray]:
        """The code tables that lie beside every weight."""
        maps = {"quant_map": CODEBOOKS[self.kind]}
        return maps if self.offset is None else maps | {"nested_quant_map": DYNAMIC_SIGNED}

    def specs(self) -> dict[str, Spec]:
        """Dtype and shape of the weight ("") and of all that lies beside it but the JSON."""
        scales = U8 if self.offset is not None else F32
        specs = {
            "": (U8, (-(-math.prod(self.shape) // 2), 1)),
            "absmax": (scales, (self.blocks,)),
            **{key: (F32, values.shape) for key, values in self.maps().items()},
        }
        if self.offset is not None:
            specs["nested_absmax"] = (F32, (-(-self.blocks // NESTED_BLOCK),))
        return specs

    def leaf_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of codes and absmax in a QuantizedTensor: by rows where blocks end with rows."""
        out, width = self.shape
        if width % self.block_size:
            return (-(-out * width // 2),), (self.blocks,)
        return (out, width // 2), (out, width // self.block_size)


def is_4bit(config: Mapping[str, Any], where: str) -> bool:
    """Whether config.json announces bitsandbytes' 4-bit weights.

    Raises:
      InputError: W4-METHOD for weights quantized in another way.
    """
    found = config.get("quantization_config")
    if found is None:
        return False
    fields = found if isinstance(found, dict) else {}
    if fields.get("quant_method") != "bitsandbytes" or fields.get("load_in_4bit") is not True:
        text = f"quantization_config has quant_method {fields.get('quant_method', found)!r:.80}"
        hint = "the unquantized model, which is quantized as it is loaded"
        raise InputError("W4-METHOD", where, text, "bitsandbytes with load_in_4bit", hint)
    return True


def is_beside(name: str) -> bool:
    """Whether a tensor belongs to a 4-bit weight instead of being one of the model's own."""
    return SIDE.fullmatch(name) is not None


def read_states(source: Shards) -> dict[str, QuantState]:
    """The QuantState of every 4-bit weight of a source by Hugging Face name, all keys checked.

    Raises:
      InputError: W4-KEYS, W4-STATE, W4-SHAPE: missing, unknown or wrong in any way; no defaults.
    """
    beside: dict[str, set[str]] = {}
    for name in source.names():
        if match := SIDE.fullmatch(name):
            beside.setdefault(match[1], set()).add(match[2])
    if not beside:
        found = "missing quant_state: config.json announces 4-bit weights, there are none"
        raise wrong("W4-KEYS", str(source.path), found)
    names = set(source.names())
    return {name: read_state(source, name, keys, names) for name, keys in beside.items()}


def read_state(source: Shards, name: str, keys: set[str], names: set[str]) -> QuantState:
    """One weight's state, and whether all that lies beside the weight agrees with it."""
    where = f"{source.path}: {name}"
    if name not in names:
        raise wrong("W4-KEYS", where, f"missing weight beside {listed(sorted(keys))}")
    found = sorted(key for key in keys if key.startswith("quant_state."))
    if unknown := [key for key in found if key.removeprefix(STATE) not in CODEBOOKS]:
        expected = f"{STATE} and one of {listed(CODEBOOKS)}"
        raise wrong("W4-KIND", where, f"unknown {listed(unknown)}", expected)
    if len(found) != 1:
        text = f"doubled quant_state: {listed(found)}" if found else "missing quant_state"
        raise wrong("W4-KEYS", where, text, "exactly one")
    key = f"{name}.{found[0]}"
    if source.dtype(key) != "uint8" or not 0 < math.prod(source.shape(key)) <= STATE_LIMIT:
        text = f"{found[0]} is {source.dtype(key)} of shape {source.shape(key)}"
        raise wrong("W4-SHAPE", where, text, f"uint8, up to {STATE_LIMIT} bytes of JSON")
    state = check_state(parse_json(source.read(key).tobytes(), where), found[0], where)
    specs = state.specs()
    wanted = specs.keys() - {""} | {found[0]}
    if missing := wanted - keys:
        raise wrong("W4-KEYS", where, f"missing {listed(sorted(missing))}")
    if extra := keys - wanted:
        raise wrong("W4-KEYS", where, f"unknown {listed(sorted(extra))}")
    nbytes = math.prod(specs.pop("")[1])
    stored, shape = source.dtype(name), source.shape(name)
    size = STORAGES.get(stored)
    if not size or nbytes % size or shape != (nbytes // size, 1):
        text = f"weight is {stored} of shape {shape}"
        expected = f"uint8 of shape {(nbytes, 1)}, or its bytes as one of {listed(STORAGES)}"
        raise wrong("W4-SHAPE", where, text, expected)
    for suffix, (dtype, shape) in specs.items():
        tensor = f"{name}.{suffix}"
        if (source.dtype(tensor), source.shape(tensor)) != (dtype.name, shape):
            text = f"{suffix} is {source.dtype(tensor)} of shape {source.shape(tensor)}"
            raise wrong("W4-SHAPE", where, text, f"{dtype.name} of shape {shape}")
    for suffix, values in state.maps().items():
        if not np.abs(source.read(f"{name}.{suffix}") - values).max() <= MAP_ATOL:
            raise wrong("W4-MAP", where, f"{suffix} is not the table of {state.kind}")
    return state


def wrong(code: str, where: str, found: str, expected: str = "") -> InputError:
    """An error about a file that only its writer can mend."""
    return InputError(code, where, found, expected, "quantize the model again")


def check_state(fields: dict[str, Any], key: str, where: str) -> QuantState:
    """The JSON of one weight, every field there and in range, no other field."""

    def refuse(field: str, expected: str) -> NoReturn:
        text = f"quant_state: {field} is {fields.get(field, 'missing')!r:.80}"
        raise wrong("W4-STATE", where, text, expected)

    def one_of(field: str, *choices: Any) -> Any:
        value = fields.get(field)
        if type(value) is not type(choices[0]) or value not in choices:
            refuse(field, f"one of {', '.join(map(str, choices))}")
        return value

    nested = any(field.startswith("nested_") for field in fields)
    if extra := fields.keys() - {*FIELDS, *(NESTED_FIELDS if nested else ())}:
        text = f"quant_state: unknown {listed(sorted(extra))}"
        raise wrong("W4-STATE", where, text, listed(FIELDS + NESTED_FIELDS))
    kind = one_of("quant_type", *(kind for kind in CODEBOOKS if key == STATE + kind))
    block_size = one_of("blocksize", *BLOCK_SIZES)
    dtype = one_of("dtype", *DENSE_DTYPES)
    shape = fields.get("shape")
    if type(shape) is not list or [type(n) for n in shape] != [int, int] or not in_range(shape):
        refuse("shape", "[out, in]")
    offset = None
    if nested:
        one_of("nested_blocksize", NESTED_BLOCK)
        one_of("nested_dtype", "float32")
        offset = fields.get("nested_offset")
        if type(offset) is not float or not abs(offset) <= FLOAT32_MAX:
            refuse("nested_offset", "a finite float32")
    return QuantState(kind, block_size, dtype, tuple(shape), offset)


def in_range(shape: list[int]) -> bool:
    """Whether each size is one that a matrix has."""
    return all(0 < size < 1 << 31 for size in shape)


def read_packed(
    source: Shards,
    names: list[str],
    states: list[QuantState],
    on_read: Callable[[str], None] = lambda name: None,
) -> QuantizedTensor:
    """The 4-bit weights `names`, alike but for their offsets, as one; leaves (len(names), ...).

    Args:
      on_read: called with each name when that weight is read.

    Raises:
      InputError: W-FINITE for a scale that is NaN or Inf.
    """
    first, count = states[0], len(names)
    codes_shape, absmax_shape = first.leaf_shapes()
    codes = aligned_empty((count, *codes_shape), np.uint8)
    absmax = aligned_empty((count, *absmax_shape), first.specs()["absmax"][0])
    nested = aligned_empty((count, -(-first.blocks // NESTED_BLOCK)), np.float32)
    for i, name in enumerate(names):
        source.read_into(name, codes[i])
        source.read_into(f"{name}.absmax", absmax[i])
        if first.offset is not None:
            source.read_into(f"{name}.nested_absmax", nested[i])
        on_read(name)
    key, scales = ("absmax", absmax) if first.offset is None else ("nested_absmax", nested)
    for name, values, state in zip(names, scales, states, strict=True):
        check_scales(values, state, str(source.path), f"{name}.{key}")
    if first.offset is not None:
        offsets = np.array([state.offset for state in states], np.float32)
        absmax = DoubleQuantized(absmax, nested, offsets)
    return QuantizedTensor(
        codes=codes,
        absmax=absmax,
        shape=first.shape,
        dtype=first.dtype,
        block_size=first.block_size,
        kind=first.kind,
        layout="bnb",
    )


def check_scales(values: np.ndarray, state: QuantState, where: str, name: str) -> None:
    """Refuses float32 scales of which one is not finite, or would not be behind the offset.

    Raises:
      InputError: W-FINITE with the name and the first index.
    """
    with np.errstate(over="ignore"):  # the largest scale that the offset leaves
        largest = np.abs(values) + np.float32(abs(state.offset or 0.0))
    check_finite(largest.reshape(-1), where, name)


def state_of(tensor: QuantizedTensor) -> QuantState:
    """The state of one 4-bit matrix."""
    nested = isinstance(tensor.absmax, DoubleQuantized)
    offset = float(tensor.absmax.offset) if nested else None
    return QuantState(tensor.kind, tensor.block_size, tensor.dtype, tuple(tensor.shape), offset)


def packed_specs(name: str, state: QuantState) -> dict[str, Spec]:
    """Names, dtypes and shapes of all tensors that one 4-bit weight becomes.

    The JSON of a state whose offset is not known has the most bytes that it can have.
    """
    specs = {f"{name}.{key}" if key else name: spec for key, spec in state.specs().items()}
    longest = replace(state, offset=LONGEST) if state.unknown else state
    return specs | {state_key(name, state): (U8, longest.to_json().shape)}


def packed_arrays(name: str, tensor: QuantizedTensor) -> dict[str, np.ndarray]:
    """The tensors of `packed_specs`: of one matrix, in bitsandbytes' code order, in NumPy.

    The codes are the last, so that they are written while the next weight is made.
    """
    state, scales = state_of(tensor), tensor.absmax
    arrays = {state_key(name, state): state.to_json()}
    arrays |= {f"{name}.{key}": values for key, values in state.maps().items()}
    if state.offset is not None:
        arrays[f"{name}.nested_absmax"] = scales.absmax.reshape(-1)
        scales = scales.codes
    return {**arrays, f"{name}.absmax": scales.reshape(-1), name: tensor.codes.reshape(-1, 1)}


def state_key(name: str, state: QuantState) -> str:
    """The name of the JSON of a 4-bit weight."""
    return f"{name}.{STATE}{state.kind}"
