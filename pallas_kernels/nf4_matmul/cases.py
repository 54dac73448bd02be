"""Shapes that matter, by model and projection: tests, benchmarks and the compile tool read them."""

import dataclasses

DECODE = (1, 16)  # tokens at a time
TRAINING = (512, 2048)


@dataclasses.dataclass(frozen=True)
class Case:
    """One product, x (m, k) times W (n, k) transposed.

    Attributes:
      model: whose weight W is.
      projection: which of its weights, those of one shape together.
      m: rows of x, the tokens.
      n: rows of W, its `out`.
      k: columns of W, its `in`.
    """

    model: str
    projection: str
    m: int
    n: int
    k: int

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of W."""
        return self.n, self.k

    def __str__(self) -> str:
        """`Llama-3.1-8B down 16x4096x14336`: m, n, k."""
        return f"{self.model} {self.projection} {self.m}x{self.n}x{self.k}"


def cases(model: str, weights: dict[str, tuple[int, int]], tokens: tuple[int, ...]):
    """A case for each weight (projection: (out, in)) and number of tokens."""
    return tuple(Case(model, name, m, n, k) for name, (n, k) in weights.items() for m in tokens)


# One weight at every size of batch: where memory, decoding and the tensor cores each are the limit.
SQUARE = cases("square", {"any": (4096, 4096)}, (1, 16, 64, 128, 256, 512, 1024, 2048, 4096))

# Widths are those of each model's config.json.
LLAMA_8B = cases(
    "Llama-3.1-8B",
    {
        "q, o": (4096, 4096),
        "k, v": (1024, 4096),
        "gate, up": (14336, 4096),
        "down": (4096, 14336),
    },
    DECODE + TRAINING,
)
LLAMA_70B = cases(
    "Llama-3-70B",
    {
        "q, o": (8192, 8192),
        "k, v": (1024, 8192),
        "gate, up": (28672, 8192),
        "down": (8192, 28672),
    },
    DECODE + TRAINING,
)
# 576 and 192 are multiples of 64 but not of a kernel's usual tile, 128.
SMOLLM2 = cases(
    "SmolLM2-135M",
    {"q, o": (576, 576), "k, v": (192, 576), "gate, up": (1536, 576), "down": (576, 1536)},
    DECODE + TRAINING,
)
REAL = LLAMA_8B + LLAMA_70B + SMOLLM2
CASES = SQUARE + REAL

# Small enough for the interpreter, yet with more steps of the contraction (8 or 9 of 64 forward)
# than a pipeline has stages, so that every slot is filled again; several tiles; ragged rows.
TINY = (
    *cases("tiny", {"even": (512, 512)}, (1, 16, 64, 200, 300)),
    Case("tiny", "ragged", 5, 576, 576),
    Case("tiny", "ragged", 130, 200, 576),
)
