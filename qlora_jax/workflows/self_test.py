"""Whether the kernels compute right on this machine: each backend against NumPy in float64."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.backends import Unsupported
from pallas_kernels.codebooks import CODEBOOKS
from pallas_kernels.nf4_matmul.api import BACKENDS, nf4_matmul
from pallas_kernels.nf4_matmul.layout import prepack

OUT, IN, ROWS, BLOCK = 256, 512, 64, 64  # a multiple of every tile, small enough for a second
# Of the largest |y|. Weights and result are rounded to bfloat16, 2^-9 each; a wrong code, scale or
# order is off by the size of y itself.
ALLOWED = 1e-2
LAYOUTS = ("halves", "bnb")  # the first that a backend takes is tested


@dataclass(frozen=True)
class Check:
    """What came of one backend: `error` relative to the largest value, or None with `reason`."""

    backend: str
    layout: str = ""
    error: float | None = None
    reason: str = ""

    @property
    def right(self) -> bool:
        """Whether it ran and was right; a backend that does not run here is not wrong."""
        return self.error is None or self.error <= ALLOWED


def kernel_test() -> list[Check]:
    """One Check a backend of nf4_matmul, forward and gradient, on bfloat16 inputs."""
    return [check(backend) for backend in BACKENDS]


def check(backend: str) -> Check:
    """Runs one backend in the first layout that it takes."""
    reasons = []
    for layout in LAYOUTS:
        try:
            return Check(backend, layout, error=largest_error(backend, layout))
        except Unsupported as refusal:
            reasons.append(str(refusal))
    return Check(backend, reason=reasons[0])


def largest_error(backend: str, layout: str) -> float:
    """The largest of |y - exact| and |dx - exact|, each relative to its largest value."""
    random = np.random.default_rng(0)
    codes = random.integers(0, 256, (OUT, IN // 2), np.uint8)  # every pair of codes
    absmax = random.uniform(0.01, 0.1, (OUT, IN // BLOCK)).astype(np.float32)
    x = jnp.asarray(random.standard_normal((ROWS, IN)), jnp.bfloat16)
    dy = jnp.asarray(random.standard_normal((ROWS, OUT)), jnp.bfloat16)

    pairs = np.stack([codes >> 4, codes & 15], axis=-1).reshape(OUT, IN)
    dense = CODEBOOKS["nf4"].astype(np.float64)[pairs] * absmax.repeat(BLOCK, axis=1)

    stored = prepack(jnp.asarray(codes), layout)

    def product(x: jax.Array) -> jax.Array:
        return nf4_matmul(
            x,
            stored,
            jnp.asarray(absmax),
            shape=(OUT, IN),
            kind="nf4",
            block_size=BLOCK,
            layout=layout,
            backend=backend,
        )

    y, pull_back = jax.vjp(product, x)
    (dx,) = pull_back(dy.astype(y.dtype))
    exact = np.asarray(x, np.float64) @ dense.T, np.asarray(dy, np.float64) @ dense
    return max(relative(y, exact[0]), relative(dx, exact[1]))


def relative(found: jax.Array, exact: np.ndarray) -> float:
    """The largest difference over the largest exact value; NaN counts as infinite."""
    error = np.abs(np.asarray(found, np.float64) - exact).max() / np.abs(exact).max()
    return float(error) if np.isfinite(error) else float("inf")
