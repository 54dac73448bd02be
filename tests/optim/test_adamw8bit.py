"""Moments in 8 bits: what a round trip may change, and what it may not."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from qlora_jax.optim.adamw8bit import (
    BLOCK,
    SMALLEST,
    Moment8,
    adamw8bit,
    packed,
    table_of,
    unpacked,
)
from tests.random_arrays import normal
from tests.tiers import tiered
from tests.tolerances import DYNAMIC_GRID_ATOL

SIZE = SMALLEST + 5  # of a layer; the last block has 5 numbers
LIMIT = 2.0**60


def round_trip(moment, signed):
    kept = packed(jnp.asarray(moment), len(moment), signed)
    assert isinstance(kept, Moment8)
    return np.asarray(unpacked(kept, jnp.asarray(moment), signed))


def half_step(scaled, signed):
    """Half of the distance of the values of the map around each number."""
    table = table_of(signed).astype(np.float64)
    above = np.clip(np.searchsorted(table, scaled), 1, 255)
    half = (table[above] - table[above - 1]) / 2
    return np.maximum(half, table[0] - scaled)  # the signed map begins at -0.993


def padded_blocks(moment):
    flat = moment.reshape(len(moment), -1)
    return np.pad(flat, ((0, 0), (0, -flat.shape[1] % BLOCK))).reshape(-1, BLOCK)


@given(
    arrays(
        np.float32,
        (2, SIZE),
        elements=st.floats(-LIMIT, LIMIT, width=32, allow_subnormal=False),
        fill=st.floats(-1, 1, width=32, allow_subnormal=False),
    ),
    st.booleans(),
)
def test_a_round_trip_is_within_half_a_step_of_the_map(moment, signed):
    if not signed:
        moment = np.abs(moment)
    found = round_trip(moment, signed)
    assert (found[moment == 0] == 0).all()
    blocks, back = padded_blocks(moment).astype(np.float64), padded_blocks(found)
    absmax = np.abs(blocks).max(axis=1, keepdims=True)
    usable = absmax[:, 0] > 1e-30
    scaled = blocks[usable] / absmax[usable]
    error = np.abs(back[usable] / absmax[usable] - scaled)
    grid = 1.1 * DYNAMIC_GRID_ATOL
    half = np.maximum(half_step(scaled - grid, signed), half_step(scaled + grid, signed))
    assert (error <= half + grid).all()
    # The largest of a block comes back as it is, but for -1, which the signed map does not have.
    assert (np.abs(back).max(axis=1, initial=0)[usable] >= 0.99 * absmax[usable, 0]).all()


@given(st.integers(0, 2**32 - 1), st.booleans())
def test_what_was_rounded_once_stays(seed, signed):
    """Codes whose steps are wider than the grid come back as themselves."""
    rng = np.random.default_rng(seed)
    table = table_of(signed)
    wide = np.flatnonzero(np.abs(table) > 2e-3)
    blocks = table[rng.choice(wide, (1, SMALLEST))]
    blocks[:, ::BLOCK] = 1  # absmax
    scale = np.float32(2.0 ** rng.integers(-20, 20))
    np.testing.assert_array_equal(round_trip(blocks * scale, signed), blocks * scale)


def test_zeros_are_zeros_from_the_start():
    tx = adamw8bit(1e-2)
    params = {"w": jnp.ones((2, SIZE))}
    state = tx.init(params)
    for kept, signed in ((state.m["w"], True), (state.v["w"], False)):
        again = packed(jnp.zeros((2, SIZE)), 2, signed)
        jax.tree.map(np.testing.assert_array_equal, kept, again)
        np.testing.assert_array_equal(unpacked(kept, params["w"], signed), np.zeros((2, SIZE)))


def test_a_parameter_without_a_gradient_does_not_drift():
    tx = adamw8bit(1e-2)
    params = {"w": jnp.ones((1, SIZE))}
    grads = {"w": normal(0, 1, SIZE).at[0, ::3].set(0)}
    state = tx.init(params)
    for _ in range(5):
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_array_equal(params["w"][0, ::3], 1)
    assert (np.asarray(params["w"][0, 1::3]) != 1).all()


@pytest.mark.parametrize(
    ("shape", "layers", "blocks"),
    tiered(
        [
            ((3, SMALLEST), 3, 16),
            ((3, 64, 65), 3, 17),
            ((7, SMALLEST), 3, 48),  # 3 rows a layer, 2 more than there are
            ((3, SMALLEST - 1), 3, None),
            ((SMALLEST,), SMALLEST, None),
        ],
        [((7, SMALLEST), 3, 48), ((3, SMALLEST - 1), 3, None)],
    ),
)
def test_blocks_are_of_one_layer(shape, layers, blocks):
    moment = normal(0, *shape)
    kept = packed(moment, layers, True)
    if blocks is None:
        assert kept is moment
        return
    assert kept.codes.shape == (layers, blocks, BLOCK)
    assert kept.absmax.shape == (layers, blocks)
    back = unpacked(kept, moment, True)
    assert back.shape == shape
    rows = -(-shape[0] // layers)
    alone = moment[:rows]
    np.testing.assert_array_equal(unpacked(packed(alone, 1, True), alone, True), back[:rows])
