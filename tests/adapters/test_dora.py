"""DoRA's layer against PEFT's values and gradients, against autodiff, and what it must never keep.

peft_dora.npz: PEFT 0.21.2 (torch 2.13, CPU, float32) on one biased linear of 24 x 128, r = 4 and
alpha = 6: inputs, y, and the gradients of sum(y * dy). `dropout` has a fixed mask with rate 0.5.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.adapters.dora import row_norms, row_squares, stretch
from qlora_jax.models import linear
from qlora_jax.models.linear import Branch, Linear
from qlora_jax.quantization.tensor import quantize
from tests.golden_data import GoldenFile
from tests.random_arrays import normal
from tests.tolerances import ROW_LENGTH_BY_SUMS_RTOL, ROW_LENGTH_RTOL, VJP_ATOL, VJP_RTOL

SCALE = jnp.float32(1.5)
INPUTS = ("x", "dy", "W", "bias", "A", "B", "m", "kept")


def close(found, wanted) -> None:
    np.testing.assert_allclose(found, wanted, rtol=VJP_RTOL, atol=VJP_ATOL)


@pytest.mark.parametrize("name", ["plain", "dropout"])
def test_values_and_gradients_are_pefts(name, monkeypatch):
    path = Path(__file__).with_name("peft_dora.npz")
    inputs = lambda key: key.split(".")[1] in INPUTS  # noqa: E731
    with GoldenFile(path, inputs, part=lambda key: key.startswith(f"{name}.")) as golden:
        x, dy, W, bias, A, B, m = (jnp.asarray(golden.input(f"{name}.{key}")) for key in INPUTS[:7])
        rate, key = 0.0, None
        if name == "dropout":
            kept = np.unpackbits(golden.input("dropout.kept")).reshape(x.shape)
            monkeypatch.setattr(linear, "dropped", lambda x, rate, key: x * kept / (1 - rate))
            rate, key = 0.5, jax.random.key(0)
        layer = Linear(W, bias)

        def loss(x, A, B, m):
            y = layer(x, Branch(A, B.T, SCALE, rate, key, m))
            return (y * dy).sum(), y

        gradients, y = jax.grad(loss, (0, 1, 2, 3), has_aux=True)(x, A, B, m)
        found = dict(zip(("dx", "dA", "dB", "dm"), gradients, strict=True))
        found |= {"y": y, "m_begin": jnp.sqrt(row_squares(W))}
        for key in golden.outputs():
            golden.compare(key, found[key.split(".")[1]], rtol=VJP_RTOL, atol=VJP_ATOL)


def bases() -> dict:
    """Weights (24, 128): dense, 4-bit by rows, and with blocks that do not fill the rows."""
    w = normal(3, 24, 128)
    packed = {kind: quantize(w, kind=kind) for kind in ("nf4", "fp4", "int4")}
    flat = {"float32 scales": quantize(w, double_quant=False), "flat": quantize(w, block_size=256)}
    return {"dense": w, **packed, **flat, "halves": packed["nf4"].prepack("halves")}


def dense(weight) -> jax.Array:
    return weight if isinstance(weight, jax.Array) else weight.dequantize("float32")


@pytest.mark.parametrize("base", bases())
def test_row_squares_are_those_of_the_dense_matrix(base, strict_promotion):
    weight = bases()[base]
    wanted = np.square(np.asarray(dense(weight), np.float64)).sum(1)
    np.testing.assert_allclose(row_squares(weight), wanted, rtol=ROW_LENGTH_RTOL)


@pytest.mark.parametrize("base", ["dense", "nf4", "flat", "halves"])
@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_gradients_are_those_of_autodiff(base, rate, strict_promotion):
    weight = bases()[base]
    key = jax.random.key(5) if rate else None
    dy, args = normal(9, 5, 24), (normal(4, 5, 128), normal(0, 4, 128), normal(1, 4, 24) / 8)
    m = 1 + normal(2, 24) ** 2

    def ours(x, A, Bt, m):
        y = linear.adapted(x, weight, Branch(A, Bt, SCALE, rate, key, m))
        return (y * dy).sum(), y

    def plain(x, A, Bt, m):
        W = dense(weight)
        length = jnp.linalg.norm(jax.lax.stop_gradient(W + SCALE * Bt.T @ A), axis=1)
        dropped = linear.dropped(x, rate, key)
        lora = SCALE * (dropped @ A.T) @ Bt
        y = x @ W.T + (m / length - 1) * (dropped @ W.T) + m / length * lora
        return (y * dy).sum(), y

    every = (0, 1, 2, 3)
    found = jax.grad(ours, every, has_aux=True)(*args, m)
    wanted = jax.grad(plain, every, has_aux=True)(*args, m)
    scale = 1 / np.sqrt(128)  # sums of 128 products near 1
    jax.tree.map(lambda a, b: close(a * scale, b * scale), found, wanted)


def test_nothing_dense_is_kept_for_the_backward_pass():
    weight = quantize(normal(3, 24, 128))
    branch = Branch(normal(0, 4, 128), normal(1, 4, 24), SCALE, magnitude=jnp.ones(24))

    def y(x, A, Bt, m):
        own = branch._replace(A=A, Bt=Bt, magnitude=m)
        return linear.adapted(x, weight, own)

    args = normal(4, 2, 128), branch.A, branch.Bt, branch.magnitude
    pull_back = jax.vjp(y, *args)[1]
    # The largest are the 4-bit codes, which the base holds anyway.
    assert max(leaf.size for leaf in jax.tree.leaves(pull_back)) == weight.codes.size < 24 * 128


def test_a_row_of_zeros_and_a_layer_without_an_adapter_stay_as_they_are():
    W = normal(3, 24, 128).at[2].set(0)
    A, Bt = normal(0, 4, 128), jnp.zeros((4, 24))
    x = normal(4, 5, 128)
    m = jnp.sqrt(row_squares(W))
    gradient = jax.grad(lambda m: linear.adapted(x, W, Branch(A, Bt, SCALE, magnitude=m)).sum())(m)
    assert np.isfinite(gradient).all()
    close(linear.adapted(x, W, Branch(A, Bt, SCALE, magnitude=m)), x @ W.T)
    none = Branch(jnp.zeros((4, 128)), Bt, jnp.float32(0), magnitude=jnp.zeros(24))
    np.testing.assert_array_equal(linear.adapted(x, W, none), linear.matmul(x, W))
    slope = jax.grad(lambda m: linear.adapted(x, W, none._replace(magnitude=m)).sum())
    assert not slope(jnp.zeros(24)).any()


def test_in_bfloat16_the_lengths_are_still_float32(strict_promotion):
    W, x = normal(3, 24, 128), normal(4, 5, 128).astype(jnp.bfloat16)
    A, Bt = normal(0, 4, 128), normal(1, 4, 24) / 8
    m = jnp.ones(24)
    y = linear.adapted(x, W.astype(jnp.bfloat16), Branch(A, Bt, SCALE, magnitude=m))
    merged = np.asarray(W.astype(jnp.bfloat16), np.float64) + 1.5 * np.asarray(Bt).T @ np.asarray(A)
    wanted = np.asarray(x, np.float64) @ (merged / np.linalg.norm(merged, axis=1)[:, None]).T
    assert y.dtype == jnp.bfloat16
    assert np.abs(np.asarray(y, np.float64) - wanted).max() < 0.03 * np.abs(wanted).max()


def test_the_length_formula(strict_promotion):
    W, A, Bt = normal(3, 24, 128), normal(0, 4, 128), normal(1, 4, 24)
    found = row_norms(row_squares(W), A @ W.T, A, Bt, SCALE)
    wanted = np.linalg.norm(W + SCALE * Bt.T @ A, axis=1)
    np.testing.assert_allclose(found, wanted, rtol=ROW_LENGTH_BY_SUMS_RTOL)
    np.testing.assert_array_equal(stretch(found, found, SCALE), np.ones(24))
