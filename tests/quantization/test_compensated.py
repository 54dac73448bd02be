"""Codes chosen for the outputs: against an independent GPTQ in NumPy, and what is stored."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.codebooks import CODEBOOKS
from qlora_jax.quantization.compensated import (
    DAMPING,
    SHRINK,
    InputCosts,
    inverse_factor,
    quantize_compensated,
    turns,
)
from qlora_jax.quantization.tensor import QuantizedTensor, quantize
from tests.tolerances import COMPENSATED_LOSS_RTOL, FACTOR_RTOL

BLOCK = 32


def problem(seed: int, out: int = 24, width: int = 96) -> tuple[np.ndarray, np.ndarray]:
    """A matrix, and the second moments of correlated inputs of unlike sizes."""
    random = np.random.default_rng(seed)
    mix = random.normal(size=(width, width)) * np.exp(-np.arange(width) / 20)
    inputs = random.normal(size=(4 * width, width)) @ mix.T
    w = random.normal(size=(out, width)) / np.sqrt(width)
    return w.astype(np.float32), (inputs.T @ inputs).astype(np.float32)


def compensated(w: np.ndarray, moments: np.ndarray, **how) -> QuantizedTensor:
    """`w` by the moments of its inputs."""
    return quantize_compensated(w, InputCosts.of(moments, BLOCK), **how)


def loss(w: np.ndarray, tensor: QuantizedTensor, moments: np.ndarray) -> float:
    """The sum over all inputs of |W x - Q x|^2, in float64."""
    left = np.float64(w) - np.asarray(tensor.dequantize("float32"), np.float64)
    return float(np.einsum("oi,ij,oj->", left, np.float64(moments), left))


def gptq(w: np.ndarray, moments: np.ndarray, scales: np.ndarray, order: np.ndarray) -> np.ndarray:
    """The paper's algorithm, one column after another, with H^-1 of those that are left.

    Each step solves for what is left anew, without a Cholesky factor: w_F -= e / [H_F^-1]_jj
    * [H_F^-1]_j.
    """
    H = np.float64(moments) + 0.01 * np.float64(np.diag(moments)).mean() * np.eye(len(moments))
    values, w, Q = CODEBOOKS["nf4"].astype(np.float64), np.float64(w).copy(), np.zeros(w.shape)
    for at, j in enumerate(order):
        left = order[at:]
        inverse = np.linalg.inv(H[np.ix_(left, left)])
        scale = scales[:, j // BLOCK].astype(np.float64)
        code = np.abs(w[:, j, None] - scale[:, None] * values).argmin(1)
        Q[:, j] = scale * values[code]
        w[:, left] -= np.outer((w[:, j] - Q[:, j]) / inverse[0, 0], inverse[0])
    return Q


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("seed", [0, 1])
def test_it_is_the_papers_algorithm_with_these_scales_and_this_order(seed, double_quant):
    w, moments = problem(seed)
    tensor = compensated(w, moments, double_quant=double_quant)
    scales = np.asarray(scales_of(tensor))
    wanted = gptq(w, moments, scales, turns(np.diag(moments), BLOCK))
    found = np.asarray(tensor.dequantize("float32"))
    # Float32 against float64: a weight halfway between two codes may take the other one.
    same = np.isclose(found, wanted, rtol=1e-5, atol=1e-6)
    assert same.mean() > 0.98
    left = np.float64(w) - wanted
    theirs = np.einsum("oi,ij,oj->", left, np.float64(moments), left)
    assert loss(w, tensor, moments) == pytest.approx(theirs, rel=COMPENSATED_LOSS_RTOL)


def scales_of(tensor: QuantizedTensor) -> np.ndarray:
    """The float32 scale of each block, as the model computes with it."""
    ones = np.full(tensor.codes.shape, 0xFF, np.uint8)  # code 15 stands for 1
    whole = QuantizedTensor(ones, tensor.absmax, tensor.shape, "float32", BLOCK, "nf4")
    return np.asarray(whole.dequantize("float32"))[:, ::BLOCK]


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_outputs_are_nearer_than_with_the_nearest_codes(seed):
    w, moments = problem(seed)
    for double_quant in (True, False):
        how = {"block_size": BLOCK, "double_quant": double_quant}
        plain = loss(w, quantize(w, **how), moments)
        tensor = compensated(w, moments, double_quant=double_quant)
        assert loss(w, tensor, moments) < plain / 2


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int4"])
def test_every_kind(kind):
    w, moments = problem(2)
    tensor = compensated(w, moments, kind=kind)
    plain = quantize(w, kind=kind, block_size=BLOCK)
    assert tensor.kind == kind
    assert loss(w, tensor, moments) < loss(w, plain, moments) / 2


@pytest.mark.parametrize("double_quant", [True, False])
def test_it_is_stored_as_plain_quantizing_stores(double_quant):
    w, moments = problem(3)
    how = {"block_size": BLOCK, "double_quant": double_quant}
    leaves = jax.tree.leaves_with_path(compensated(w, moments, double_quant=double_quant))
    plain = jax.tree.leaves_with_path(quantize(w, **how))
    kinds = [[(path, leaf.shape, leaf.dtype) for path, leaf in own] for own in (leaves, plain)]
    assert kinds[0] == kinds[1]
    assert all(isinstance(leaf, np.ndarray) for _, leaf in leaves)


@pytest.mark.parametrize("double_quant", [True, False])
def test_zeros_stay_zeros_and_inputs_that_never_came_do_no_harm(double_quant):
    w, moments = problem(4)
    w[:5] = 0
    w[:, 32:64] = 0
    moments[7] = moments[:, 7] = 0
    tensor = compensated(w, moments, double_quant=double_quant)
    dense = np.asarray(tensor.dequantize("float32"))
    assert np.isfinite(dense).all()
    np.testing.assert_array_equal(dense[:5], 0)
    none = compensated(w, np.zeros_like(moments))
    assert np.isfinite(np.asarray(none.dequantize("float32"))).all()


def test_the_factor_is_the_inverses_own():
    _, moments = problem(5)
    U = inverse_factor(moments, 0.01)
    H = np.float64(moments) + 0.01 * np.float64(np.diag(moments)).mean() * np.eye(len(moments))
    np.testing.assert_array_equal(U, np.triu(U))
    np.testing.assert_allclose(U @ H @ U.T, np.eye(len(H)), atol=FACTOR_RTOL)


def test_turns_keep_blocks_together():
    order = turns(np.array([1.0, 2, 9, 4, 5, 0]), 2)
    np.testing.assert_array_equal(order, [2, 3, 4, 5, 1, 0])


def test_blocks_that_do_not_fill_the_rows_are_refused():
    _, moments = problem(6, width=96)
    with pytest.raises(ValueError, match="in is 96; expected a multiple of 64"):
        InputCosts.of(moments, 64)


def test_a_blocks_scale_is_the_one_that_costs_least():
    w, moments = problem(7, width=BLOCK)
    order = turns(np.diag(moments), BLOCK)
    pivots = np.diag(inverse_factor(moments[np.ix_(order, order)], DAMPING))
    tries = SHRINK[:, None] * np.abs(w).max(axis=1)
    off = np.abs(w[None, :, :, None] - tries[:, :, None, None] * CODEBOOKS["nf4"]).min(axis=-1)
    cost = np.square(off[..., order] / pivots).sum(axis=-1)
    expected = tries[cost.argmin(axis=0), np.arange(len(w))]
    found = compensated(w, moments, double_quant=False).absmax[:, 0]
    np.testing.assert_allclose(found, expected, rtol=1e-6)
