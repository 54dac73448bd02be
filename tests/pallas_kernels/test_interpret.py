"""One contract for every GPU backend of nf4_matmul, interpreted on the CPU."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.backends import Unsupported
from pallas_kernels.nf4_matmul import api, nf4_matmul, reference
from pallas_kernels.nf4_matmul.weight import LowRank
from tests.pallas_kernels import kernels, mma_on_cpu
from tests.pallas_kernels.interpreted import interpreter
from tests.pallas_kernels.kernels import Shape
from tests.tiers import tiered
from tests.tolerances import INTERPRETED_RTOL, ROUNDED_RTOL

mma_on_cpu.install()

BACKENDS = list(kernels.BACKENDS)
KERNELS = [backend for backend in BACKENDS if backend.fused]
DTYPES = {"bfloat16": jnp.bfloat16, "float16": jnp.float16}

# (kind, nested, dtype, block size, number of the shape): every pair of two columns' values, but for
# the block size, which changes only how scales are laid out before the kernel, and for kind and
# shape, which do not meet in a kernel. Each is run in both directions.
CASES = (
    ("nf4", False, "bfloat16", 64, 0),
    ("fp4", True, "float16", 128, 0),
    ("int4", True, "bfloat16", 64, 1),
    ("nf4", False, "float16", 64, 1),
    ("fp4", False, "bfloat16", 64, 2),
    ("int4", True, "float16", 64, 2),
    ("nf4", True, "bfloat16", 64, 3),
    ("int4", False, "float16", 64, 3),
)


def test_the_cases_cover_pairs():
    columns = list(zip(*CASES, strict=True))
    kind, nested, dtype, _, shape = range(5)
    for i, j in ((kind, nested), (kind, dtype), (nested, dtype), (nested, shape), (dtype, shape)):
        pairs = set(zip(columns[i], columns[j], strict=True))
        assert pairs == set(itertools.product(columns[i], columns[j])), (i, j)


def test_every_backend_is_under_test():
    assert {backend.name for backend in kernels.BACKENDS} == set(api.GPU_BACKENDS)


WAYS = [(backend, way) for backend in kernels.BACKENDS for way in backend.directions]


@pytest.mark.parametrize(
    ("backend", "direction", "kind", "nested", "dtype", "block_size", "number"),
    tiered(
        [(*way, *case) for way in WAYS for case in CASES],
        # Each way once, each shape and kind too.
        [(*way, *CASES[(2 * number + 1) % len(CASES)]) for number, way in enumerate(WAYS)],
    ),
    ids=str,
)
def test_close_to_the_oracle(backend, direction, kind, nested, dtype, block_size, number):
    shape = backend.shape(number, direction)
    w = kernels.weight(shape, direction, kind, nested, block_size)
    x = kernels.rows(shape, DTYPES[dtype])
    with interpreter(backend.gpu, sms=shape.sms):
        y = jax.jit(backend.run(direction))(x, w)
    assert y.dtype == dtype
    exact = kernels.product(x, reference.dense(w, jnp.float32), direction)
    assert kernels.error(y, exact) < INTERPRETED_RTOL[dtype]
    as_rounded = kernels.product(x, kernels.rounded(w, x.dtype, backend.rounds), direction)
    assert kernels.error(y, as_rounded) < ROUNDED_RTOL[dtype]


@pytest.mark.parametrize("backend", tiered(KERNELS, KERNELS[:1]), ids=str)
def test_one_wrong_block_is_an_error(backend):
    """The bound of the test above is tight enough to see one block's codes in reverse."""
    shape = backend.shape(0, "forward")
    w = kernels.weight(shape, "forward")
    row, block = np.unravel_index(np.argmax(w.scales), w.scales.shape)
    place = row, slice(32 * block, 32 * block + 32)
    spoiled = dataclasses.replace(w, codes=w.codes.at[place].set(w.codes[place][::-1]))
    x = kernels.rows(shape, jnp.bfloat16)
    with interpreter(backend.gpu, sms=shape.sms):
        y = jax.jit(backend.run("forward"))(x, spoiled)
    exact = kernels.product(x, reference.dense(w, jnp.float32), "forward")
    assert kernels.error(y, exact) > 2 * INTERPRETED_RTOL["bfloat16"]


def public(backend, w):
    """nf4_matmul as a function of x alone, by one backend."""
    return lambda x, codes=w.codes: nf4_matmul(
        x,
        codes,
        w.scales,
        shape=w.shape,
        kind=w.kind,
        block_size=w.block_size,
        backend=backend.name,
    )


