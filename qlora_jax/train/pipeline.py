"""The gradients of step.py for layers that come one by one: Python drives one jitted layer.

    forward     enter | layer 0   | layer 1   | layer 2        x of each layer is kept
                fetch 0   fetch 1     fetch 2
    top                                        | loss          and its gradient
    backward    leave | layer 0   | layer 1   | layer 2
                        fetch 0     fetch 1

The programs: `enter`, `layer_forward`, `top`, `layer_backward`, `leave`; `enter`, `layer_forward`
and `score` for a loss alone. Each is compiled once for a shape of batch, whatever the number of
layers. Two layers' weights are on the device at a time, and that of the one in use once more as its
program takes it out of its buffers.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels.cross_entropy import CrossEntropy
from qlora_jax.adapters.adapter import Adapter
from qlora_jax.adapters.spec import LoraSpec
from qlora_jax.models.decoder import Decoder, default_positions
from qlora_jax.models.layer_stream import LayerStream
from qlora_jax.models.layers import Stack, own, put
from qlora_jax.models.layerwise import LayerwiseDecoder
from qlora_jax.models.one_layer import OneLayer
from qlora_jax.models.packing import Buffers, Packing
from qlora_jax.placement import to_device, to_host
from qlora_jax.train.loss import Batch, sums_of
from qlora_jax.train.step import Params, Sums

Hidden = Float[Array, "B S D"]


def gradients(
    params: Params,
    model: LayerwiseDecoder,
    batch: Batch,
    *,
    spec: LoraSpec,
    dropout_key: Array | None = None,
    loss_scale: Array | float = 1.0,
    remat: str = "full",
) -> Sums:
    """As `step.gradients`.

    Args:
      remat: `offload` keeps each layer's input in pinned host memory, every other policy on the
        device; no more of a layer is ever kept.

    Raises:
      InputError: what reading a layer raises: its file has changed, say.
    """
    layer, packing = one_layer(model, batch, spec), model.layers.packing
    depth = model.config.num_hidden_layers
    x, stack = enter(params, model.ends, batch, dropout_key, spec=spec)
    x, i, kept = *begun(x), []
    down_and_up = [*range(depth), *reversed(range(depth - 1))]
    with LayerStream(model.layers, down_and_up) as weights:
        for _ in range(depth):
            buffers = weights.behind(i)
            kept.append(to_host(x) if remat == "offload" else x)
            x, i = layer_forward(x, buffers, stack, i, layer=layer, packing=packing)
        inner, head = parted(params)
        sums, count, gradient, of_head, grads, i = top(
            x, head, model.ends, batch, loss_scale, stack.params, i, spec=spec
        )
        for number in range(depth):
            buffers = weights.behind(i) if number else buffers
            x = to_device(kept.pop())
            gradient, grads, i = layer_backward(
                gradient, grads, x, buffers, stack, i, layer=layer, packing=packing
            )
        grads = leave(inner, model.ends, batch, gradient, grads, spec=spec)
        jax.block_until_ready(i)
    return Sums(grads | of_head, sums.loss, sums.right, count)


def loss_fn(
    params: Params, model: LayerwiseDecoder, batch: Batch, *, spec: LoraSpec | None = None
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """As `loss.loss_fn`, the value alone."""
    layer, packing = one_layer(model, batch, spec), model.layers.packing
    x, stack = enter(params, model.ends, batch, None, spec=spec)
    x, i = begun(x)
    with LayerStream(model.layers, range(model.config.num_hidden_layers)) as weights:
        for _ in range(model.config.num_hidden_layers):
            buffers = weights.behind(i)
            x, i = layer_forward(x, buffers, stack, i, layer=layer, packing=packing)
        jax.block_until_ready(i)
    return score(x, params, model.ends, batch, spec=spec)


def programs() -> int:
    """How many programs of a step were compiled so far."""
    each = (enter, layer_forward, top, layer_backward, leave)
    return sum(program._cache_size() for program in each)


def begun(x: Hidden) -> tuple[Hidden, Int[Array, ""]]:
    """x and the first layer's number, both committed as all that comes behind a layer is."""
    return to_device((x, np.int32(0)))


def parted(params: Params) -> tuple[Params, Params]:
    """What is trained below the head, and a head that is trained itself."""
    head = {name: own for name, own in params.items() if name == "lm_head"}
    return {name: own for name, own in params.items() if name not in head}, head


