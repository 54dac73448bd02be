"""The stacked layers one after another: one program whatever the depth, and what it keeps.

    resident   a scan over weights on the device
    streamed   weights in host memory: while layer i computes, layer i + 1 comes over

               forward    fetch 0 | layer 0, fetch 1 | layer 1, fetch 2 | layer 2
               backward   fetch 2 | layer 2, fetch 1 | layer 1, fetch 0 | layer 0

Two layers' weights are on the device at a time, forward and again backward. What the backward pass
needs beside them (remat.py says how much) is kept, and never the weights.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from qlora_jax.models.remat import again
from qlora_jax.placement import fetched, in_host, kept_in_host


class Stack(NamedTuple):
    """What layers take beside what they hand on; every leaf of the first three has an axis L.

    Attributes:
      weights: frozen; they may live in host memory.
      params: what is trained.
      others: of each layer, without a gradient.
      shared: of all layers, without a gradient.
    """

    weights: Any
    params: Any
    others: Any
    shared: Any


Layer = Callable[..., Any]  # (carry, weights, params, others, shared) -> carry


def run_layers(layer: Layer, carry: Any, stack: Stack, remat: str = "none") -> Any:
    """`carry` behind the last layer; differentiable in `carry` and `stack.params`.

    Args:
      layer: (carry, weights, params, others, shared) -> carry, pure; it closes over no arrays.
      remat: one of `remat.POLICIES`.
    """
    if in_host(stack.weights) or remat == "offload":
        return fetching(again(layer, remat), remat, carry, *stack)

    def step(carry, one):
        return layer(carry, *one, stack.shared), None

    return jax.lax.scan(again(step, remat), carry, stack[:3])[0]


# Where two layers meet: XLA unrolls a loop of one, fuses its layer with the one behind the loop,
# and the last bits are others than a scan's.
apart = jax.lax.optimization_barrier


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def fetching(layer, remat, carry, weights, params, others, shared):
    """The layers, each fetched while the one before computes."""
    stack = Stack(weights, params, others, shared)

    def one(carry, weights, i):
        return layer(carry, weights, *own(stack, i), shared), None

    return forward_loop(one, remat, carry, stack)[0]


def forward(layer, remat, carry, weights, params, others, shared):
    """The result; every layer's residuals without weights, stacked, and how they become a vjp."""
    stack = Stack(weights, params, others, shared)
    form = []

    def one(carry, weights, i):
        args = carry, weights, *own(stack, i), shared
        carry, pullback = vjp(layer, args)
        leaves, tree = jax.tree.flatten(pullback)
        form[:] = [Pullback(leaves, tree)]
        return apart(carry), form[0].kept(leaves)

    carry, kept, last = forward_loop(one, remat, carry, stack)
    return carry, (form[0], kept, last, stack)


@jax.tree_util.register_static
class Pullback:
    """A layer's vjp function without what it keeps: a static part of the residuals.

    Constants of the program, such as a causal mask, are the same for all layers and stay here.
    """

    def __init__(self, leaves: list, tree: Any):
        self.constants = [None if isinstance(leaf, jax.core.Tracer) else leaf for leaf in leaves]
        self.tree = tree

    def kept(self, leaves: list) -> list:
        """Those of the vjp function's leaves that differ between layers."""
        pairs = zip(leaves, self.constants, strict=True)
        return [leaf for leaf, constant in pairs if constant is None]

    def of(self, kept: list, weights: Any, params: Any, others: Any, shared: Any) -> Callable:
        """The function, from what was kept and what was not."""
        kept = iter(kept)
        leaves = [next(kept) if constant is None else constant for constant in self.constants]
        pullback = jax.tree.unflatten(self.tree, leaves)
        pullback.args_res = [pullback.args_res[0], weights, params, others, shared]
        return pullback


def vjp(layer: Layer, args: tuple) -> tuple[Any, Any]:
    """jax.vjp that keeps no argument but the first, and asks for the gradients of two."""
    yes, no = True, False
    return jax.vjp(layer, *args, saveable_args=(yes, no, no, no, no), in_nzs=(yes, no, yes, no, no))


