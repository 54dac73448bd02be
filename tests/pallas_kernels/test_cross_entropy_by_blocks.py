"""The loss by blocks of a 4-bit head, or one in host memory: what it computes, reads and holds."""

import functools
import math
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import gpu
from pallas_kernels.choices import explain
from pallas_kernels.cross_entropy import api, by_blocks, reference
from pallas_kernels.cross_entropy.head_blocks import HOST, Blocks, even_rows
from pallas_kernels.nf4_matmul.reference import dense
from pallas_kernels.nf4_matmul.weight import Weight, stored
from pallas_kernels.quantize.api import DoubleQuantized, double_quantize, quantize_4bit
from tests.tiers import tiered
from tests.tolerances import BLOCKS_GRADIENT_RTOL, VJP_ATOL, VJP_RTOL

STORED = {  # kind, block_size, double_quant, layout
    "nf4": ("nf4", 64, False, "bnb"),
    "nf4, double quantized": ("nf4", 64, True, "bnb"),
    "nf4, halves": ("nf4", 64, True, "halves"),
    "int4 by 128": ("int4", 128, True, "bnb"),
}
FORMS = ("dense", *STORED)


def four_bit(shape, kind="nf4", block_size=64, double_quant=True, layout="bnb", seed=0) -> Weight:
    """A head (V, D) of random codes and scales; its numbers are near 1."""
    rng = np.random.default_rng(seed)
    n, rows, width = math.prod(shape), *shape
    by_rows = width % block_size == 0
    packed = (rows, width // 2) if by_rows else (-(-n // 2),)
    each = (rows, width // block_size) if by_rows else (-(-n // block_size),)

    def numbers(*shape):
        return (1 + rng.random(shape)).astype(np.float32)

    codes, scales = rng.integers(0, 256, packed).astype(np.uint8), numbers(*each)
    if double_quant:
        nested = numbers(-(-math.prod(each) // 256)) / 4
        scales = DoubleQuantized(rng.integers(0, 256, each).astype(np.uint8), nested, numbers())
    arrays = jax.tree.map(jnp.asarray, (codes, scales))
    return stored(*arrays, shape, kind, block_size, layout)


def case(tokens: int, vocabulary: int, width: int, form: str, dtype=jnp.float32, seed: int = 0):
    """x, the head as it is stored, the same dense, labels of which some do not count.

    Logits are near 4, whatever the width: their rounding would be that of the exponentials.
    """
    rng = np.random.default_rng(seed)
    x = 4 / width**0.5 * rng.standard_normal((tokens, width))
    labels = rng.integers(-vocabulary // 4, vocabulary, tokens)
    x, labels = jnp.asarray(x, dtype), jnp.asarray(np.where(labels < 0, -100, labels), jnp.int32)
    if form == "dense":
        head = exact = jnp.asarray(rng.standard_normal((vocabulary, width)), dtype)
    else:
        head = four_bit((vocabulary, width), *STORED[form], seed=seed)
        exact = dense(head, dtype)
    return x, head, exact, labels


def to_host(head):
    pinned = jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")
    return jax.device_put(head, pinned)


@functools.partial(jax.jit, static_argnames="softcap")
def ours(x, head, labels, softcap=None):
    """((loss, right), dx), by blocks wherever the head is."""

    def loss(x):
        sums = by_blocks.by_blocks(x, head, labels, softcap)
        return 3 * sums.loss, sums.right

    return jax.value_and_grad(loss, has_aux=True)(x)


@functools.partial(jax.jit, static_argnames="softcap")
def plain(x, head, labels, softcap=None):
    def loss(x):
        loss, right = reference.cross_entropy(x, head, labels, softcap)
        return 3 * loss, right

    return jax.value_and_grad(loss, has_aux=True)(x)


@pytest.fixture
def small(monkeypatch):
    """Parts and blocks of which there are several, the last ones smaller."""
    sizes = by_blocks.Sizes(tokens=16, rows=96)
    monkeypatch.setattr(by_blocks, "sizes_here", lambda *shape: sizes)


@pytest.mark.fully_compiled
@pytest.mark.parametrize(
    ("form", "softcap"),
    tiered(product(FORMS, [None, 5.0]), [("nf4, double quantized", 5.0)]),
)
def test_equals_the_reference_from_the_device_and_from_the_host(
    small, strict_promotion, form, softcap
):
    x, head, exact, labels = case(37, 1003, 128, form)
    (loss, right), dx = found = ours(x, head, labels, softcap)
    (wanted_loss, wanted_right), wanted = plain(x, exact, labels, softcap)
    np.testing.assert_allclose(loss, wanted_loss, rtol=VJP_RTOL)
    np.testing.assert_allclose(dx, wanted, rtol=VJP_RTOL, atol=VJP_ATOL)
    assert right == wanted_right
    assert not np.asarray(dx)[np.asarray(labels) < 0].any()
    # The same program but for the copies, and the same when nobody asks for a gradient.
    chosen = jax.jit(api.cross_entropy, static_argnames="softcap")
    from_host = ours(x, to_host(head), labels, softcap)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(from_host), strict=True):
        np.testing.assert_array_equal(one, other)
    sums = chosen(x, to_host(head), labels, softcap=softcap)
    np.testing.assert_allclose(3 * sums.loss, loss, rtol=VJP_RTOL)
    assert sums.right == right


@pytest.mark.fully_compiled
@pytest.mark.parametrize(
    ("form", "dtype"),
    tiered(
        product(["dense", "nf4, double quantized"], BLOCKS_GRADIENT_RTOL),
        [("nf4, double quantized", "bfloat16")],
    ),
)
def test_sixteen_bits(small, strict_promotion, form, dtype):
    """The reference has the rounded numbers, and rounds nothing itself."""
    x, head, exact, labels = case(37, 1003, 128, form, jnp.dtype(dtype))
    (loss, right), dx = found = ours(x, head, labels)
    wide = x.astype(jnp.float32), exact.astype(jnp.float32)
    (wanted_loss, wanted_right), wanted = plain(*wide, labels)
    assert dx.dtype == dtype
    np.testing.assert_allclose(loss, wanted_loss, rtol=VJP_RTOL)
    assert right == wanted_right
    error = np.linalg.norm(dx.astype(jnp.float32) - wanted)
    assert error <= BLOCKS_GRADIENT_RTOL[dtype] * np.linalg.norm(wanted)
    from_host = ours(x, to_host(head), labels)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(from_host), strict=True):
        np.testing.assert_array_equal(one, other)


@settings(max_examples=5)  # each compiles programs of its own
@given(
    tokens=st.integers(1, 40),
    vocabulary=st.integers(1, 700),
    width=st.sampled_from([64, 100, 7]),  # 100 and 7: codes and scales are flat
    rows=st.integers(1, 300),
    part=st.integers(10, 40),
    form=st.sampled_from(FORMS[:3]),
    seed=st.integers(0, 2**31),
)
def test_any_vocabulary_and_any_number_of_tokens(tokens, vocabulary, width, rows, part, form, seed):
    x, head, exact, labels = case(tokens, vocabulary, width, form, seed=seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(by_blocks, "sizes_here", lambda *shape: by_blocks.Sizes(part, rows))
        (loss, right), dx = jax.jit(lambda *arrays: ours.__wrapped__(*arrays))(x, head, labels)
    (wanted_loss, wanted_right), wanted = plain(x, exact, labels)
    np.testing.assert_allclose(loss, wanted_loss, rtol=VJP_RTOL, atol=VJP_ATOL)
    np.testing.assert_allclose(dx, wanted, rtol=VJP_RTOL, atol=VJP_ATOL)
    assert right == wanted_right


def cut(shape, most: int, block_size=None, double_quant=False) -> tuple[int, int, int]:
    """(rows, count, rest) of the blocks of such a head; dense without a block_size."""
    found = []

    def look(head):
        if block_size:
            codes, scales = quantize_4bit(head, block_size=block_size)
            scales = double_quantize(scales) if double_quant else scales
            head = stored(codes, scales, shape, "nf4", block_size, "bnb")
        blocks = Blocks(head, even_rows(head, most))
        found.append((blocks.rows, blocks.count, blocks.rest))

    jax.eval_shape(look, jax.ShapeDtypeStruct(shape, jnp.float32))
    return found[0]


@given(
    vocabulary=st.integers(1, 5000),
    width=st.sampled_from([7, 64, 100, 576, 4096]),
    most=st.integers(1, 5000),
    block_size=st.sampled_from([None, 64, 4096]),  # None: dense
    double_quant=st.booleans(),
)
def test_blocks_end_where_scales_do(vocabulary, width, most, block_size, double_quant):
    group = (block_size or 1) * (256 if block_size and double_quant else 1)
    fewest = np.lcm(8, group // np.gcd(group, width))
    rows, count, rest = cut((vocabulary, width), most, block_size, double_quant)
    assert rows % fewest == 0
    assert rows <= max(most, fewest)
    assert count * rows + rest == vocabulary
    assert count + (rest > 0) <= -(-vocabulary // (max(most // fewest, 1) * fewest))


@pytest.mark.parametrize("block_size", [None, 64])
@pytest.mark.parametrize(("width", "most", "count"), [(4096, 4096, 32), (2048, 8192, 16)])
def test_blocks_of_llama_3_are_even(width, most, count, block_size):
    found = cut((128256, width), most, block_size, double_quant=True)
    assert found == (128256 // count, count, 0)


@pytest.mark.parametrize("form", tiered(["dense", "nf4"], ["nf4"]))
def test_nan_in_one_token_is_nan_in_the_loss_and_in_that_token_alone(small, form):
    """XLA's maximum on a CPU loses NaN; the sum of exponentials does not."""
    x, head, _, labels = case(64, 1003, 64, form)
    labels = labels.at[5].set(7)
    x = x.at[5, 3].set(jnp.nan)
    (loss, _), dx = ours(x, head, labels)
    assert np.isnan(loss)
    np.testing.assert_array_equal(np.isnan(dx).any(axis=1), np.arange(64) == 5)
    (loss, _), dx = ours(x, head, labels.at[5].set(-100))
    assert np.isfinite(loss)
    assert np.isfinite(dx).all()


def test_nan_and_infinity_in_the_head_are_nan_in_the_loss(small):
    x, head, _, labels = case(9, 1003, 64, "dense")
    for bad in (jnp.nan, jnp.inf):
        for row in (0, 500, 1002):
            assert np.isnan(ours(x, head.at[row, 0].set(bad), labels)[0][0])


def test_a_label_that_is_no_row_is_nan_in_both_forms(small):
    x, head, _, labels = case(9, 1003, 64, "dense")
    labels = labels.at[4].set(1003)
    assert np.isnan(ours(x, head, labels)[0][0])
    assert np.isnan(api.cross_entropy(x, head, labels).loss)


def test_nothing_counted_is_zero(small):
    x, head, _, _ = case(5, 1003, 64, "nf4")
    (loss, right), dx = ours(x, head, jnp.full(5, -100))
    assert (loss, right) == (0, 0)
    assert not dx.any()


@pytest.mark.fully_compiled
def test_a_host_head_of_another_dtype_is_rounded_to_that_of_x(small):
    x, head, _, labels = case(9, 1003, 64, "dense")
    x = x.astype(jnp.bfloat16)
    (loss, _), dx = ours(x, to_host(head), labels)
    (same_loss, _), same = ours(x, head.astype(jnp.bfloat16), labels)
    assert loss == same_loss
    np.testing.assert_array_equal(dx, same)


@pytest.mark.parametrize("form", ["nf4", "dense"])
def test_a_head_to_train_is_at_hand(form):
    x, head, _, labels = case(4, 16, 64, form)
    with pytest.raises(ValueError, match="a head to train must be dense and in device memory"):
        api.cross_entropy(x, to_host(head), labels, train_head=True)


def test_widths_must_agree():
    x, head, _, labels = case(4, 16, 64, "nf4")
    with pytest.raises(ValueError, match=r"x is float32 \(4, 32\), head is 4-bit \(16, 64\)"):
        api.cross_entropy(x[:, :32], head, labels)


def temporary_bytes(head: Weight, form, gradient: bool) -> int:
    x = jax.ShapeDtypeStruct((2048, head.shape[1]), jnp.float32)
    labels = jax.ShapeDtypeStruct((2048,), jnp.int32)
    head = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), head)

    def loss(x, head, labels):
        return form(x, head, labels)[0]

    step = jax.jit(jax.grad(loss) if gradient else loss)
    return step.lower(x, head, labels).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("gradient", [False, True])
def test_neither_a_dense_head_nor_its_logits_are_ever_in_memory(gradient):
    """What first makes the head dense shows that the bound would catch it."""
    head = four_bit((32768, 64))

    def whole(x, head, labels):
        return api.cross_entropy(x, dense(head, x.dtype), labels)

    bound = 32768 * 64 * 4
    assert temporary_bytes(head, api.cross_entropy, gradient) < bound
    assert temporary_bytes(head, whole, gradient) > bound


def loops(jaxpr):
    """(body, its counter, the first of what it carries) of each loop, also of inner programs."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "while":
            body = equation.params["body_jaxpr"].jaxpr
            yield body, body.invars[equation.params["body_nconsts"]]
        for inner in equation.params.values():
            if hasattr(inner, "jaxpr"):
                yield from loops(inner.jaxpr)


@pytest.mark.parametrize("form", ["dense", "nf4, double quantized"])
def test_a_slice_of_host_memory_starts_at_the_loops_counter_times_a_constant(small, form):
    """Only of such a slice does XLA make a memcpy for a GPU; of any other, a kernel."""
    x, head, _, labels = case(20, 1003, 64, form)
    program = jax.make_jaxpr(lambda head: by_blocks.by_blocks(x, head, labels, None))(to_host(head))
    ((body, counter),) = loops(program.jaxpr)
    made_by = {made: equation for equation in body.eqns for made in equation.outvars}
    slices = [each.invars for each in body.eqns if each.primitive.name == "dynamic_slice"]
    starts = [made_by[start] for array, start, *_ in slices if array.aval.memory_space is HOST]
    assert len(starts) == {"dense": 1, "nf4, double quantized": 3}[form]
    for start in starts:
        assert start.primitive.name == "mul"
        assert start.invars[0] is counter


def test_on_a_gpu_the_kernel_makes_a_block_dense():
    x = jax.ShapeDtypeStruct((64, 128), jnp.bfloat16)
    labels = jax.ShapeDtypeStruct((64,), jnp.int32)
    head = four_bit((2048, 128))
    with gpu.pretend(gpu.KNOWN["rtx4090"], interpret=False):
        explained = explain("cross_entropy", x, head, labels)
    assert explained.forward.backend == "mosaic"


@pytest.mark.parametrize(("width", "itemsize", "rows"), [(4096, 2, 4096), (8192, 2, 2048)])
def test_a_block_is_32_mib_on_a_gpu(width, itemsize, rows):
    with gpu.pretend(gpu.KNOWN["rtx4090"], interpret=False):
        assert by_blocks.sizes_here(4096, width, itemsize) == (1024, rows)
        assert by_blocks.sizes_here(65536, 64, itemsize) == (8192, 8192)
    assert by_blocks.sizes_here(256, 576, 4) == (64, 4096)
