"""AdamW, rounded as bitsandbytes' is, and the same in whatever program it is compiled.

A product and a sum may be contracted into one operation with one rounding, and whether they are
depends on the program around: the last bit of a parameter would depend on where its state lives.
Here every product that is added to something is rounded first, so that nothing can be contracted.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int32

from pallas_kernels.rounding import rounded
from qlora_jax.optim.pages import layer_count

FASTER = ("B", "m")  # of an adapter's arrays, with LoRA+


class Moments(NamedTuple):
    """How moments are kept between steps; `signed` is true of m and false of v.

    Attributes:
      zeros: (the leaf, layers of the tree, signed) -> what is kept before the first step.
      pack: (float32 as the leaf, layers of the tree, signed) -> what is kept.
      unpack: (what is kept, the leaf, signed) -> float32 as the leaf.
    """

    zeros: Callable[[Array, int, bool], Any]
    pack: Callable[[Array, int, bool], Any]
    unpack: Callable[[Any, Array, bool], Array]


IN_32_BITS = Moments(
    zeros=lambda leaf, layers, signed: jnp.zeros_like(leaf),
    pack=lambda moment, layers, signed: moment,
    unpack=lambda kept, leaf, signed: kept,
)


class AdamWState(NamedTuple):
    """What AdamW keeps between steps.

    Attributes:
      count: steps so far.
      m, v: running means of the gradient and of its square, trees as the parameters'.
    """

    count: Int32[Array, ""]
    m: Any
    v: Any


def shared(make: Callable) -> Callable:
    """`make`, called once for equal arguments; again each time for what has no hash, an array."""
    cached = functools.cache(make)

    @functools.wraps(make)
    def made(*args: Any, **options: Any) -> Any:
        try:
            hash((args, *options.values()))
        except TypeError:
            return make(*args, **options)
        return cached(*args, **options)

    return made


@shared  # programs are compiled for a transform: optimizers of equal settings share them
def adamw(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    loraplus_lr_ratio: float | None = None,
    moments: Moments = IN_32_BITS,
) -> optax.GradientTransformation:
    """AdamW with decoupled weight decay.

        m = b1 m + (1 - b1) g        v = b2 v + (1 - b2) g^2
        p = (1 - lr weight_decay) p - lr / (1 - b1^t) m / (sqrt(v) / sqrt(1 - b2^t) + eps)

    Args:
      learning_rate: a number, or a schedule of the steps done before, which begins with 0.
      loraplus_lr_ratio: LoRA+'s: B, and DoRA's m, have this times the learning rate.
      moments: how they are kept; a step uses them before they are packed.

    Source: Loshchilov and Hutter 2019, arXiv 1711.05101. After 20 steps parameters of size 4 are at
    most 2.4e-7, one unit in their last place, from torch's and bitsandbytes' AdamW; those of
    optax.adamw, which rounds in another order, 2.1e-6.
    """

    def init(params: Any) -> AdamWState:
        layers = layer_count(params)

        def zeros(signed):
            return jax.tree.map(lambda p: moments.zeros(p, layers, signed), params)

        return AdamWState(jnp.zeros((), jnp.int32), zeros(True), zeros(False))

    def update(grads: Any, state: AdamWState, params: Any) -> tuple[Any, AdamWState]:
        count = optax.safe_increment(state.count)
        rate = jnp.asarray(
            learning_rate(state.count) if callable(learning_rate) else learning_rate, jnp.float32
        )
        t = count.astype(jnp.float32)
        bias = 1 - jnp.float32(b1) ** t
        shrink = 1 / jnp.sqrt(1 - jnp.float32(b2) ** t)
        slow = fast = rate / bias, 1 - rounded(rate * weight_decay)
        if loraplus_lr_ratio is not None:
            rate = rounded(rate * loraplus_lr_ratio)
            fast = rate / bias, 1 - rounded(rate * weight_decay)
        rates = [fast if quick else slow for quick in are_faster(params)]
        layers = layer_count(params)
        leaves, structure = jax.tree.flatten(params)
        rows = zip(
            *(leaves, rates, structure.flatten_up_to(grads)),
            *(structure.flatten_up_to(state.m), structure.flatten_up_to(state.v)),
            strict=True,
        )
        found = []
        for p, (step, decay), g, kept_m, kept_v in rows:
            m = rounded(b1 * moments.unpack(kept_m, p, True)) + rounded((1 - b1) * g)
            v = rounded(b2 * moments.unpack(kept_v, p, False)) + rounded((1 - b2) * g * g)
            new = rounded(decay * p) - rounded(step * (m / (rounded(shrink * jnp.sqrt(v)) + eps)))
            # Unless p and new are far apart, their difference is exact, and p + (new - p) is new.
            kept = moments.pack(m, layers, True), moments.pack(v, layers, False)
            found.append((new - p, *kept))
        updates, m, v = (structure.unflatten(column) for column in zip(*found, strict=True))
        return updates, AdamWState(count, m, v)

    return optax.GradientTransformation(init, update)


def are_faster(params: Any) -> list[bool]:
    """Which leaves have LoRA+'s learning rate: B, and DoRA's m; not A, nor modules held in full.

    Source: Hayou and others 2024, arXiv 2402.12354; the groups of
    `peft.optimizers.create_loraplus_optimizer`, where what has one axis goes with B.
    """
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    return [bool(path) and getattr(path[-1], "key", None) in FASTER for path in paths]