@pytest.mark.parametrize("backend", tiered(BACKENDS, [BACKENDS[3]]), ids=str)
def test_the_public_call(backend):
    """Leading axes, under jit; gradients are those of the reference; twice the same bits."""
    shape = backend.shape(0, "forward")
    w = kernels.weight(shape, "forward")
    rng = np.random.default_rng(0)
    x, c = (
        jnp.asarray(rng.standard_normal((2, 1, shape.m // 2, size)), jnp.bfloat16)
        for size in w.shape[::-1]
    )

    def run(matmul):
        def loss(x):
            y = matmul(x)
            return (y.astype(jnp.float32) * c.astype(jnp.float32)).sum(), y

        if "backward" not in backend.directions:
            return jax.jit(lambda x: (matmul(x),))
        return jax.jit(jax.grad(loss, has_aux=True))

    ours = run(public(backend, w))
    with interpreter(backend.gpu, sms=shape.sms):
        found = ours(x)
        again = ours(x)
    dense = reference.dense(w, jnp.float32)
    expected = run(lambda x: x @ dense.T)(x.astype(jnp.float32))
    for one, same, exact in zip(found, again, expected, strict=True):
        assert one.dtype == x.dtype
        assert kernels.error(one, np.asarray(exact)) < INTERPRETED_RTOL["bfloat16"]
        np.testing.assert_array_equal(same, one)


@pytest.mark.parametrize(
    ("backend", "direction", "number", "rank"),
    tiered(
        [(*way, *low) for way in WAYS for low in ((0, 80), (2, 5))],
        [(*way, 0, 80) for way in WAYS if way[0].fused and way[1] == "forward"],
    ),
    ids=str,
)
def test_with_a_low_rank_term(backend, direction, number, rank):
    shape = backend.shape(number, direction)
    w, x = kernels.weight(shape, direction), kernels.rows(shape, jnp.bfloat16)
    h = kernels.rows(dataclasses.replace(shape, contraction=rank), jnp.bfloat16)
    b = kernels.rows(Shape(rank, 0, shape.n), jnp.bfloat16)
    with interpreter(backend.gpu, sms=shape.sms):
        y = jax.jit(backend.run(direction))(x, w, LowRank(h, b))
    exact = kernels.product(x, reference.dense(w, jnp.float32), direction)
    exact += kernels.product(h, b, "backward")
    assert kernels.error(y, exact) < INTERPRETED_RTOL["bfloat16"]


@pytest.mark.parametrize("backend", tiered(KERNELS, KERNELS[:1]), ids=str)
def test_a_batch_is_so_many_rows(backend):
    shape = backend.shape(2, "forward")
    w = kernels.weight(shape, "forward")
    x = kernels.rows(shape, jnp.bfloat16)
    with interpreter(backend.gpu, sms=shape.sms):
        together = public(backend, w)(x)
        batch = jax.vmap(public(backend, w))(x.reshape(shape.m // 2, 2, -1))
    np.testing.assert_array_equal(batch.reshape(together.shape), together)


@pytest.mark.parametrize("backend", tiered(KERNELS, KERNELS[:1]), ids=str)
def test_a_batch_of_weights(backend):
    shape = dataclasses.replace(backend.shape(0, "forward"), n=64, contraction=256)
    w = kernels.weight(shape, "forward")
    codes = jnp.stack([w.codes, w.codes[::-1]])
    x = kernels.rows(shape, jnp.bfloat16)
    with interpreter(backend.gpu, sms=shape.sms):
        batch = jax.jit(jax.vmap(public(backend, w), in_axes=(None, 0)))(x, codes)
        one_by_one = [public(backend, w)(x, one) for one in codes]
    np.testing.assert_array_equal(batch, jnp.stack(one_by_one))


@pytest.mark.parametrize("backend", KERNELS, ids=str)
@pytest.mark.parametrize(
    ("change", "dtype", "reason"),
    [
        ({}, "float32", "x is float32"),
        ({"layout": "halves"}, "bfloat16", "layout is 'halves'"),
        ({"block_size": 32}, "bfloat16", "block_size is 32"),
    ],
)
def test_what_is_refused_and_why(backend, change, dtype, reason):
    shape = backend.shape(0, "forward")
    w = dataclasses.replace(kernels.weight(shape, "forward"), **change)
    with interpreter(backend.gpu, sms=1), pytest.raises(Unsupported, match=reason):
        jax.eval_shape(backend.run("forward"), kernels.rows(shape, dtype), w)


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_without_a_gpu_it_is_refused(backend):
    shape = backend.shape(0, "forward")
    w, x = kernels.weight(shape, "forward"), kernels.rows(shape, jnp.bfloat16)
    for direction in backend.directions:
        with pytest.raises(Unsupported, match="the default device is a cpu, not a GPU"):
            backend.run(direction)(x, w)
