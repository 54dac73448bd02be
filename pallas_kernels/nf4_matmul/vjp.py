"""The gradient of nf4_matmul with respect to x alone: the weight is frozen."""

import functools

import jax
from jaxtyping import Array, Float

from pallas_kernels.backends import Backends, dispatch
from pallas_kernels.nf4_matmul.weight import Weight


# The residual is the weight as it is stored: dy W dequantizes again, and nothing dense is kept.
@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def frozen_matmul(
    x: Float[Array, "M in"],
    w: Weight,
    forward: Backends,
    backward: Backends,
    backend: str | None,
) -> Float[Array, "M out"]:
    """x W^T by the first of `forward` that takes it; its gradient is dy W by one of `backward`."""
    return dispatch(forward, x, w, backend=backend)


def keep(x, w, forward, backward, backend):
    """The product, and the stored weight for the backward pass."""
    return dispatch(forward, x, w, backend=backend), w


def pull_back(forward, backward, backend, w, dy):
    """dy W; the weight has no gradient."""
    return dispatch(backward, dy, w, backend=backend), None


frozen_matmul.defvjp(keep, pull_back)
