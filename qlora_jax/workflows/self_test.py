"""Whether the kernels compute right on this machine: each backend against NumPy in float64."""

import functools
from dataclasses import dataclass, replace
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.backends import AllRefused, dispatch
from pallas_kernels.codebooks import CODEBOOKS
from pallas_kernels.nf4_matmul.api import BACKENDS, BACKWARD, FORWARD, GPU_BACKENDS
from pallas_kernels.nf4_matmul.layout import prepack
from pallas_kernels.nf4_matmul.weight import LowRank, Weight

BLOCK = 64
# Of the largest |y|. Weights and result are rounded to bfloat16, 2^-9 each; a wrong code, scale or
# order is off by the size of y itself.
ALLOWED = 1e-2
LAYOUTS = ("bnb", "halves")  # the first that a backend takes is tested


@dataclass(frozen=True)
class Product:
    """One product that every backend is asked for.

    Attributes:
      rows: of x.
      shape: (out, in) of W, multiples of every tile.
      direction: x W^T, or dy W.
      rank: of an adapter that the kernel adds; 0 is none.
    """

    rows: int
    shape: tuple[int, int]
    direction: Literal["forward", "backward"]
    rank: int = 0

    def __str__(self) -> str:
        """`256 rows backward with an adapter`."""
        return f"{self.rows} rows {self.direction}" + (" with an adapter" if self.rank else "")


# Few rows, as in decoding; steps shared among blocks of threads; a whole tile for each block.
PRODUCTS = (
    Product(16, (256, 512), "forward"),
    Product(16, (256, 512), "backward"),
    Product(256, (256, 512), "forward"),
    Product(256, (256, 512), "backward"),
    Product(256, (256, 512), "forward", rank=16),
    Product(256, (256, 512), "backward", rank=16),
    Product(4096, (4096, 192), "forward"),
    Product(4096, (192, 4096), "backward"),
)


@dataclass(frozen=True)
class Check:
    """What came of one product by one backend.

    Attributes:
      backend: who was asked.
      product: for what, in words.
      outcome: right, wrong, refused, or failed: it neither computed nor refused.
      layout: the order of the codes that it took.
      error: the largest error, relative to the largest value.
      reason: of a refusal or a failure.
    """

    backend: str
    product: str
    outcome: Literal["right", "wrong", "refused", "failed"]
    layout: str = ""
    error: float | None = None
    reason: str = ""

    @property
    def fine(self) -> bool:
        """A backend that does not run here is not wrong."""
        return self.outcome in ("right", "refused")


def kernel_test() -> list[Check]:
    """Each backend of nf4_matmul on each product, in bfloat16; only GPU kernels add an adapter."""
    return [
        check(backend, product, *inputs(product))
        for product in PRODUCTS
        for backend in BACKENDS
        if backend in GPU_BACKENDS or not product.rank
    ]


@functools.lru_cache(maxsize=1)  # the backends take turns with one product
def inputs(product: Product) -> tuple[Weight, jax.Array, LowRank | None, np.ndarray]:
    """W in bitsandbytes' order, x or dy, the adapter's term, and the exact result."""
    random = np.random.default_rng(0)
    out, width = product.shape
    codes = random.integers(0, 256, (out, width // 2), np.uint8)  # every pair of codes
    absmax = random.uniform(0.01, 0.1, (out, width // BLOCK)).astype(np.float32)
    weight = Weight(jnp.asarray(codes), jnp.asarray(absmax), (out, width), "nf4", BLOCK, "bnb")

    pairs = np.stack([codes >> 4, codes & 15], axis=-1).reshape(out, width)
    dense = CODEBOOKS["nf4"].astype(np.float64)[pairs] * absmax.repeat(BLOCK, axis=1)
    factor = dense.T if product.direction == "forward" else dense

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(random.standard_normal(shape), jnp.bfloat16)

    x = normal(product.rows, factor.shape[0])
    exact, low = np.asarray(x, np.float64) @ factor, None
    if product.rank:
        low = LowRank(normal(product.rows, product.rank), normal(product.rank, factor.shape[1]))
        exact = exact + np.asarray(low.h, np.float64) @ np.asarray(low.b, np.float64)
    return weight, x, low, exact


def check(
    backend: str, product: Product, weight: Weight, x: jax.Array, low: LowRank | None, exact
) -> Check:
    """One backend in the first layout that it takes."""
    backends = FORWARD if product.direction == "forward" else BACKWARD
    terms = (low,) if product.rank else ()
    refusals = []
    for layout in LAYOUTS:
        w = replace(weight, codes=prepack(weight.codes, layout), layout=layout)
        try:
            y = jax.jit(functools.partial(dispatch, backends, backend=backend))(x, w, *terms)
            error = relative(y, exact)
        except AllRefused as refused:
            refusals.append(refused.choice.refusals[0][1])
        except Exception as failure:  # of the compiler or the device: a finding, told with the rest
            reason = f"{type(failure).__name__}: {' '.join(str(failure).split())[:300]}"
            return Check(backend, str(product), "failed", layout, reason=reason)
        else:
            outcome = "right" if error <= ALLOWED else "wrong"
            return Check(backend, str(product), outcome, layout, error)
    return Check(backend, str(product), "refused", reason=refusals[0])


def relative(found: jax.Array, exact: np.ndarray) -> float:
    """The largest difference over the largest exact value; NaN counts as infinite."""
    error = np.abs(np.asarray(found, np.float64) - exact).max() / np.abs(exact).max()
    return float(error) if np.isfinite(error) else float("inf")
