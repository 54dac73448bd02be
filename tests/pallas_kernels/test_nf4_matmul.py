"""The public call: what it refuses, and tables of one's own."""

import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from pallas_kernels.backends import Unsupported
from pallas_kernels.codebooks import codebook
from pallas_kernels.dequantize.api import dequantize_4bit
from pallas_kernels.nf4_matmul import cpu, layout, nf4_matmul
from pallas_kernels.nf4_matmul.weight import Weight
from pallas_kernels.quantize.api import quantize_4bit
from tests.random_arrays import normal

X = jnp.ones((2, 64), jnp.bfloat16)
CODES = jnp.asarray(np.random.default_rng(0).integers(0, 256, (64, 32)), jnp.uint8)
SCALES = jnp.ones((64, 1))

WRONG = {
    "x of integers": ({"x": X.astype(jnp.int32)}, "x is int32; it can be float32, bfloat16"),
    "x too wide": ({"x": jnp.ones((2, 65))}, r"x is \(2, 65\), W is \(64, 64\): the last axes"),
    "codes of int32": ({"codes": CODES.astype(jnp.int32)}, "codes are int32; two 4-bit codes"),
    "rows missing": ({"codes": CODES[:3]}, r"codes are \(3, 32\) and scales \(64, 1\); a matrix"),
    "layers": (
        {"codes": CODES[None], "scales": SCALES[None]},
        r"codes are \(1, 64, 32\), \(1,\) matrices \(64, 64\): multiply by one",
    ),
    "15 values": ({"kind": (1.0,) * 15}, "a table of 15 values; 4-bit codes need 16"),
    "no such table": ({"kind": "nf5"}, "kind is 'nf5'; the codebooks are nf4, fp4, int4"),
    "no such layout": ({"layout": "rows"}, "layout is 'rows'; the layouts are bnb, halves"),
    "no such backend": ({"backend": "hoper"}, "backend is 'hoper'; the backends are .*hopper"),
}


def call(x=X, codes=CODES, scales=SCALES, **static):
    return nf4_matmul(x, codes, scales, shape=(64, 64), **static)


@pytest.fixture
def as_in_production():
    """Annotations are not checked."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.parametrize(("wrong", "message"), WRONG.values(), ids=WRONG)
def test_wrong_input_is_named(as_in_production, wrong, message):
    with pytest.raises(ValueError, match=message):
        call(**wrong)


def test_a_backend_that_cannot_run_here():
    with pytest.raises(Unsupported, match="hopper: the default device is a cpu, not a GPU"):
        call(backend="hopper")


def test_a_table_of_ones_own():
    np.testing.assert_array_equal(call(kind=tuple(codebook("fp4").tolist())), call(kind="fp4"))
    doubled = tuple((2 * codebook("nf4")).tolist())
    np.testing.assert_array_equal(call(kind=doubled), 2 * call(kind="nf4"))


def test_a_cpu_rounds_each_weight_once():
    """Products with rows of ones and zeros are the weights themselves."""
    w = normal(0, 64, 64)
    codes, scales = quantize_4bit(w)
    weight = Weight(layout.prepack(codes, "halves"), scales, (64, 64), "nf4", 64, "halves")
    exact = dequantize_4bit(codes, scales, shape=(64, 64)).astype(jnp.bfloat16)
    unit = jnp.eye(64, dtype=jnp.bfloat16)
    np.testing.assert_array_equal(cpu.forward(unit, weight), exact.T)
    np.testing.assert_array_equal(cpu.backward(unit, weight), exact)
