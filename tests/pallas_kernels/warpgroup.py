"""A warpgroup in NumPy: arrays spread over registers, and what kernels do to registers inline.

Which thread holds which element in which register is asked of Mosaic's layouts themselves: the
code that they generate for it is evaluated for all 128 threads. On top of that the functions that
kernels hand to `inline_mgpu` run as they are, their MLIR operations replaced by NumPy's and their
PTX executed (ptx.py), so that a register put in a wrong place is a wrong number here.
"""

import contextlib
import functools
import types
from collections.abc import Iterator
from unittest import mock

import numpy as np
from jax._src.interpreters import mlir
from jax._src.lib.mlir import ir
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import registers
from tests.pallas_kernels import ptx

THREADS, WARP = 128, 32
OPERATIONS = {
    "arith.addi": lambda a, b: a + b,
    "arith.muli": lambda a, b: a * b,
    "arith.divui": lambda a, b: a // b,
    "arith.remui": lambda a, b: a % b,
    "arith.index_cast": lambda a: a,
    "arith.index_castui": lambda a: a,
}


def evaluated(value: ir.Value):
    """What generated index arithmetic gives in each of the 128 threads of a block."""
    operation = value.owner
    name = operation.name
    if name == "arith.constant":
        return ir.IntegerAttr(operation.attributes["value"]).value
    if name in ("gpu.thread_id", "gpu.block_dim"):
        if "<x>" not in str(operation.attributes["dimension"]):
            return 0 if name == "gpu.thread_id" else 1
        return np.arange(THREADS) if name == "gpu.thread_id" else THREADS
    return OPERATIONS[name](*map(evaluated, operation.operands))


@functools.cache
def places(layout: plgpu.Layout, shape: tuple[int, ...]) -> np.ndarray:
    """(registers of a thread, 128 threads, elements of a register): flat places in the array."""
    layout = layout.to_mgpu()
    with mlir.make_ir_context(), ir.Location.unknown():
        module = ir.Module.create()
        with ir.InsertionPoint(module.body):
            first = [
                np.ravel_multi_index([evaluated(i) + np.zeros(THREADS, int) for i in index], shape)
                for index in layout.thread_idxs(shape)
            ]
    if hasattr(layout, "vec_size"):
        step, size = 1, layout.vec_size
    else:
        strides = [int(np.prod(shape[i + 1 :])) for i in range(len(shape))]
        step = layout.tiling.tile_strides(tuple(strides))[layout.vector_dim]
        size = layout.vector_length
    return np.stack(first)[..., None] + step * np.arange(size)


class Spread:
    """An array in a layout.

    Attributes:
      registers: object array as Mosaic shapes it; each is (4 warps, 32 lanes, elements).
    """

    def __init__(self, shape, layout: plgpu.Layout, registers: np.ndarray):
        self.shape, self.layout, self.registers = tuple(shape), layout, registers
        expected = layout.to_mgpu().registers_shape(self.shape)
        assert registers.shape == tuple(expected), (registers.shape, expected)

    @property
    def dtype(self):
        return self.registers.flat[0].dtype

    def astype(self, dtype) -> "Spread":
        return Spread(self.shape, self.layout, each(lambda r: r.astype(dtype), self.registers))

    def gathered(self) -> np.ndarray:
        """The array; what several threads hold must be the same in all."""
        where = places(self.layout, self.shape)
        values = np.stack([register.reshape(THREADS, -1) for register in self.registers.flat])
        result = np.zeros(self.shape, values.dtype)
        result.reshape(-1)[where] = values
        np.testing.assert_array_equal(result.reshape(-1)[where], values)
        assert len(np.unique(where)) == result.size, "some elements are in no register"
        return result


def each(function, registers: np.ndarray) -> np.ndarray:
    """An object array of the function of each register."""
    result = np.empty(registers.shape, dtype=object)
    for index, register in np.ndenumerate(registers):
        result[index] = function(register)
    return result


