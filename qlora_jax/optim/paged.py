"""Optimizers with their state in host memory, moved in pages of a few layers.

An adapter's A and B have a leading axis L, so a few layers of all of them are a page (pages.py):

    host    [m v 0] [m v 1] [m v 2] [m v 3]      while page 1 is updated,
    device          compute 1, fetch 2, store 0  page 2 comes in and page 0 goes out

Device memory holds about three pages of state and not all. A step moves every page both ways: 3.3
GB for a 70B model at r = 16, 0.13 s at 25 GB/s each way (computed, not measured). The same class
keeps the state resident, in one program over whole arrays; the numbers are equal bit for bit, and
a state can be moved at any step (`Paged.fit`).
"""

import contextlib
import functools
import time
from collections.abc import Iterator
from typing import Any

import jax
import optax
from jaxtyping import PyTree

from qlora_jax import process
from qlora_jax.errors import DoesNotFit, InputError
from qlora_jax.optim.memory import choose_memory
from qlora_jax.optim.pages import (
    PAGE_BYTES,
    cut,
    joined,
    layer_count,
    nbytes,
    page_count,
    parted,
    write,
)
from qlora_jax.placement import DEVICE, HOST, has_host_memory, memory_kind

Params = PyTree[jax.Array]
MEMORIES = ("host", "device")


