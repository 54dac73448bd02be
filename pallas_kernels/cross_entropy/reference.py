"""The exact meaning of cross_entropy, with all logits at once: the oracle of the chunked form."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def cross_entropy(
    x: Float[Array, "T D"],
    head: Float[Array, "V D"],
    labels: Int[Array, " T"],
    softcap: float | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """(sum of -log softmax(x head^T)[label], number of right guesses) over labels >= 0."""
    logits = jnp.einsum("td,vd->tv", x, head, preferred_element_type=jnp.float32)
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    counted = labels >= 0
    target = jnp.take_along_axis(logits, jnp.maximum(labels, 0)[:, None], axis=1)[:, 0]
    loss = jax.nn.logsumexp(logits, axis=1) - target
    right = target >= logits.max(axis=1)
    return jnp.where(counted, loss, 0).sum(), (counted & right).sum().astype(jnp.float32)
