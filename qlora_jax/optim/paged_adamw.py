"""AdamW with its state in host memory, moved in pages of one layer.

An adapter's A and B have a leading axis L, so one layer of all of them is a page:

    host    [m v 0] [m v 1] [m v 2] [m v 3]      while page 1 is updated,
    device          compute 1, fetch 2, store 0  page 2 comes in and page 0 goes out

Device memory holds about three pages of state and not L. A step moves every page both ways: 3.3 GB
for a 70B model at r = 16, 0.13 s at 25 GB/s each way (computed, not measured). The same class keeps
the state resident, in one program over whole arrays; the numbers are equal bit for bit.

A longer leaf, such as a trained lm_head, gives each of the L pages an equal share of its rows; what
the last pages have too many is zeros, which are never written back.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from qlora_jax.errors import InputError
from qlora_jax.placement import HOST, has_host_memory, to_device, to_host

Params = PyTree[jax.Array]
MEMORIES = ("host", "device")


class Paged:
    """Any optax transform, its state resident or, if the transform is elementwise, paged to host.

        optimizer = Paged(optax.adamw(2e-4), memory="host", elementwise=True)
        state = optimizer.init(params)
        params, state = optimizer.apply(params, grads, state)

    `apply` takes `params` and a resident `state` over and writes the new ones in their memory: go
    on with what it returns, and keep a copy of what is wanted later. `grads` and pages on the host
    are left as they are. Pass `params` in device memory by `placement.to_device`: uncommitted
    arrays would come back committed, and programs that take them be compiled twice.

    Args:
      tx: the transform. Clipping to a global norm must come before, over the whole tree.
      memory: where the state lives between steps, `"host"` or `"device"`.
      resident: with `memory="host"`, how many of the first pages stay on the device all the same.
      elementwise: says that `tx` updates each number without looking at another one, as AdamW and
        Lion do: only then is one page at a time the same as all at once.

    Attributes:
      bytes_moved: bytes that the last `apply` moved between host and device, both ways together.

    Raises:
      InputError: host memory for a transform that is not declared elementwise, or on a backend that
        has none.
    """

    def __init__(
        self,
        tx: optax.GradientTransformation,
        *,
        memory: str = "device",
        resident: int = 0,
        elementwise: bool = False,
    ):
        if memory not in MEMORIES:
            raise InputError("OPT-MEMORY", "memory", f"unknown {memory!r}", "host or device")
        if memory == "host" and not elementwise:
            raise InputError(
                "OPT-ELEMENTWISE",
                "optim_memory",
                "host memory for an optimizer that is not declared elementwise",
                "a transform that updates each number by itself, for it is applied page by page",
                "elementwise=True if that holds, else optim_memory=device",
            )
        if memory == "host" and not has_host_memory():
            hint = "optim_memory=device"
            raise InputError("OPT-MEMORY", "optim_memory", f"no {HOST} memory here", hint=hint)
        self.tx, self.memory, self.resident, self.bytes_moved = tx, memory, resident, 0

        # The update is a program of its own. With the slicing in the same one, XLA contracts other
        # multiplies and adds, and about 7% of the parameters differ in the last bit (CPU, seen).
        def update(params, grads, state):
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        self.update = jax.jit(update, donate_argnums=(0, 2))
        # Never a host array: XLA matches donated buffers by shape and not by memory kind, and the
        # process aborts. On a CPU a page may even share its memory with the host's copy.
        self.update_page = jax.jit(update)
        # With its arguments kept, a program leaves results committed where they are, and an update,
        # which gets such a state back from itself, is compiled once.
        self.init_all = jax.jit(tx.init, keep_unused=True)
        self.page = jax.jit(page, static_argnames="count")
        self.init_page = jax.jit(
            lambda params, i, count: tx.init(page(params, i, count)),
            static_argnames="count",
            keep_unused=True,
        )
        self.write = jax.jit(write, donate_argnums=0)

    def init(self, params: Params) -> Any:
        """The state before the first step: `tx`'s own, or a tuple of them, one a page."""
        if self.memory == "device":
            return self.init_all(params)
        count = page_count(params)
        return tuple(self.home(i, self.init_page(params, i, count)) for i in range(count))

    def apply(self, params: Params, grads: Params, state: Any) -> tuple[Params, Any]:
        """One step: new parameters, and the new state where the old one was.

        Equal bit for bit to jitted `tx.update` and `optax.apply_updates` on the whole trees.
        """
        if self.memory == "device":
            return self.update(params, grads, state)
        pages, count = [], len(state)
        ahead = self.fetched(state, 0)
        for i in range(count):
            here, ahead = ahead, self.fetched(state, i + 1)
            own = self.page(params, i, count), self.page(grads, i, count)
            layer, here = self.update_page(*own, here)
            params = self.write(params, layer, i)
            pages.append(self.home(i, here))
            if i >= 2:  # or the queue runs ahead, and every page is on the device at once
                jax.block_until_ready(pages[i - 2])
        paged = state[self.resident :]
        self.bytes_moved = 2 * sum(leaf.nbytes for leaf in jax.tree.leaves(paged))
        return params, tuple(pages)

    def fetched(self, state: tuple, i: int) -> Any:
        """Page i on its way to the device; None behind the last."""
        return to_device(state[i]) if i < len(state) else None

    def home(self, i: int, state: Any) -> Any:
        """The state of page i on its way to where it lives between steps."""
        return to_device(state) if i < self.resident else to_host(state)


