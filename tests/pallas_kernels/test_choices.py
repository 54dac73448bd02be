"""`explain` takes what an op takes, tells who computes it and why nobody before; runs nothing."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

import pallas_kernels
from pallas_kernels import gpu
from pallas_kernels.backends import Choice, Unsupported, dispatch, watch
from pallas_kernels.choices import OPS
from pallas_kernels.nf4_matmul.api import BACKENDS, GPU_BACKENDS, nf4_matmul

LIKE = jax.ShapeDtypeStruct
X = LIKE((2, 256, 512), jnp.bfloat16)
CODES, SCALES, SHAPE = LIKE((256, 256), jnp.uint8), LIKE((256, 8), jnp.float32), (256, 512)
A, B, SCALE = LIKE((8, 512), jnp.float32), LIKE((8, 256), jnp.float32), LIKE((), jnp.float32)

CALLS = {
    "nf4_matmul": ((X, CODES, SCALES), {"shape": SHAPE}, "reference"),
    "lora_matmul": ((X, CODES, SCALES, A, B, SCALE), {"shape": SHAPE}, "plain"),
    "cross_entropy": (
        (LIKE((9, 64), jnp.float32), LIKE((99, 64), jnp.float32), LIKE((9,), jnp.int32)),
        {},
        "jnp",
    ),
    "dequantize": ((CODES, SCALES), {"shape": SHAPE, "dtype": jnp.bfloat16}, "reference"),
    "quantize": ((LIKE(SHAPE, jnp.float32),), {"block_size": 128}, "jnp"),
}


@pytest.mark.parametrize("op", OPS)
def test_every_op_is_explained_by_its_own_arguments(op):
    arrays, static, backend = CALLS[op]
    for _ in range(2):  # the second time as well: no cache answers in place of the backends
        explained = pallas_kernels.explain(op, *arrays, **static)
        assert explained.forward.backend == backend
        assert (explained.gradient is None) == (op in ("dequantize", "quantize"))


def test_how_it_reads():
    shown = str(pallas_kernels.explain("nf4_matmul", X, CODES, SCALES, shape=SHAPE))
    refused = [f"  not {', '.join(GPU_BACKENDS)}: the default device is a cpu, not a GPU"]
    refused += ["  not cpu: layout is 'bnb': prepack the codes as 'halves'"]
    expected = ["nf4_matmul: reference", *refused, "nf4_matmul, gradient: reference", *refused]
    assert shown.splitlines() == expected


def test_a_named_backend_that_refuses():
    explained = pallas_kernels.explain("nf4_matmul", X, CODES, SCALES, shape=SHAPE, backend="cpu")
    assert str(explained) == (
        "nf4_matmul: no backend\n  not cpu: layout is 'bnb': prepack the codes as 'halves'"
    )


def test_a_described_gpu():
    with gpu.pretend(gpu.KNOWN["h100"], interpret=True):
        explained = pallas_kernels.explain("nf4_matmul", X, CODES, SCALES, shape=SHAPE)
    assert explained.forward.backend == explained.gradient.backend == "hopper"


def test_the_choice_is_the_ops_own():
    """A wrong call is the op's error, not an explanation; so is an op that is not there."""
    with pytest.raises(ValueError, match="the last axes must be equal"):
        pallas_kernels.explain("nf4_matmul", X, CODES, SCALES, shape=(512, 256))
    with pytest.raises(ValueError, match="'matmul'; the ops are nf4_matmul, lora_matmul"):
        pallas_kernels.explain("matmul", X)
    with pytest.raises(AttributeError, match="no attribute 'explian'"):
        _ = pallas_kernels.explian


def test_watching_sees_inner_choices_first_and_refusals():
    def refuse(x):
        raise Unsupported("never")

    def nested(x):
        return dispatch((("inner", lambda x: x),), x)

    with watch() as choices:
        dispatch((("refuse", refuse), ("outer", nested)), 1)
        with pytest.raises(Unsupported):
            dispatch((("refuse", refuse),), 1)
    refusals = (("refuse", "never"),)
    assert choices == [Choice("inner", ()), Choice("outer", refusals), Choice(None, refusals)]
    dispatch((("inner", lambda x: x),), 1)
    assert len(choices) == 3


def test_asked_and_called_alike():
    x = jnp.ones((3, 512), jnp.bfloat16)
    codes, scales = jnp.zeros(CODES.shape, jnp.uint8), jnp.ones(SCALES.shape, jnp.float32)
    with watch() as choices:
        nf4_matmul(x, codes, scales, shape=SHAPE)
    explained = pallas_kernels.explain("nf4_matmul", x, codes, scales, shape=SHAPE)
    assert choices[-1] == explained.forward
    assert choices[-1].backend in BACKENDS


def test_the_package_alone_imports_nothing():
    program = "import sys, pallas_kernels; sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