def spread(array: np.ndarray, layout: plgpu.Layout) -> Spread:
    """The array in a layout, as `plgpu.load` reads it."""
    array = np.asarray(array)
    where = places(layout, array.shape)
    registers = np.empty(layout.to_mgpu().registers_shape(array.shape), dtype=object)
    for i, index in enumerate(np.ndindex(registers.shape)):
        registers[index] = array.reshape(-1)[where[i]].reshape(THREADS // WARP, WARP, -1)
    return Spread(array.shape, layout, registers)


class Ref:
    """An array as a kernel sees memory: `ref.at[window]`, `ref.T`, `ref[...]`."""

    def __init__(self, array: np.ndarray):
        self.array = np.asarray(array)
        self.shape, self.dtype = self.array.shape, self.array.dtype

    @property
    def at(self):
        return Window(self.array)

    @property
    def T(self):
        return Ref(self.array.T)

    def __getitem__(self, index):
        return self.array[index]


class Window:
    """`ref.at`."""

    def __init__(self, array: np.ndarray):
        self.array = array

    def __getitem__(self, index):
        index = index if isinstance(index, tuple) else (index,)
        slices = [slice(i.start, i.start + i.size) if hasattr(i, "size") else i for i in index]
        return Ref(self.array[tuple(slices)])


def load(ref, *, layout, optimized=True) -> Spread:
    """plgpu.load."""
    return spread(getattr(ref, "array", ref), layout)


def inline_mgpu(*, arg_types, return_type):
    """plgpu.inline_mgpu: the function of registers runs on those of all threads at once."""

    def decorate(function):
        def run(*arrays):
            for array, layout in zip(arrays, arg_types, strict=True):
                assert array.layout.to_mgpu() == layout.to_mgpu()
            results = function(None, *arrays)
            if not isinstance(return_type, list):
                return result_of(results, return_type)
            return [result_of(*pair) for pair in zip(results, return_type, strict=True)]

        return run

    return decorate


def result_of(made: types.SimpleNamespace, promised) -> Spread:
    """An inline function's result; its type must be the promised one, all registers filled."""
    assert made.layout == promised.layout.to_mgpu()
    assert all(register is not None for register in made.registers.flat), "a register is empty"
    assert all(register.dtype == promised.dtype for register in made.registers.flat)
    return Spread(promised.shape, promised.layout, made.registers)


def bitcast(register, dtype):
    """mgpu.utils.bitcast, to the dtype that stands for an MLIR type here."""
    return np.ascontiguousarray(register).view(dtype)


def inline_asm(_, arguments, text, constraints):
    """llvm.inline_asm of registers of 32 bits: one result, or as many as the constraints say."""
    results = constraints.count("=r")
    out = ptx.run(text, *(argument[..., 0] for argument in arguments), results=results)
    out = [register[..., None] for register in out]
    return out[0] if results == 1 else out


def fragmented(*, _registers, _layout, _is_signed):
    """fragmented_array.FragmentedArray, until its shape is known."""
    return types.SimpleNamespace(registers=_registers, layout=_layout)


@contextlib.contextmanager
def on(*modules: types.ModuleType) -> Iterator[None]:
    """Within it these modules' functions of registers take and give `Spread` arrays."""
    fakes = {
        "plgpu": stand_in(plgpu, load=load, inline_mgpu=inline_mgpu),
        "mgpu": types.SimpleNamespace(
            utils=types.SimpleNamespace(
                bitcast=bitcast,
                dtype_to_ir_type=np.dtype,
                vector_concat=lambda vectors: np.concatenate(vectors, axis=-1),
                vector_slice=lambda vector, part: vector[..., part],
            )
        ),
        "ir": types.SimpleNamespace(
            IntegerType=types.SimpleNamespace(get_signless={32: np.dtype(np.uint32)}.get),
            F32Type=types.SimpleNamespace(get=lambda: np.dtype(np.float32)),
            VectorType=types.SimpleNamespace(get=lambda shape, element: element),
        ),
        "llvm": types.SimpleNamespace(
            StructType=types.SimpleNamespace(get_literal=lambda members: None),
            inline_asm=inline_asm,
            extractvalue=lambda _, struct, place: struct[place[0]],
        ),
        "arith": types.SimpleNamespace(mulf=lambda a, b: a * b),
        "fragmented_array": types.SimpleNamespace(FragmentedArray=fragmented),
    }
    with contextlib.ExitStack() as stack:
        for module in (registers, *modules):
            for name, fake in fakes.items():
                if hasattr(module, name):
                    stack.enter_context(mock.patch.object(module, name, fake))
        yield


def stand_in(module: types.ModuleType, **changed) -> types.SimpleNamespace:
    """A module's names, some of them changed."""
    return types.SimpleNamespace(**{name: getattr(module, name) for name in dir(module)} | changed)
