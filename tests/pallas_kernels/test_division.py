"""Quotients that a GPU rounds wrongly become the nearest float32; a CPU's stay as they are."""

from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import gpu
from pallas_kernels.codebooks import CODEBOOKS, midpoints
from pallas_kernels.quantize import division, reference
from tests.tiers import tiered

pytestmark = pytest.mark.fully_compiled

COUNT = 1 << 18
SPECIAL = np.uint32([0, 1, 2, 3, 0x400000, 0x7FFFFD, 0x7FFFFE, 0x7FFFFF])  # mantissas


def pairs(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Normal numbers of either sign whose quotient is normal; special mantissas with each other."""
    rng = np.random.default_rng(seed)
    mantissas = rng.integers(0, 1 << 23, (2, COUNT), dtype=np.uint32)
    mantissas[:, :64] = np.stack(np.meshgrid(SPECIAL, SPECIAL)).reshape(2, 64)
    exponents = rng.integers(65, 190, (2, COUNT), dtype=np.uint32)
    signs = rng.integers(0, 2, (2, COUNT), dtype=np.uint32)
    return tuple((signs << 31 | exponents << 23 | mantissas).view(np.float32))


def wrong(quotient: np.ndarray, units: int) -> np.ndarray:
    """Off by some units in the last place."""
    return (quotient.view(np.uint32) + np.uint32(units % 2**32)).view(np.float32)


def assert_corrected(quotient, x, y, expected):
    ours = jax.jit(division.corrected)(*(jnp.asarray(a) for a in (quotient, x, y)))
    np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize("units", [-2, -1, 0, 1, 2])
def test_two_units_off_become_the_nearest(strict_promotion, units):
    x, y = pairs(0)
    assert_corrected(wrong(x / y, units), x, y, x / y)


@pytest.mark.parametrize("units", [-1, 1])
def test_reciprocals(strict_promotion, units):
    y = pairs(1)[1]
    one = np.ones_like(y)
    assert_corrected(wrong(one / y, units), one, y, one / y)


def test_what_is_not_normal_stays(strict_promotion):
    quotient = np.float32([0, np.inf, np.nan, 1e-40, 2, 3])
    x = np.float32([0, np.inf, np.nan, 1e-38, np.inf, 1])
    y = np.float32([3, 2, 1, 1e2, 1, 0])
    assert_corrected(quotient, x, y, quotient)


def off_by_one(x, y):
    """A GPU's division, as it may be."""
    bits = jax.lax.bitcast_convert_type(x / y, jnp.uint32)
    return jax.lax.bitcast_convert_type(jnp.where(x == 0, bits, bits + np.uint32(1)), jnp.float32)


def beside_boundaries(kind: str, shape: tuple[int, int]) -> jax.Array:
    """Weights of blocks of 32 that are their absmax or a boundary times it."""
    rng = np.random.default_rng(2)
    count = shape[0] * shape[1]
    absmax = np.repeat(rng.uniform(1, 2, -(-count // 32)), 32)[:count].astype(np.float32)
    w = rng.choice(midpoints(kind), count) * absmax
    w[::32] = absmax[::32]
    return jnp.asarray(w.reshape(shape))


def quantized(w: jax.Array, kind: str) -> list[jax.Array]:
    """By a program of its own each time: what divides is replaced between them."""

    def whole(w):
        codes, absmax = reference.quantize_4bit(w, kind, 32)
        return [codes, absmax, *reference.double_quantize(absmax)]

    return jax.jit(whole)(w)


@pytest.mark.parametrize(
    ("shape", "kind"),
    tiered(product([(64, 256), (3, 37)], CODEBOOKS), [((64, 256), "nf4"), ((3, 37), "int4")]),
)
def test_a_gpus_codes_are_a_cpus(monkeypatch, strict_promotion, shape, kind):
    """Where a unit in the last place decides."""
    w = beside_boundaries(kind, shape)
    exact = quantized(w, kind)

    def divide_by(divide):
        monkeypatch.setattr(reference, "divide", divide)
        monkeypatch.setattr(reference, "reciprocal", lambda y: divide(jnp.ones_like(y), y))

    divide_by(off_by_one)
    assert (quantized(w, kind)[0] != exact[0]).any()
    divide_by(lambda x, y: division.corrected(off_by_one(x, y), x, y))
    for ours, theirs in zip(quantized(w, kind), exact, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_only_a_gpu_is_corrected(monkeypatch):
    monkeypatch.setattr(division, "corrected", lambda quotient, x, y: quotient + 1)
    one = jnp.ones(2)
    assert division.reciprocal(one)[0] == 1
    with gpu.pretend(gpu.KNOWN["h100"], interpret=False):
        assert division.reciprocal(one)[0] == 2
