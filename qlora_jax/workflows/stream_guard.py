"""Whether layers that come from host memory give the gradients of layers that are on the device.

XLA once annotated slices of host memory in a loop that walks down with the walk of one that goes
up (xla#46231, July 2026): each layer's gradient was that of another layer's weights, and nothing
said so. A run that streams weights asks here first, of this backend and this jax; where the answer
is no, the layers can still be fetched from Python, one program a layer (train/pipeline.py).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from qlora_jax.models import Decoder
from qlora_jax.models.layers import Stack, run_layers
from qlora_jax.models.layerwise import LayerwiseDecoder, layerwise
from qlora_jax.placement import OVERLAP, in_host, to_device, to_host

LAYERS, WIDTH, RANK, ROWS = 5, 64, 4, 8
# Relative to the largest gradient. Rounding, in TF32 too, stays far below, and a wrong layer gives
# other numbers altogether.
TOLERANCE = 0.02


def streams_right(remat: str = "full") -> bool:
    """Whether `stream_fault` finds nothing."""
    return stream_fault(remat) is None


@functools.cache
def stream_fault(remat: str = "full") -> str | None:
    """What is wrong with gradients of streamed weights on this backend; None when nothing is.

    Compiles two programs of a few small layers, a second or two.

    Args:
      remat: one of `remat.POLICIES`.
    """
    rng = np.random.default_rng(0)
    weights = {
        "codes": rng.integers(0, 256, (LAYERS, WIDTH, WIDTH), np.uint8),
        "scale": rng.uniform(0.5, 1.5, LAYERS).astype(np.float32),
    }
    params = {
        "A": rng.normal(size=(LAYERS, RANK, WIDTH)).astype(np.float32),
        "B": rng.normal(size=(LAYERS, WIDTH, RANK)).astype(np.float32),
    }
    x = rng.normal(size=(ROWS, WIDTH)).astype(np.float32)
    resident = gradients(to_device(weights), params, x, "none")
    streamed = gradients(to_host(weights), params, x, remat)
    for name in params:
        for i in range(LAYERS):
            right, found = (np.asarray(grads[name][i]) for grads in (resident, streamed))
            off = np.abs(right - found).max() / np.abs(right).max()
            if not off <= TOLERANCE:  # NaN too
                return (
                    f"layer {i} of {LAYERS}: the gradient of {name} is {off:.1%} off that of the "
                    f"same weights on the device ({jax.default_backend()}, jax {jax.__version__})"
                )
    return None


def gradients(weights: Any, params: Any, x: Float[np.ndarray, "R D"], remat: str) -> Any:
    """Of `params`, through all layers."""
    options = OVERLAP if jax.default_backend() == "gpu" else None  # as the run's own program
    return jax.jit(traced, static_argnums=3, compiler_options=options)(weights, params, x, remat)


def traced(weights: Any, params: Any, x: Float[Array, "R D"], remat: str) -> Any:
    """`gradients`, not compiled."""

    def loss(params):
        y = run_layers(layer, x, Stack(weights, params, {}, None), remat)
        return (y * jnp.cos(jnp.arange(y.size)).reshape(y.shape)).sum()

    return jax.grad(loss)(params)


def layer(x: Float[Array, "R D"], weights: Any, params: Any, others: Any, shared: Any) -> Array:
    """x + tanh(x (W + B A)^T)."""
    return x + jnp.tanh(product(x, weights, params))


@jax.checkpoint
def product(x: Float[Array, "R D"], weights: Any, params: Any) -> Array:
    """Of a W that is decoded from bytes, and for the backward pass again, as 4-bit ones are."""
    decoded = (weights["codes"].astype(jnp.float32) - 127.5) * (weights["scale"] / 127.5)
    return x @ (decoded + params["B"] @ params["A"]).T / WIDTH**0.5


def guarded(
    model: Decoder | LayerwiseDecoder, remat: str
) -> tuple[Decoder | LayerwiseDecoder, tuple[str, ...]]:
    """The model, and notes: one layer at a time if this GPU's program streams weights wrongly.

    A CPU's programs copy nothing, and are not asked.
    """
    copies = isinstance(model, Decoder) and (in_host(model.layers) or remat == "offload")
    if not copies or jax.default_backend() == "cpu" or (fault := stream_fault(remat)) is None:
        return model, ()
    note = f"layers are fetched from Python: {fault}"
    if remat not in ("full", "offload"):
        note += f"; gradient_checkpointing={remat} becomes full"
    return layerwise(model), (note,)