class Paged:
    """Any optax transform, its state resident or, if the transform is elementwise, paged to host.

        optimizer = Paged(optax.adamw(2e-4), memory="host", elementwise=True)
        state = optimizer.init(params)
        params, state = optimizer.apply(params, grads, state)

    `apply` takes `params` and `state` over and writes the new ones in their memory: go on with
    what it returns, and keep a copy of what is wanted later. `grads` are left as they are. Pass
    `params` in device memory by `placement.to_device`: uncommitted arrays would come back
    committed, and programs that take them be compiled twice.

    Args:
      tx: the transform. Clipping to a global norm must come before, over the whole tree.
      memory: where the state lives between steps, `"host"` or `"device"`.
      resident: with `memory="host"`, how many of the first pages stay on the device all the same.
      elementwise: says that `tx` updates each number, or at least each layer, without looking at
        another one, as AdamW and Lion do: only then is a page at a time the same as all at once.
      contracts: whether XLA may contract products and sums of `tx`. Then the update of a page is a
        program of its own: with the slicing in the same one, about 7% of the parameters differ in
        the last bit (CPU, seen). `adamw` and `adamw8bit` leave nothing to contract.
      page_bytes: at most so much state a page, but a layer at the least.

    Attributes:
      bytes_moved: bytes that the last `apply` moved between host and device, both ways together.
      seconds_moved: seconds that the last `apply` spent on starting these copies and on waiting for
        them: what paging costs a step. Copies behind computation are free and not counted; a wait
        for a page that was still being updated is.

    Raises:
      InputError: host memory for a transform that is not declared elementwise, or on a backend that
        has none.
      DoesNotFit: from `init`, `apply` and `fit`, when the host has no room for a page.
    """

    def __init__(
        self,
        tx: optax.GradientTransformation,
        *,
        memory: str = "device",
        resident: int = 0,
        elementwise: bool = False,
        contracts: bool = True,
        page_bytes: int = PAGE_BYTES,
    ):
        self.tx, self.elementwise, self.contracts = tx, elementwise, contracts
        self.page_bytes, self.bytes_moved, self.seconds_moved = page_bytes, 0, 0.0
        self.refuse(memory)
        self.memory, self.resident = memory, resident

    def refuse(self, memory: str) -> None:
        """Raises the errors of a memory that cannot be had."""
        if memory not in MEMORIES:
            raise InputError("OPT-MEMORY", "memory", f"unknown {memory!r}", "host or device")
        if memory == "host" and not self.elementwise:
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

    def pages(self, params: Params) -> int:
        """How many pages the state of such parameters has."""
        return pages_of(self.tx, params, self.page_bytes)

    def init(self, params: Params) -> Any:
        """The state before the first step: `tx`'s own, or a tuple of them, one a page."""
        if self.memory == "device":
            return init_all(params, tx=self.tx)
        count, layers = self.pages(params), layer_count(params)
        return tuple(
            self.home(page, init_page(params, page, tx=self.tx, count=count, layers=layers))
            for page in range(count)
        )

    def apply(self, params: Params, grads: Params, state: Any) -> tuple[Params, Any]:
        """One step: new parameters, and the new state where the old one was.

        Equal bit for bit to jitted `tx.update` and `optax.apply_updates` on the whole trees.
        """
        self.bytes_moved, self.seconds_moved = 0, 0.0
        if self.memory == "device":
            return update_all(params, grads, state, tx=self.tx)
        pages, count, layers = [], len(state), layer_count(params)
        with self.clock():
            ahead = self.fetched(state, 0)
        for page in range(count):
            with self.clock():
                here, ahead = ahead, self.fetched(state, page + 1)
            params, here = self.update_in_place(params, grads, here, page, count, layers)
            with self.clock():
                pages.append(self.home(page, here))
                if page >= 2:  # or the queue runs ahead, and every page is on the device at once
                    self.wait(pages[page - 2])
                    delete(state[page - 2])
        self.bytes_moved = 2 * nbytes(state[self.resident :])
        return params, tuple(pages)

    def update_in_place(
        self, params: Params, grads: Params, state: Any, page: int, count: int, layers: int
    ) -> tuple[Params, Any]:
        """The parameters with one page of them updated, and the page's new state."""
        if not self.contracts:
            return update_rows(params, grads, state, page, tx=self.tx, count=count, layers=layers)
        own = cut_page((params, grads), page, count=count, layers=layers)
        new, state = update_page(*own, state, tx=self.tx)
        return write_page(params, new, page, count=count), state

    def fit(
        self,
        params: Params,
        state: Any,
        *,
        requested: str = "auto",
        reserved_bytes: int = 0,
        free_bytes: int | None = None,
    ) -> tuple[Any, str]:
        """The state placed anew for what is free now, and why: call it when the batch grows.

        Every number stays as it is, to the bit; where nothing is to be moved, nothing is done.

        Args:
          params: the parameters, or their shapes.
          state: taken over, as by `apply`.
          requested: `optim_memory`; only `auto` may move anything.
          reserved_bytes: what a training step of the new shape will allocate.
          free_bytes: of the device, beside this state; asked of the backend when None.
        """
        choice = choose_memory(
            requested,
            state_bytes=state_bytes(self.tx, params),
            pages=self.pages(params),
            reserved_bytes=reserved_bytes,
            free_bytes=free_bytes,
            own_bytes=on_device(state),
            elementwise=self.elementwise,
        )
        return self.moved(params, state, choice.memory, choice.resident), choice.reason

    def moved(self, params: Params, state: Any, memory: str, resident: int = 0) -> Any:
        """The state in another memory, where later steps keep it too; bit for bit the same."""
        self.refuse(memory)
        if (self.memory, self.resident) == (memory, resident):
            return state
        if self.memory == memory:  # pages that only change sides
            self.resident = resident
            return tuple(self.home(page, own) for page, own in enumerate(state))
        whole = self.whole(params, state)
        self.memory, self.resident = memory, resident
        return self.placed(params, whole)

    def whole(self, params: Params, state: Any) -> Any:
        """The state as `tx` itself has it, in NumPy arrays, wherever it lives: for a checkpoint."""
        like = jax.eval_shape(self.tx.init, params)
        return joined(state if self.memory == "host" else (state,), like)

    def placed(self, params: Params, whole: Any) -> Any:
        """`whole` undone: the state where this optimizer keeps it."""
        if self.memory == "device":
            return put(whole, DEVICE)
        count, layers = self.pages(params), layer_count(params)
        one = functools.partial(init_page, tx=self.tx, count=count, layers=layers)
        pages = parted(whole, jax.eval_shape(one, params, 0), count)
        return tuple(self.home(page, own) for page, own in enumerate(pages))

    def fetched(self, state: tuple, page: int) -> Any:
        """A page on its way to the device; None behind the last."""
        return put(state[page], DEVICE) if page < len(state) else None

    def home(self, page: int, state: Any) -> Any:
        """The state of a page on its way to where it lives between steps."""
        if page < self.resident:
            return put(state, DEVICE)
        with room_on_host(state):
            return put(state, HOST)

    def wait(self, state: Any) -> None:
        """Waits until a page is home."""
        with room_on_host(state):
            jax.block_until_ready(state)

    @contextlib.contextmanager
    def clock(self) -> Iterator[None]:
        """Adds what is done within to `seconds_moved`."""
        start = time.perf_counter()
        yield
        self.seconds_moved += time.perf_counter() - start


