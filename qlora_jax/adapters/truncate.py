"""A product B A in its singular values, without making it: what a smaller rank keeps of it.

    B = Qb Rb,  A^T = Qa Ra,  Rb Ra^T = U S V^T        B A = (Qb U) S (Qa V)^T

The matrix that is decomposed is (r, r) and not (out, in).
"""

import numpy as np
from jaxtyping import Float


def singular(
    A: Float[np.ndarray, "r in"], B: Float[np.ndarray, "out r"]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(S (k,) falling, U (out, k), Vt (k, in)) of B A, k = min(out, r) or min(in, r); float64."""
    Qb, Rb = np.linalg.qr(B.astype(np.float64))
    Qa, Ra = np.linalg.qr(A.astype(np.float64).T)
    U, S, Vt = np.linalg.svd(Rb @ Ra.T, full_matrices=False)
    return S, Qb @ U, Vt @ Qa.T


def kept_values(S: Float[np.ndarray, " k"], rank: int | None, energy: float | None) -> int:
    """How many singular values stay: `rank` at most, or the fewest with this share of sum S^2."""
    if energy is None:
        return min(rank, len(S))
    squares = np.cumsum(np.square(S))
    return int(np.searchsorted(squares, energy * squares[-1])) + 1