def paged_adamw(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    memory: str = "device",
    resident: int = 0,
) -> Paged:
    """AdamW with decoupled weight decay, float32 state, paged to host memory or resident.

        m = b1 m + (1 - b1) g        v = b2 v + (1 - b2) g^2
        p = p - lr (m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) + weight_decay p)

    Source: Loshchilov and Hutter 2019, arXiv 1711.05101; `optax.adamw`. PyTorch's AdamW and
    bitsandbytes' 32-bit ones compute the same in another order of roundings (bitsandbytes adds eps
    times sqrt(1 - b2^t) to sqrt(v), and divides both by it), and agree to a few 1e-7.
    """
    tx = optax.adamw(learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)
    return Paged(tx, memory=memory, resident=resident, elementwise=True)


def state_bytes(tx: optax.GradientTransformation, params: Params) -> int:
    """Bytes of `tx`'s state for parameters of these shapes; nothing is allocated."""
    leaves = jax.tree.leaves(jax.eval_shape(tx.init, params))
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)


def page_count(params: Params) -> int:
    """The shortest leading axis: L where a leaf has one entry a layer.

    Raises:
      InputError: a leaf has no axis, so that there are no pages.
    """
    leading = [leaf.shape[:1] for leaf in jax.tree.leaves(params)]
    if not leading or () in leading:
        found = "parameters without an axis to cut them along"
        raise InputError("OPT-PAGES", "params", found, "leading axes", "optim_memory=device")
    return min(leading)[0]


def page(tree: Any, i: jax.Array, count: int) -> Any:
    """Page i of `count`: of each leaf one entry, or its share of rows; zeros behind its end."""

    def cut(leaf):
        share = -(-len(leaf) // count)
        if share == 1:
            return jax.lax.dynamic_index_in_dim(leaf, i, 0, False)
        return leaf.at[rows(i, share)].get(mode="fill", fill_value=0)

    return jax.tree.map(cut, tree)


def write(tree: Any, new: Any, i: jax.Array) -> Any:
    """`tree` with page i of every leaf replaced."""

    def put(leaf, own):
        if own.ndim < leaf.ndim:
            return jax.lax.dynamic_update_index_in_dim(leaf, own, i, 0)
        return leaf.at[rows(i, len(own))].set(own, mode="drop")

    return jax.tree.map(put, tree, new)


def rows(i: jax.Array, share: int) -> jax.Array:
    """The indices of a page's rows; those behind the end of a leaf are of no row."""
    return i * share + jnp.arange(share)
