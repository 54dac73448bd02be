"""What number each code stands for: NF4, FP4, INT4, and the dynamic 8-bit maps.

A weight is `codebook[code] * scale`, with one scale a block and codebook values in [-1, 1]. All
tables are bitsandbytes' to the bit, so a code means the same here and there.
"""

import numpy as np

# The quantiles of a normal distribution, scaled to [-1, 1] (QLoRA, arXiv:2305.14314, appendix E).
NF4 = [
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
]
# In twelfths: sign bit, then a 3-bit minifloat in its own order. Code 8 is +0, not -0.
FP4 = [0, 0.0625, 8, 12, 4, 6, 2, 3, 0, -0.0625, -8, -12, -4, -6, -2, -3]
# In sevenths, falling. bitsandbytes lists it but cannot build it: it divides integers in place.
INT4 = [7, 6, 5, 4, 3, 2, 1, 0, 0, -1, -2, -3, -4, -5, -6, -7]


def table(values: list, unit: float) -> np.ndarray:
    """Float32 multiples of `unit`'s inverse, read-only: every caller shares the array."""
    array = np.asarray(values, np.float32) / np.float32(unit)
    array.flags.writeable = False
    return array


CODEBOOKS: dict[str, np.ndarray] = {
    "nf4": table(NF4, 1),
    "fp4": table(FP4, 12),
    "int4": table(INT4, 7),
}


Kind = str | tuple[float, ...]  # a codebook by name, or its 16 values


def codebook(kind: Kind) -> np.ndarray:
    """The 16 float32 values of `kind`, indexed by code; ValueError when there is no such kind."""
    if isinstance(kind, tuple):
        if len(kind) != 16:
            raise ValueError(f"kind is a table of {len(kind)} values; 4-bit codes need 16")
        return np.asarray(kind, np.float32)
    if kind not in CODEBOOKS:
        raise ValueError(f"kind is {kind!r}; the codebooks are {', '.join(CODEBOOKS)}")
    return CODEBOOKS[kind]


def sorted_codes(kind: Kind) -> np.ndarray:
    """The 16 codes of `kind` in the order of their values, smallest first."""
    return np.argsort(codebook(kind), kind="stable").astype(np.uint8)


def midpoints(kind: Kind) -> np.ndarray:
    """The 15 float32 boundaries between neighbouring values; one that falls on it rounds down."""
    values = codebook(kind)[sorted_codes(kind)]
    return (values[:-1] + values[1:]) / np.float32(2)


def dynamic_map(signed: bool) -> np.ndarray:
    """The 256 values of the dynamic 8-bit map, rising: 0, 1, and seven decades of even steps.

    Decade i holds the midpoints of 2^i (unsigned: 2^(i+1)) equal parts of [10^(i-7), 10^(i-6)],
    and, when signed, their negatives. From "8-bit optimizers via block-wise quantization"
    (arXiv:2110.02861), rounded as bitsandbytes does.
    """
    values = [0.0, 1.0]
    for decade in range(7):
        edges = even_edges(2**decade if signed else 2 ** (decade + 1))
        middles = (edges[:-1] + edges[1:]) / np.float32(2) * np.float32(10.0 ** (decade - 6))
        values += [*middles, *-middles] if signed else [*middles]
    return table(sorted(values), 1)


def even_edges(parts: int) -> np.ndarray:
    """`parts` + 1 even steps from 0.1 to 1, counted from the nearer end and rounded once.

    That is how torch.linspace rounds; np.linspace differs in the last bit of some values.
    """
    first, last = np.float32(0.1), np.float32(1)
    step = float((last - first) / np.float32(parts))
    i = np.arange(parts + 1)
    from_first, from_last = float(first) + step * i, float(last) - step * (parts - i)
    return np.where(i < (parts + 1) // 2, from_first, from_last).astype(np.float32)


DYNAMIC_SIGNED = dynamic_map(signed=True)
DYNAMIC_UNSIGNED = dynamic_map(signed=False)
