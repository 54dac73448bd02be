"""Adapters that begin closer to the dense model than its 4 bits alone: PiSSA and LoftQ.

    W = dense        Q = quantized, as bitsandbytes quantizes        s = alpha / r, or / sqrt(r)

    pissa   s B A = SVD_r(W)        Q = quantize(W - s B A)     the largest directions are trained
    loftq   Q = quantize(W)         s B A = SVD_r(W - Q)        what 4 bits lost is made up for

Further iterations go on with the one step and the other, LoftQ's Q = quantize(W - s B A) first and
PiSSA's s B A = SVD_r(W - Q) first. After one LoftQ keeps the plain Q; all else is another base.

PEFT's loftq forgets s, so that its beginning is right only for alpha = r; here it is divided out.
PEFT quantizes with scales in float32; here they may be in 8 bits, and the SVD sees what that lost.
"""

import dataclasses
import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from qlora_jax.adapters.low_rank import low_rank
from qlora_jax.errors import InputError, nearest
from qlora_jax.quantization.tensor import QuantizedTensor

METHODS = ("pissa", "loftq")
NAME = re.compile(r"(pissa|loftq)(?:_niter_(\d{1,3}))?", re.ASCII)
MAX_ITERATIONS = 100

Quantize = Callable[[np.ndarray], QuantizedTensor]


@dataclasses.dataclass(frozen=True)
class Closer:
    """How an adapter begins closer.

        Closer("loftq", iterations=5)        Closer("pissa_niter_16")

    Args:
      name: pissa or loftq; with _niter_N behind it by a randomized decomposition of N power
        iterations, as PEFT has `pissa_niter_16`.
      iterations: how often both steps are done.
      seed: of the randomized decomposition.

    Raises:
      InputError: INIT-NAME, INIT-ITERATIONS, INIT-SEED.

    Source: Meng and others 2024, arXiv 2404.02948; Li and others 2023, arXiv 2310.08659.
    """

    name: str
    iterations: int = 1
    seed: int = 0

    def __post_init__(self):
        if not NAME.fullmatch(self.name):
            near = nearest(self.name, [*METHODS, "pissa_niter_16", "loftq_niter_16"])
            hint = f"did you mean {near[0]}" if near else ""
            expected = "pissa, loftq, pissa_niter_N or loftq_niter_N"
            raise InputError("INIT-NAME", "init", f"unknown {self.name!r}", expected, hint)
        if not 1 <= self.iterations <= MAX_ITERATIONS:
            expected = f"a whole number from 1 to {MAX_ITERATIONS}"
            raise InputError("INIT-ITERATIONS", "iterations", f"{self.iterations}", expected)
        if self.seed < 0:
            raise InputError("INIT-SEED", "seed", f"{self.seed}", "a whole number from 0")

    @property
    def method(self) -> str:
        """pissa or loftq."""
        return NAME.fullmatch(self.name)[1]

    @property
    def niter(self) -> int | None:
        """Power iterations; None for the exact decomposition."""
        number = NAME.fullmatch(self.name)[2]
        return None if number is None else int(number)

    @property
    def keeps_base(self) -> bool:
        """Whether the 4-bit base is what it would be without this."""
        return self.method == "loftq" and self.iterations == 1


class Begun(NamedTuple):
    """One matrix, begun.

    Attributes:
      A, B: (r, in) and (out, r), float32.
      base: the 4 bits that they belong to.
    """

    A: Float[np.ndarray, "r in"]
    B: Float[np.ndarray, "out r"]
    base: QuantizedTensor


def begin_closer(
    dense: np.ndarray,
    rank: int,
    scale: float,
    how: Closer,
    quantize: Quantize,
    *,
    where: str = "matrix",
    number: int = 0,
) -> Begun:
    """A, B and the 4-bit base of one matrix (out, in), which is in memory a few times over.

    Args:
      dense: float32, bfloat16 or float16.
      rank, scale: of this matrix's adapter.
      quantize: the 4 bits.
      where: what to call it in errors.
      number: another one for each matrix: with the seed it gives the random directions.

    Raises:
      InputError: INIT-RANK, the matrix has not so large a rank.
    """
    refuse_rank(rank, dense.shape, where)
    wide = dense.astype(np.float32)

    def nearest_to(matrix):
        return low_rank(matrix, rank, scale, niter=how.niter, seed=(how.seed, number))

    def without(A, B):
        return np.ascontiguousarray((wide - np.float32(scale) * (B @ A)).astype(dense.dtype))

    def lost(base):
        return wide - np.asarray(base.dequantize("float32"))

    if how.method == "pissa":
        A, B = nearest_to(wide)
        base = quantize(without(A, B))
        for _ in range(how.iterations - 1):
            A, B = nearest_to(lost(base))
            base = quantize(without(A, B))
        return Begun(A, B, base)
    base = quantize(dense)
    A, B = nearest_to(lost(base))
    for _ in range(how.iterations - 1):
        base = quantize(without(A, B))
        A, B = nearest_to(lost(base))
    return Begun(A, B, base)


def refuse_rank(rank: int, shape: tuple[int, ...], where: str) -> None:
    """A matrix has no more directions than its shorter side has numbers."""
    if rank > min(shape):
        found = f"rank {rank} for a matrix of {shape[0]} x {shape[1]}"
        expected = f"at most {min(shape)}, which all of it takes"
        raise InputError("INIT-RANK", where, found, expected, "a smaller rank there, or no target")
