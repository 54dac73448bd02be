"""The gradient of nf4_matmul with respect to x alone, and its batching: the weight is frozen."""

import functools

import jax
from jaxtyping import Array, Float

from pallas_kernels.backends import Backends, dispatch
from pallas_kernels.nf4_matmul.weight import LowRank, Weight


# The residual is the weight as it is stored: dy W dequantizes again, and nothing dense is kept.
@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def frozen_matmul(
    x: Float[Array, "M in"],
    w: Weight,
    forward: Backends,
    backward: Backends,
    backend: str | None,
) -> Float[Array, "M out"]:
    """x W^T by the first of `forward` that takes it; its gradient is dy W by one of `backward`.

    With the two exchanged it is dy W, whose gradient is the product again: so that gradients of
    gradients take the same backends.
    """
    return by_rows(forward, backend)(x, w)


def keep(x, w, forward, backward, backend):
    """The product, by a call that outer gradients see too, and the stored weight."""
    return frozen_matmul(x, w, forward, backward, backend), w


def pull_back(forward, backward, backend, w, dy):
    """dy W; the weight has no gradient."""
    return frozen_matmul(dy, w, backward, forward, backend), None


frozen_matmul.defvjp(keep, pull_back)


def by_rows(backends: Backends, backend: str | None):
    """`dispatch` as a function of (x, w), or (x, w, low), that under vmap takes x's batch as rows.

    W is then read and decoded once for all of the batch, by the backend for that many rows. Left
    alone, a kernel would be launched with the batch as one more grid axis, W read for each.
    """
    run = functools.partial(dispatch, backends, backend=backend)
    product = jax.custom_batching.custom_vmap(run)

    @product.def_vmap
    def batched(size, is_batched, x, w, *low):
        shared = is_batched[1], *(term.b for term in is_batched[2:])
        if any(jax.tree.leaves(shared)):  # a product for each: nothing to share
            axes = jax.tree.map(lambda batched: 0 if batched else None, tuple(is_batched))
            return jax.vmap(run, axes)(x, w, *low), True
        low = [LowRank(term.h.reshape(-1, term.h.shape[-1]), term.b) for term in low]
        y = product(x.reshape(-1, x.shape[-1]), w, *low)
        return y.reshape(size, -1, y.shape[-1]), True

    return product
