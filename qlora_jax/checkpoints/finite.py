"""Whether every number of an array is finite: found in bits, fast and in bounded memory."""

import numpy as np

from qlora_jax.errors import InputError

PIECE = 1 << 20  # numbers looked at together
EXPONENTS = {  # all bits of the exponent set: Inf or NaN
    "float16": (np.uint16, 0x7C00),
    "bfloat16": (np.uint16, 0x7F80),
    "float32": (np.uint32, 0x7F800000),
    "float64": (np.uint64, 0x7FF0000000000000),
}


def first_not_finite(array: np.ndarray) -> int | None:
    """The place of the first NaN or Inf in the flattened array; None if there is none."""
    unsigned, exponent = EXPONENTS[array.dtype.name]
    bits = array.reshape(-1).view(unsigned)
    for start in range(0, len(bits), PIECE):
        bad = (bits[start : start + PIECE] & unsigned(exponent)) == exponent
        if bad.any():
            return start + int(bad.argmax())
    return None


def check_finite(array: np.ndarray, where: str, name: str) -> None:
    """Refuses an array with a NaN or Inf.

    Raises:
      InputError: W-FINITE with the name, the first index and the value.
    """
    place = first_not_finite(array)
    if place is not None:
        index = tuple(int(i) for i in np.unravel_index(place, array.shape))
        found = f"is not finite: {float(array[index])} at index {index}"
        hint = f"weights that are finite in {array.dtype.name}"
        raise InputError("W-FINITE", f"{where}: {name}", found, "finite numbers", hint)
