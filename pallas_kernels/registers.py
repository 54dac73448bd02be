"""Registers within a GPU kernel: functions that take them apart, inline PTX, and storing them.

Mosaic has no byte permutes, no lookups and no shuffles, so the decoding of codes is written on the
registers of its arrays, through the public `plgpu.inline_mgpu`. Layouts say which lane holds what;
tests/pallas_kernels/test_layout.py proves from them that each value comes to its place.
"""

from collections.abc import Callable, Sequence

import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import fragmented_array
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

# A warpgroup's tile of codes, (rows, bytes), and of weights, (rows, 2 * bytes): a warp holds 4 rows
# of 64 weights at a time, a lane 8 neighbours: 4 bytes of codes, 8 weights.
CODES = plgpu.Layout.TILED(
    plgpu.Tiling(((16, 32), (4, 32), (4,))), warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1
)
WEIGHTS = plgpu.Layout.TILED(
    plgpu.Tiling(((16, 64), (4, 64), (8,))), warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1
)


def inline(arguments: Sequence, results):
    """Decorates `fill(new, *old)`, which puts registers of its arguments into those of its results.

    `old` are arrays of registers, one for each of the layouts in `arguments`; `new` is an empty one
    for `results`, a plgpu.ShapeDtypeStruct with a layout, or a list of them for a list.
    """
    many = isinstance(results, list)

    def decorate(fill: Callable[..., None]):
        @plgpu.inline_mgpu(arg_types=tuple(arguments), return_type=results)
        def run(_, *arrays):
            promised = results if many else [results]
            layouts = [each.layout.to_mgpu() for each in promised]
            new = [
                np.empty(layout.registers_shape(each.shape), dtype=object)
                for layout, each in zip(layouts, promised, strict=True)
            ]
            fill(new if many else new[0], *(array.registers for array in arrays))
            made = [
                fragmented_array.FragmentedArray(_registers=some, _layout=layout, _is_signed=None)
                for some, layout in zip(new, layouts, strict=True)
            ]
            return made if many else made[0]

        return run

    return decorate


def word(register):
    """A register of 32 bits as i32."""
    return mgpu.utils.bitcast(register, ir.IntegerType.get_signless(32))


def assembly(text: str, arguments: Sequence, results: int) -> list:
    """i32 registers: the results of PTX on these arguments."""
    i32 = ir.IntegerType.get_signless(32)
    constraints = ",".join(["=r"] * results + ["r"] * len(arguments))
    if results == 1:
        return [llvm.inline_asm(i32, arguments, text, constraints)]
    members = llvm.StructType.get_literal([i32] * results)
    out = llvm.inline_asm(members, arguments, text, constraints)
    return [llvm.extractvalue(i32, out, [i]) for i in range(results)]


def store(ref, value, *, optimized: bool = True) -> None:
    """`ref[...] = value`. Without `optimized`, in whatever transactions it takes.

    jax 0.12 has `plgpu.store`, which must be told where a layout makes coalesced stores impossible;
    jax 0.11 stores by assignment, and never insists.
    """
    if hasattr(plgpu, "store"):
        plgpu.store(ref, value, optimized=optimized)
    else:
        ref[...] = value