def backward(layer, remat, residuals, gradient):
    """Gradients of what entered the first layer, and of the trained leaves, written in place."""
    pullback, kept, here, stack = residuals
    over = stack.weights, kept if remat == "offload" else None

    def one(gradient, grads, here, i):
        weights, leaves = here
        leaves = at(kept, i) if leaves is None else leaves
        back = pullback.of(leaves, weights, *own(stack, i), stack.shared)
        gradient, _, mine, _, _ = back(apart(gradient))
        gradient, mine = apart((gradient, mine))
        return gradient, put(grads, mine, i)

    def body(state, _):
        j, gradient, grads, here = state
        ahead = fetched(at(over, j))
        gradient, grads = one(gradient, grads, here, j + 1)
        return (j - 1, gradient, grads, ahead), None

    grads = jax.tree.map(jnp.zeros_like, stack.params)
    turns = depth(stack) - 1
    state = jnp.int32(turns - 1), gradient, grads, here
    (_, gradient, grads, here), _ = jax.lax.scan(body, state, length=turns)
    gradient, grads = one(gradient, grads, here, 0)
    return gradient, None, grads, None, None


fetching.defvjp(forward, backward)


def forward_loop(one: Callable, remat: str, carry: Any, stack: Stack) -> tuple[Any, Any, Any]:
    """The last carry, and for the backward pass what is kept, and what it begins with.

    What `one(carry, weights, i)` kept of each layer is stacked. The last layer's weights stay on
    the device until the backward pass, as what it kept does with `offload`: outside a loop XLA
    reads and writes host memory with a kernel, and it would come back at once.

    A while loop that counts from 1: the index of the copy must be the loop's own counter. A scan
    that counts from 0 and fetches i + 1 shares that sum with the counter's increment, which waits
    for the layer, and then XLA overlaps nothing. The last layer stands behind the loop, so that no
    index is out of range, where copies are not clamped as slices are.
    """
    count = depth(stack)
    first = fetched_first(stack.weights)
    shapes = jax.eval_shape(one, carry, first, jnp.int32(0))[1]
    kept = jax.tree.map(lambda leaf: jnp.zeros((count, *leaf.shape), leaf.dtype), shapes)
    hosted = kept_in_host if remat == "offload" else lambda tree: tree

    def body(state):
        j, carry, weights, kept = state
        ahead = fetched(at(stack.weights, j))
        carry, mine = one(carry, weights, j - 1)
        return j + 1, carry, ahead, put(kept, hosted(mine), j - 1)

    state = jnp.int32(1), carry, first, hosted(kept)
    _, carry, weights, kept = jax.lax.while_loop(lambda state: state[0] < count, body, state)
    carry, mine = one(carry, weights, count - 1)
    if remat == "offload":
        return carry, kept, (weights, mine)
    return carry, put(kept, mine, count - 1), (weights, None)


def fetched_first(tree: Any) -> Any:
    """Entry 0 of every leaf, on the device.

    In two halves: XLA copies a slice only inside a loop, and unrolls a loop of one turn. A number
    a layer has no halves; all of them are copied.
    """

    def is_halved(leaf):
        return in_host(leaf) and leaf.ndim > 1 and leaf.shape[1] % 2 == 0

    def halves(leaf):
        return leaf.reshape(2 * len(leaf), leaf.shape[1] // 2, *leaf.shape[2:])

    leaves, form = jax.tree.flatten(tree)
    long = [halves(leaf) for leaf in leaves if is_halved(leaf)]
    _, both = jax.lax.scan(lambda j, _: (j + 1, fetched(at(long, j))), jnp.int32(0), length=2)
    both = iter(both)
    return form.unflatten(
        next(both).reshape(leaf.shape[1:]) if is_halved(leaf) else at(fetched(leaf), 0)
        for leaf in leaves
    )


def depth(stack: Stack) -> int:
    """L."""
    return len(jax.tree.leaves(stack.weights)[0])


def own(stack: Stack, i: Any) -> tuple[Any, Any]:
    """Layer i of what is trained and of the others."""
    return at(stack.params, i), at(stack.others, i)


def at(tree: Any, i: Any) -> Any:
    """Entry i of every leaf. No index is wrapped: a copy wants one that is affine in a counter."""
    return jax.tree.map(
        lambda leaf: jax.lax.dynamic_index_in_dim(leaf, i, 0, False, allow_negative_indices=False),
        tree,
    )


def put(tree: Any, new: Any, i: Any) -> Any:
    """`tree` with entry i of every leaf replaced, in its memory."""
    return jax.tree.map(
        lambda leaf, own: jax.lax.dynamic_update_index_in_dim(
            leaf, own, i, 0, allow_negative_indices=False
        ),
        tree,
        new,
    )
