"""Registers to memory, as each jax that we support spells it.

jax 0.12 has `plgpu.store`, which must be told where a layout makes coalesced stores impossible;
jax 0.11 stores by assignment, and never insists.
"""

from jax.experimental.pallas import mosaic_gpu as plgpu


def store(ref, value, *, optimized: bool = True) -> None:
    """In a kernel: `ref[...] = value`. Without `optimized`, in whatever transactions it takes."""
    if hasattr(plgpu, "store"):
        plgpu.store(ref, value, optimized=optimized)
    else:
        ref[...] = value
