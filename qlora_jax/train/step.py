"""The gradient half of a training step: micro batches summed, divided once, clipped, checked.

The other half, the optimizer's update, is one program a page of its own (optim/).

    sums = None
    for batch in micro_batches:
        sums = accumulate(sums, gradients(params, model, batch, spec=spec))
    grads, metrics = finish(sums, max_grad_norm=0.3)
    if metrics.finite: params, state = optimizer.apply(params, grads, state)
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from qlora_jax.adapters.adapter import Adapter
from qlora_jax.adapters.spec import LoraSpec
from qlora_jax.models.decoder import Decoder
from qlora_jax.placement import OVERLAP
from qlora_jax.train.loss import Batch, token_sums

Params = Any


class Sums(NamedTuple):
    """Sums over the counted targets of the micro batches so far; nothing is divided yet."""

    grads: Params
    loss: Float[Array, ""]
    right: Float[Array, ""]
    count: Int[Array, ""]


class StepMetrics(NamedTuple):
    """One step's figures, on the device until they are asked for.

    Attributes:
      loss: mean over all counted targets of the step, in nats.
      accuracy: share of them that the model ranks first.
      count: counted targets.
      grad_norm: global L2 norm of the mean gradient, before clipping.
      finite: whether loss and gradient are; a step that is not must not be applied.
    """

    loss: Float[Array, ""]
    accuracy: Float[Array, ""]
    count: Int[Array, ""]
    grad_norm: Float[Array, ""]
    finite: Bool[Array, ""]


def micro_gradients(
    params: Params,
    model: Decoder,
    batch: Batch,
    *,
    spec: LoraSpec,
    frozen: Adapter | None = None,
    dropout_key: Array | None = None,
    loss_scale: Array | float = 1.0,
    remat: str = "none",
) -> Sums:
    """Loss and gradient sums of one micro batch, with respect to the adapter alone; not compiled.

    Args:
      frozen: as of `loss_fn`.
      loss_scale: multiplies the loss before the backward pass, for float16; `finish` takes it out.
    """
    more = {"spec": spec, "frozen": frozen, "dropout_key": dropout_key, "remat": remat}

    def scaled(params):
        sums, count = token_sums(params, model, batch, **more)
        return sums.loss * loss_scale, (sums, count)

    (_, (sums, count)), grads = jax.value_and_grad(scaled, has_aux=True)(params)
    return Sums(grads, sums.loss, sums.right, count)


STATIC = ("spec", "remat")
gradients = jax.jit(micro_gradients, static_argnames=STATIC)
# The same for weights, or layer inputs, in host memory.
streamed_gradients = jax.jit(micro_gradients, static_argnames=STATIC, compiler_options=OVERLAP)


def programs() -> int:
    """How many programs of gradients were compiled so far."""
    return gradients._cache_size() + streamed_gradients._cache_size()


def accumulate(total: Sums | None, new: Sums) -> Sums:
    """`total + new`; `new` itself where there is no total yet."""
    return new if total is None else add(total, new)


@functools.partial(jax.jit, donate_argnums=0)
def add(total: Sums, new: Sums) -> Sums:
    """`total + new`, in the memory of `total`."""
    return jax.tree.map(jnp.add, total, new)


@functools.partial(jax.jit, static_argnames=("max_grad_norm",), donate_argnums=0)
def finish(
    sums: Sums, *, max_grad_norm: float | None, loss_scale: Array | float = 1.0
) -> tuple[Params, StepMetrics]:
    """The step's mean gradient, clipped to a global norm, and its figures.

    mean = sum over all micro batches / count of ALL their counted targets: 1 batch of 8 and 8
    batches of 1 give the same step. `optax.MultiSteps` averages micro batches equally, which
    weighs the targets of short ones more.

    Args:
      max_grad_norm: gradients with a larger norm are scaled to it; None leaves them.
    """
    count = jnp.maximum(sums.count, 1).astype(jnp.float32)
    divisor = count * loss_scale
    grads = jax.tree.map(lambda g: g / divisor, sums.grads)
    norm = optax.tree.norm(grads)
    loss = sums.loss / count
    finite = jnp.isfinite(norm) & jnp.isfinite(loss)
    if max_grad_norm is not None:
        factor = jnp.minimum(1.0, max_grad_norm / (norm + 1e-6))  # torch's clip_grad_norm_
        grads = jax.tree.map(lambda g: g * factor, grads)
    return grads, StepMetrics(loss, sums.right / count, sums.count, norm, finite)
