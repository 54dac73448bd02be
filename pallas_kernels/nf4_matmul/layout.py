"""The code order each kernel wants, and the way there and back.

One row of a matrix with 8 columns, two codes a byte, high nibble first:

    bnb      w0 w1 | w2 w3 | w4 w5 | w6 w7      as bitsandbytes stores it
    halves   w0 w4 | w1 w5 | w2 w6 | w3 w7      high nibbles: the row's first half; low: its second

A kernel that unpacks `halves` gets two runs of neighbouring columns, which it joins or uses as
they are; from `bnb` it gets even and odd columns, which it must interleave first.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt8

LAYOUTS = ("bnb", "halves")


def prepack(
    codes: UInt8[Array | np.ndarray, "*rows bytes"], layout: str
) -> UInt8[Array | np.ndarray, "*rows bytes"]:
    """The same codes, from bitsandbytes' order into that of `layout`; `unpack` undoes it.

    Args:
      codes: uint8 (*lead, out, in/2); NumPy arrays stay on the host and in NumPy.
      layout: `bnb` (nothing changes) or `halves`.

    Raises:
      ValueError: an unknown layout, or rows of an odd number of bytes.
    """
    return codes if check(codes, layout) == "bnb" else in_one_pass(to_halves, codes)


def unpack(
    codes: UInt8[Array | np.ndarray, "*rows bytes"], layout: str
) -> UInt8[Array | np.ndarray, "*rows bytes"]:
    """The same codes, from the order of `layout` back into bitsandbytes'; see `prepack`."""
    return codes if check(codes, layout) == "bnb" else in_one_pass(from_halves, codes)


def check(codes, layout: str) -> str:
    """The layout, if there is such a one and these codes can have it."""
    if layout not in LAYOUTS:
        raise ValueError(f"layout is {layout!r}; the layouts are {', '.join(LAYOUTS)}")
    if layout == "halves" and codes.shape[-1] % 2:
        raise ValueError(f"codes are {codes.shape}: `halves` needs an even number of bytes a row")
    return layout


def in_one_pass(reorder, codes):
    """`reorder(codes)`: on the host in NumPy, or on the device as one program."""
    return reorder(codes) if isinstance(codes, np.ndarray) else jax.jit(reorder)(codes)


def to_halves(codes):
    """Bytes of a row's first and second half become the high and low nibbles of every byte."""
    half = codes.shape[-1] // 2
    first, second = codes[..., :half], codes[..., half:]
    even, odd = first & 0xF0 | second >> 4, first << 4 | second & 0x0F
    xp = np if isinstance(codes, np.ndarray) else jnp
    return xp.stack([even, odd], axis=-1).reshape(codes.shape)


def from_halves(codes):
    """`to_halves` undone."""
    even, odd = codes[..., ::2], codes[..., 1::2]
    xp = np if isinstance(codes, np.ndarray) else jnp
    return xp.concatenate([even & 0xF0 | odd >> 4, even << 4 | odd & 0x0F], axis=-1)