def one_layer(model: LayerwiseDecoder, batch: Batch, spec: LoraSpec | None) -> OneLayer:
    """The layer as a function; the same for every batch of a shape."""
    room = batch["input_ids"].shape[1]
    return OneLayer(model.config.scores(room), 0.0 if spec is None else spec.lora_dropout)


@functools.partial(jax.jit, static_argnames="spec")
def enter(
    params: Params, ends: Decoder, batch: Batch, key: Array | None, *, spec: LoraSpec | None
) -> tuple[Hidden, Stack]:
    """What enters the first layer, and what all layers take beside their weights."""
    return entered(params, ends, batch, key, spec)


def entered(params, ends, batch, key, spec):
    """`enter`, inside a program."""
    ids, segments = jnp.asarray(batch["input_ids"]), batch.get("segment_ids")
    if (positions := batch.get("positions")) is None:
        positions = default_positions(ids, None if segments is None else segments > 0, None)
    adapter = None if spec is None else Adapter(params, spec)
    _, stack = ends.stacked(positions, segments, adapter, None, key)
    return ends.embedded(ids, adapter), stack


@functools.partial(jax.jit, static_argnames=("layer", "packing"))
def layer_forward(
    x: Hidden,
    buffers: Buffers,
    stack: Stack,
    i: Int[Array, ""],
    *,
    layer: OneLayer,
    packing: Packing,
) -> tuple[Hidden, Int[Array, ""]]:
    """x behind layer i, and i + 1."""
    return through(layer, x, packing.block(buffers), stack, *own(stack, i)), i + 1


def through(layer, x, block, stack, params, others):
    """x behind one layer, without a cache."""
    return layer((x, None), block, params, others, stack.shared)[0]


@functools.partial(jax.jit, static_argnames="spec")
def top(
    x: Hidden,
    head: Params,
    ends: Decoder,
    batch: Batch,
    loss_scale: Array | float,
    params: Params,
    i: Int[Array, ""],
    *,
    spec: LoraSpec,
) -> tuple[CrossEntropy, Int[Array, ""], Hidden, Params, Params, Int[Array, ""]]:
    """(sums, count, gradients of x and of a trained head, zeros for those of layers, i - 1)."""

    def scaled(x, head):
        sums, count = sums_of(ends.norm(x), ends, batch["labels"], Adapter(head, spec))
        return sums.loss * loss_scale, (sums, count)

    (_, (sums, count)), (dx, of_head) = jax.value_and_grad(scaled, (0, 1), has_aux=True)(x, head)
    return sums, count, dx, of_head, jax.tree.map(jnp.zeros_like, params), i - 1


@functools.partial(jax.jit, static_argnames="spec")
def score(
    x: Hidden, params: Params, ends: Decoder, batch: Batch, *, spec: LoraSpec | None
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """The sum of the loss, and the count of its targets."""
    adapter = None if spec is None else Adapter(params, spec)
    sums, count = sums_of(ends.norm(x), ends, batch["labels"], adapter)
    return sums.loss, count


@functools.partial(
    jax.jit, static_argnames=("layer", "packing"), donate_argnames=("gradient", "grads")
)
def layer_backward(
    gradient: Hidden,
    grads: Params,
    x: Hidden,
    buffers: Buffers,
    stack: Stack,
    i: Int[Array, ""],
    *,
    layer: OneLayer,
    packing: Packing,
) -> tuple[Hidden, Params, Int[Array, ""]]:
    """The gradient of layer i's input x, `grads` with those of the layer in place, and i - 1."""
    params, others = own(stack, i)
    block = packing.block(buffers)
    pullback = jax.vjp(lambda x, p: through(layer, x, block, stack, p, others), x, params)[1]
    gradient, mine = pullback(gradient)
    return gradient, put(grads, mine, i), i - 1


@functools.partial(jax.jit, static_argnames="spec")
def leave(
    inner: Params, ends: Decoder, batch: Batch, gradient: Hidden, grads: Params, *, spec: LoraSpec
) -> Params:
    """The gradients of what is trained below the head, from those of what the layers took."""

    def taken(inner):
        x, stack = entered(inner, ends, batch, None, spec)
        return x, stack.params

    return jax.vjp(taken, inner)[1]((gradient, grads))[0]
