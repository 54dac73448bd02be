"""LoRA's forward and backward, scale * (x A^T) B^T, as products that every backend has."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float


def plain_lora_delta(x: Array, A: Array, Bt: Array, scale: Array) -> Array:
    """The formula itself: what `lora_delta` computes, and its autodiff twin in the tests."""
    h = nt(x.reshape(-1, x.shape[-1]), A.astype(x.dtype))
    return nn(h, (Bt * scale).astype(x.dtype)).reshape(*x.shape[:-1], Bt.shape[1])


# Kept are x and the float32 matrices, which the caller holds anyway; h is computed again. B comes
# transposed because XLA on a CPU has no native bfloat16 product over the first axis of its left
# operand, and folds any transpose next to a product into one: with A, B^T, h^T = A x^T and
# dh^T = s B^T dy^T, thin products of their own, all six are native.
@jax.custom_vjp
def lora_delta(
    x: Float[Array, "*rows in"],
    A: Float[Array, "r in"],
    Bt: Float[Array, "r out"],
    scale: Float[Array, ""],
) -> Float[Array, "*rows out"]:
    """scale * (x A^T) B^T in x's dtype; the gradients of A and B^T are float32, scale has none.

    Source: Hu and others 2021, arXiv 2106.09685, section 4.1; products run in x's dtype as under
    PyTorch's autocast, which PEFT's training scripts use.
    """
    return plain_lora_delta(x, A, Bt, scale)


def forward(x, A, Bt, scale):
    """The result, and what the backward pass needs."""
    return plain_lora_delta(x, A, Bt, scale), (x, A, Bt, scale)


def backward(residuals, dy):
    """Gradients for the inputs that are not frozen."""
    x, A, Bt, scale = residuals
    x_rows, dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    dh, dA, dBt = adapter_gradients(x_rows, A, Bt, scale, dy)
    return nn(dh, A.astype(x.dtype)).reshape(x.shape), dA, dBt, None


lora_delta.defvjp(forward, backward)


def adapter_gradients(
    x: Float[Array, "M in"],
    A: Float[Array, "r in"],
    Bt: Float[Array, "r out"],
    scale: Float[Array, ""],
    dy: Float[Array, "M out"],
) -> tuple[Float[Array, "M r"], Float[Array, "r in"], Float[Array, "r out"]]:
    """(dh, dA, dB^T): of h = x A^T in x's dtype, s dy B; of the matrices in their own."""
    scaled_Bt = (Bt * scale).astype(x.dtype)
    dA = nn(nt(scaled_Bt, dy), x, jnp.float32)
    dBt = nn(nt(A.astype(x.dtype), x), dy, jnp.float32) * scale
    return nt(dy, scaled_Bt), dA.astype(A.dtype), dBt.astype(Bt.dtype)


def nt(a: Array, b: Array) -> Array:
    """a b^T."""
    return jax.lax.dot_general(a, b, (((1,), (1,)), ((), ())))


def nn(a: Array, b: Array, dtype: DTypeLike | None = None) -> Array:
    """a b."""
    return jax.lax.dot_general(a, b, (((1,), (0,)), ((), ())), preferred_element_type=dtype)
