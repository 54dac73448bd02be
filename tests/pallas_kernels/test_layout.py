"""Registers that kernels relabel lie where Mosaic's layouts, and the matrix units, expect them.

The interpreter knows no layouts: there a kernel multiplies logical arrays, whatever the registers
hold. So what is done to registers is shown here, on a warpgroup in NumPy (warpgroup.py).
"""

import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.nf4_matmul import decode, fragments, small_m_fragments
from tests.pallas_kernels import warpgroup
from tests.pallas_kernels.planted import Bug, built
from tests.pallas_kernels.warpgroup import Ref, places, spread
from tests.tolerances import REORDERED_SUM_ATOL

DTYPES = [jnp.bfloat16, jnp.float16]
LANE, WARP = np.arange(128) % 32, np.arange(128) // 32


def random(dtype, *shape):
    """Bytes of any value, or normal floats."""
    rng = np.random.default_rng(0)
    if np.issubdtype(dtype, np.integer):
        return rng.integers(0, np.iinfo(dtype).max + 1, shape, dtype)
    return rng.standard_normal(shape).astype(dtype)


def table(dtype):
    """(8 words for the interpreter, the array in every lane's registers) of NF4."""
    words = decode.table_words("nf4", dtype)
    return list(words.reshape(decode.WORDS, -1)[:, 0]), spread(words, decode.TABLE)


def test_the_layouts_of_mma_are_those_of_the_ptx_isa():
    """Section 9.7.14.5.8, mma.m16n8k16: what `places` reads out of Mosaic is what NVIDIA says."""
    group, pair = LANE // 4, 2 * (LANE % 4)
    left = places(plgpu.Layout.MMA_LHS(jnp.bfloat16, m_warps=4), (64, 16)).reshape(4, 128, 2)
    rows = 16 * WARP + group
    for register, (row, column) in enumerate([(0, 0), (8, 0), (0, 8), (8, 8)]):
        want = 16 * (rows + row) + pair + column
        found = [r for r in range(4) if np.array_equal(left[r, :, 0], want)]
        assert len(found) == 1, register
        np.testing.assert_array_equal(left[found[0], :, 1], want + 1)
    right = places(plgpu.Layout.MMA_RHS(jnp.bfloat16, m_warps=4), (16, 8)).reshape(2, 128, 2)
    np.testing.assert_array_equal(right[0, :, 0], 8 * pair + group)
    np.testing.assert_array_equal(right[1, :, 0], 8 * (pair + 8) + group)
    np.testing.assert_array_equal(right[..., 1], right[..., 0] + 8)


def test_spread_and_gathered():
    array = random(np.float32, 64, 128)
    spreads = spread(array, decode.WEIGHTS)
    np.testing.assert_array_equal(spreads.gathered(), array)
    spreads.registers[0, 0, 0, 0, 0, 0, 0] = spreads.registers[1, 0, 0, 0, 0, 0, 0]
    assert (spreads.gathered() != array).sum() == 128 * 8


def test_every_lane_holds_the_whole_table():
    words, in_lanes = table(jnp.bfloat16)
    for word, register in zip(words, in_lanes.registers.flat, strict=True):
        np.testing.assert_array_equal(register, word)