def updated(params: Params, grads: Params, state: Any, *, tx: Any) -> tuple[Params, Any]:
    """One step of `tx`, not compiled."""
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state


# The programs. A transform is static: optimizers of equal settings, which `adamw` gives the same
# transform, share what was compiled.
LAYOUT = ("tx", "count", "layers")
update_all = jax.jit(updated, static_argnames="tx", donate_argnums=(0, 2))
# The state of a page is never donated: XLA matches donated buffers by shape and not by memory kind,
# and the process aborts.
update_page = jax.jit(updated, static_argnames="tx")
cut_page = jax.jit(cut, static_argnames=("count", "layers"))
write_page = jax.jit(write, static_argnames="count", donate_argnums=0)


@functools.partial(jax.jit, static_argnames=LAYOUT, donate_argnums=0)
def update_rows(
    params: Params, grads: Params, state: Any, page: Any, *, tx: Any, count: int, layers: int
) -> tuple[Params, Any]:
    """`updated` for the rows of one page, written in place."""
    own = (cut(tree, page, count, layers) for tree in (params, grads))
    new, state = updated(*own, state, tx=tx)
    return write(params, new, page, count), state


# With its arguments kept, a program leaves results committed where they are, and an update, which
# gets such a state back from itself, is compiled once.
@functools.partial(jax.jit, static_argnames="tx", keep_unused=True)
def init_all(params: Params, *, tx: Any) -> Any:
    """The state of all parameters before the first step."""
    return tx.init(params)


@functools.partial(jax.jit, static_argnames=LAYOUT, keep_unused=True)
def init_page(params: Params, page: Any, *, tx: Any, count: int, layers: int) -> Any:
    """The state of one page before the first step."""
    return tx.init(cut(params, page, count, layers))


def choose_paged(
    tx: optax.GradientTransformation,
    params: Params,
    requested: str,
    *,
    elementwise: bool,
    contracts: bool,
    reserved_bytes: int = 0,
) -> tuple[Paged, str]:
    """`Paged` for `optim_memory: requested`, and why its state is where it is."""
    choice = choose_memory(
        requested,
        state_bytes=state_bytes(tx, params),
        pages=pages_of(tx, params),
        reserved_bytes=reserved_bytes,
        elementwise=elementwise,
    )
    optimizer = Paged(
        tx,
        memory=choice.memory,
        resident=choice.resident,
        elementwise=elementwise,
        contracts=contracts,
    )
    return optimizer, choice.reason


def state_bytes(tx: optax.GradientTransformation, params: Params) -> int:
    """Bytes of `tx`'s state for parameters of these shapes; nothing is allocated."""
    return nbytes(jax.eval_shape(tx.init, params))


def pages_of(tx: optax.GradientTransformation, params: Params, page_bytes: int = PAGE_BYTES) -> int:
    """How many pages `tx`'s state has for parameters of these shapes."""
    return page_count(layer_count(params), state_bytes(tx, params), page_bytes)


def on_device(state: Any) -> int:
    """Bytes of a state that are in device memory now."""
    return nbytes([leaf for leaf in jax.tree.leaves(state) if memory_kind(leaf) == DEVICE])


def put(tree: Any, kind: str) -> Any:
    """`tree` in memory of this kind, in one call: one for each array costs as much again."""
    leaves, structure = jax.tree.flatten(tree)
    first = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shardings = [getattr(leaf, "sharding", first).with_memory_kind(kind) for leaf in leaves]
    return structure.unflatten(jax.device_put(leaves, shardings))


def delete(state: Any) -> None:
    """Frees a state: the caller of `apply` still holds all pages, and the host has one of each."""
    for leaf in jax.tree.leaves(state):
        leaf.delete()


@contextlib.contextmanager
def room_on_host(state: Any) -> Iterator[None]:
    """Turns the backend's error for a full host into ours."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not process.ran_out(error):
            raise
        size = f"{nbytes(state) / 1e6:.1f} MB of optimizer state"
        raise DoesNotFit(
            "OPT-HOST",
            "optim_memory",
            f"no room in {HOST} memory for a page of {size}; checkpoints written so far are good",
            hint="optim=paged_adamw_8bit, a smaller lora_r, or a host with more free memory",
        ) from error
