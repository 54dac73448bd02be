"""The GPU backends of nf4_matmul under test, and what each must be shown on: one row, all tests."""

import dataclasses
import importlib
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.codebooks import CODEBOOKS
from pallas_kernels.dequantize.api import expand_scales
from pallas_kernels.nf4_matmul.on_gpu import OnGpu
from pallas_kernels.nf4_matmul.weight import Weight
from pallas_kernels.quantize.api import double_quantize, quantize_4bit

DIRECTIONS = ("forward", "backward")


@dataclasses.dataclass(frozen=True)
class Shape:
    """A product (m, contraction) by (contraction, n) on a GPU of `sms` multiprocessors.

    Forward, W is (n, contraction); backward it is (contraction, n), and n must hold whole blocks.
    """

    m: int
    n: int
    contraction: int
    sms: int = 1


@dataclasses.dataclass(frozen=True)
class Backend:
    """One row.

    Attributes:
      name: of its module in pallas_kernels/nf4_matmul.
      gpu: key of gpu.KNOWN, for which it is interpreted.
      rounds: where it rounds: `factors` (table and scale to 16 bits, then their product), `sums`
        (the table; the scale multiplies float32 sums), `weights` (table times scale once).
      shapes: (name, forward, backward); names say which corner they reach.
      directions: those that it has.
      fused: whether it is a Mosaic kernel, for the interpreter, and not XLA's own product.
    """

    name: str
    gpu: str
    rounds: str
    shapes: tuple[tuple[str, Shape, Shape | None], ...]
    directions: tuple[str, ...] = DIRECTIONS
    fused: bool = True

    def __str__(self) -> str:
        return self.name

    @property
    def module(self) -> ModuleType:
        return importlib.import_module(f"pallas_kernels.nf4_matmul.{self.name}")

    def run(self, direction: str):
        """The backend as it is asked, a function of (x, w) and (x, w, low)."""
        return getattr(OnGpu(self.name), direction)

    def shape(self, number: int, direction: str) -> Shape:
        """One of its shapes, for a direction."""
        return self.shapes[number][1 + DIRECTIONS.index(direction)]


# Steps are 64 wide and the longest ring has 8 slots. Ragged: no extent is a whole tile. Shared: two
# tiles cut into three ranges of steps, so that the middle block works on a part of each. Tall: more
# than 128 rows, for which tiles are taller.
TILES = (
    ("long", Shape(128, 128, 640), Shape(128, 128, 640)),
    ("ragged", Shape(70, 200, 192), Shape(70, 192, 200)),
    ("shared", Shape(70, 200, 640, sms=3), Shape(70, 192, 648, sms=3)),
    ("tall", Shape(140, 72, 320), Shape(140, 64, 328)),
)
# Two blocks run on an SM, W's rows are whole 64 (backward), the ring has 3 slots.
MMA_TILES = (
    ("long", Shape(128, 256, 640), Shape(128, 256, 640)),
    ("ragged", Shape(70, 200, 192), Shape(70, 192, 192)),
    ("shared", Shape(70, 264, 640, sms=2), Shape(70, 320, 640, sms=2)),
    ("tall", Shape(140, 72, 320), Shape(140, 64, 320)),
)
# Steps are up to 512 wide, the ring has 4 slots, and a tile of W has 64 or, for over 8 rows, 128
# rows. Only `long` is whole tiles, one block each; the contraction of `split` is cut unevenly.
FEW_ROWS = (
    ("long", Shape(8, 128, 2560), None),
    ("one row", Shape(1, 200, 640), None),
    ("split", Shape(16, 128, 1792, sms=2), None),
    ("ragged", Shape(13, 264, 1344), None),
)
MANY_ROWS = 4 * (("many rows", Shape(4096, 64, 128), Shape(4096, 128, 64)),)
BACKENDS = (
    Backend("small_m", "a100", "sums", FEW_ROWS, directions=("forward",)),
    Backend("hopper", "h100", "factors", TILES),
    Backend("blackwell", "b200", "factors", TILES),
    Backend("ampere", "a100", "factors", MMA_TILES),
    Backend("dense", "a100", "weights", TILES, fused=False),
    Backend("large_m", "a100", "weights", MANY_ROWS, fused=False),
)


def weight(
    shape: Shape, direction: str, kind: str = "nf4", nested: bool = False, block_size: int = 64
) -> Weight:
    """A matrix for the shape, the sizes of its blocks spread over e^-2 to e^2.

    So spread, a scale that is taken from a neighbour is far off.
    """
    size = (shape.n, shape.contraction)
    out, width = size if direction == "forward" else size[::-1]
    rng = np.random.default_rng([out, width])
    w = rng.standard_normal((out, width // block_size, block_size), np.float32)
    w *= np.exp(rng.uniform(-2, 2, (out, width // block_size, 1))).astype(np.float32)
    codes, scales = quantize_4bit(
        jnp.asarray(w.reshape(out, width)), kind=kind, block_size=block_size
    )
    scales = double_quantize(scales) if nested else scales
    return Weight(codes, scales, (out, width), kind, block_size, "bnb")


def rows(shape: Shape, dtype, lead: tuple[int, ...] | None = None, seed: int = 0) -> jax.Array:
    """Normal x (*lead, contraction), m rows unless `lead` says otherwise."""
    rng = np.random.default_rng([seed, shape.m, shape.contraction])
    lead = (shape.m,) if lead is None else lead
    return jnp.asarray(rng.standard_normal((*lead, shape.contraction), np.float32), dtype)


def rounded(w: Weight, dtype, rounds: str) -> np.ndarray:
    """W in float32, rounded to `dtype` where a backend's row says that it rounds."""
    codes = np.stack([w.codes >> 4, w.codes & 15], axis=-1).reshape(w.shape)
    scales = np.asarray(expand_scales(w.scales)).reshape(w.shape[0], -1).repeat(w.block_size, 1)
    table = CODEBOOKS[w.kind]
    if rounds == "factors":
        factors = table.astype(dtype)[codes].astype(np.float32) * scales.astype(dtype)
        return factors.astype(dtype).astype(np.float32)
    if rounds == "sums":
        return table.astype(dtype)[codes].astype(np.float32) * scales
    assert rounds == "weights"
    return (table[codes] * scales).astype(dtype).astype(np.float32)


def product(x, dense: np.ndarray, direction: str) -> np.ndarray:
    """The oracle: x W^T, or x W backward, of the float32 values, summed in float64."""
    dense = dense.T if direction == "forward" else dense
    return np.asarray(x).astype(np.float64) @ np.asarray(dense).astype(np.float64)


def error(got, want: np.ndarray) -> float:
    """The norm of the difference over the norm of `want`; infinite when anything is not finite."""
    got = np.asarray(got).astype(np.float64)
    assert got.shape == want.shape
    difference = np.linalg.norm(got - want) / np.linalg.norm(want)
    return float(difference) if np.isfinite(difference) else np.inf