def test_the_scales_of_a_lane_are_those_of_its_rows():
    """What multiplies WEIGHTS by broadcast: one row's scale in each of its lanes."""
    weights, rows = places(decode.WEIGHTS, (64, 64)), places(decode.ROWS, (64,))
    np.testing.assert_array_equal(weights[..., 0] // 64, rows[..., 0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_codes_decode_into_weights(dtype):
    """Hopper and Blackwell: decode.CODES -> decode.WEIGHTS."""
    assert not differs_decoding(dtype)


def differs_decoding(dtype) -> int:
    """Number of weights that do not lie where the layout says."""
    codes = random(np.uint8, 64, 64)
    words, in_lanes = table(dtype)
    with warpgroup.on(decode):
        values = decode.decode(spread(codes, decode.CODES), in_lanes, dtype, interpret=False)
    twin = decode.lookup_jnp(jnp.asarray(codes), words, dtype)
    return int((values.gathered() != np.asarray(twin)).sum())


def test_a_wrong_register_map_of_weights_fails(monkeypatch):
    def swapped(register):
        return [(register[0] ^ 1, *register[1:])]

    monkeypatch.setattr(decode, "same_register", swapped)
    assert differs_decoding(jnp.bfloat16)


def ampere(dtype, transposed, fragments=fragments):
    """y (rows, 128) out of registers, and what it should be: one step of the Ampere kernel."""
    order = {"transposed": transposed, "interpret": False}
    x = random(dtype, 32, 64)
    codes = random(np.uint16, 64, 32) if transposed else random(np.uint8, 128, 32)
    scales = random(np.float32, 2, 64) if transposed else random(np.float32, 1, 128)
    words, in_lanes = table(dtype)
    with warpgroup.on(decode, fragments):
        w = fragments.read_w(Ref(codes), Ref(scales), in_lanes, dtype, **order).gathered()
        right = fragments.read_x(Ref(x), **order).gathered()
        sums = w.astype(np.float32) @ right.astype(np.float32)
        y = fragments.upright(spread(sums, fragments.ACCUMULATOR), **order).gathered()
    twin = fragments.read_w_jnp(jnp.asarray(codes), jnp.asarray(scales), words, dtype, transposed)
    return y, x.astype(np.float32) @ np.asarray(twin).astype(np.float32).T


@pytest.mark.parametrize("transposed", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_ampere_kernel_multiplies_the_right_pairs(dtype, transposed):
    """The contraction is permuted on both sides alike, and the result turned upright."""
    y, exact = ampere(dtype, transposed)
    np.testing.assert_allclose(y, exact, rtol=0, atol=REORDERED_SUM_ATOL)


@pytest.mark.parametrize("transposed", [False, True], ids=["forward", "backward"])
def test_the_low_rank_term_of_the_ampere_kernel_meets_its_columns(transposed):
    """b's rows are given in the order of the accumulator's: fragments.columns."""
    order = fragments.columns(transposed)
    sums = np.broadcast_to(order[:, None].astype(np.float32), (128, 32)).copy()
    with warpgroup.on(fragments):
        y = fragments.upright(
            spread(sums, fragments.ACCUMULATOR), transposed=transposed, interpret=False
        ).gathered()
    np.testing.assert_array_equal(y, np.broadcast_to(np.arange(128), (32, 128)))


@pytest.mark.parametrize(
    ("transposed", "old", "new"),
    [
        (False, "new[2 * k32 + r // 2, row, r % 2,", "new[2 * k32 + r % 2, row, r // 2,"),
        (False, "place = i, 2 * k32 + r // 2, 0, r % 2,", "place = i, 2 * k32 + r % 2, 0, r // 2,"),
        (False, "[scales[i, 0, h, 0, 0]]", "[scales[i, 0, 1 - h, 0, 0]]"),
        (False, "new[row, i, 0, 0, h, 0, 0]", "new[row, i, 0, 0, 1 - h, 0, 0]"),
        (False, "prmt.b32 $0, l, h, {0x5410}; p", "prmt.b32 $0, h, l, {0x5410}; p"),
        (True, "eight, i = divmod(r, 2)", "i, eight = divmod(r, 2)"),
        (True, "scales[0, 2 * k16 + eight,", "scales[0, 2 * k16 + 1 - eight,"),
        (True, "assembly(SHUFFLE, eights, 2)", "assembly(SHUFFLE, eights, 2)[::-1]"),
        (
            True,
            "for c in range(2) for i in range(2) for h",
            "for c in range(2) for h in range(2) for i",
        ),
        (True, "shr.u32 c, b, 4;", "shr.u32 c, a, 4;"),
    ],
)
def test_a_wrong_map_of_the_ampere_kernel_fails(transposed, old, new):
    bug = Bug("a wrong map", old, new, ("numbers",), "fragments")
    y, exact = ampere(jnp.bfloat16, transposed, built(fragments, bug))
    assert not np.abs(y - exact).max() < 100 * REORDERED_SUM_ATOL  # NaN too


def few_rows(dtype, module, rows=128, columns=16):
    """y^T (rows, columns) out of registers, and what it should be: one block of 64, scaled."""
    codes, x = random(np.uint8, rows, 32), random(dtype, columns, 64)
    scales = random(np.float32, rows, 4)
    words, in_lanes = table(dtype)
    with warpgroup.on(decode, module):
        codes_in_lanes = spread(codes, module.CODES)
        w = module.left(codes_in_lanes, in_lanes, dtype, interpret=False).gathered()
        right = module.right(spread(x, module.X), interpret=False).gathered()
        in_lanes = spread(scales, module.scales_layout(4))
        scale = module.columns(in_lanes, interpret=False)[2].gathered()
        sums = w.astype(np.float32) @ right.astype(np.float32) * scale[:, None]
        y = module.singles(spread(sums, module.SUMS), interpret=False).gathered()
    twin = np.asarray(decode.lookup_jnp(jnp.asarray(codes), words, dtype)).astype(np.float32)
    return y, twin @ x.astype(np.float32).T * scales[:, 2:3]


@pytest.mark.parametrize(("rows", "columns"), [(64, 8), (64, 16), (128, 16)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_kernel_of_few_rows_multiplies_the_right_pairs(dtype, rows, columns):
    y, exact = few_rows(dtype, built(small_m_fragments), rows, columns)
    np.testing.assert_allclose(y, exact, rtol=0, atol=REORDERED_SUM_ATOL)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("(tile, 2 * chunk + h, inner, i, *rest)", "(tile, 2 * chunk + i, inner, h, *rest)"),
        ("(2 * chunk + h, rows, i, *rest, 0, 0)", "(2 * chunk + i, rows, h, *rest, 0, 0)"),
        ("slice(2 * i, 2 * i + 2)", "slice(6 - 2 * i, 8 - 2 * i)"),
        ("slice(block, block + 1)", "slice(block ^ 1, (block ^ 1) + 1)"),
        ("yield (tile, 0, half, 0, 0)", "yield (tile, 0, 1 - half, 0, 0)"),
        ("yield (*register[:-1], i, 0)", "yield (*register[:-1], 1 - i, 0)"),
    ],
)
def test_a_wrong_map_of_the_kernel_of_few_rows_fails(old, new):
    bug = Bug("a wrong map", old, new, ("numbers",), "small_m_fragments")
    y, exact = few_rows(jnp.bfloat16, built(small_m_fragments, bug))
    assert not np.abs(y - exact).max() < 100 * REORDERED_SUM_ATOL
