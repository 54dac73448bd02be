"""How trees of stacked layers are cut into pages, and put together again.

Each leaf of an adapter has a leading axis L; a page is the same few layers of all of them:

    A (L, r, in)    [0 1 2] [3 4 5] [6 7 8]      L = 9, three layers a page
    B (L, out, r)   [0 1 2] [3 4 5] [6 7 8]

A longer leaf, such as a trained lm_head of (V, D), gives each layer an equal share of its rows,
ceil(V / L); what the last page has too many is zeros, which are never written back.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qlora_jax.errors import InputError

# Large enough that starting a copy or a program costs little beside it, and a GPU's bus is used
# well; three of them are on the device at once.
PAGE_BYTES = 32 * 2**20


def layer_count(params: Any) -> int:
    """The shortest leading axis: L where a leaf has one entry a layer.

    Raises:
      InputError: a leaf has no axis, so that there are no layers.
    """
    leading = [leaf.shape[:1] for leaf in jax.tree.leaves(params)]
    if not leading or () in leading:
        found = "parameters without an axis to cut them along"
        raise InputError("OPT-PAGES", "params", found, "leading axes", "optim_memory=device")
    return min(leading)[0]


def page_count(layers: int, nbytes: int, page_bytes: int = PAGE_BYTES) -> int:
    """In how many equal pages to cut `layers` layers that have `nbytes` of state in all.

    As few as there can be with at most `page_bytes` each, but never less than a layer a page.
    """
    counts = [count for count in range(1, layers + 1) if layers % count == 0]
    return next((count for count in counts if nbytes <= count * page_bytes), layers)


def cut(tree: Any, page: jax.Array, count: int, layers: int) -> Any:
    """Page number `page` of `count`: of each leaf so many rows; zeros behind its end."""

    def rows_of(leaf):
        rows = page_rows(len(leaf), count, layers)
        if rows * count == len(leaf):
            return jax.lax.dynamic_slice_in_dim(leaf, page * rows, rows)
        return leaf.at[page * rows + jnp.arange(rows)].get(mode="fill", fill_value=0)

    return jax.tree.map(rows_of, tree)


def write(tree: Any, new: Any, page: jax.Array, count: int) -> Any:
    """`tree` with the rows of one page of `count` replaced by `new`."""

    def put(leaf, own):
        if len(own) * count == len(leaf):
            return jax.lax.dynamic_update_slice_in_dim(leaf, own, page * len(own), 0)
        return leaf.at[page * len(own) + jnp.arange(len(own))].set(own, mode="drop")

    return jax.tree.map(put, tree, new)


def page_rows(rows: int, count: int, layers: int) -> int:
    """Rows that each page has of a leaf of so many rows."""
    return -(-rows // layers) * (layers // count)


def joined(pages: tuple, like: Any) -> Any:
    """The state of all pages as that of the whole tree, in NumPy arrays of the shapes of `like`.

    What is not cut, such as a count of steps, is the same in each page.
    """

    def join(whole, *parts):
        if parts[0].shape == whole.shape:
            return np.asarray(parts[0])
        return np.concatenate([np.asarray(part) for part in parts])[: len(whole)]

    return jax.tree.map(join, like, *pages)


def parted(state: Any, like: Any, count: int) -> tuple:
    """`joined` undone: NumPy arrays of the shapes of `like`, the state of one page."""

    def part(whole, own, page):
        whole = np.asarray(whole)
        if whole.shape == own.shape:
            return whole
        rows = whole[page * own.shape[0] : (page + 1) * own.shape[0]]
        missing = own.shape[0] - len(rows)
        return np.pad(rows, [(0, missing)] + [(0, 0)] * (rows.ndim - 1)) if missing else rows

    return tuple(
        jax.tree.map(lambda whole, own, page=page: part(whole, own, page), state, like)
        for page in range(count)
    )


def nbytes(tree: Any) -> int:
    """Bytes of all leaves, which may be shapes alone."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)
