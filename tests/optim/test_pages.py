"""Trees are cut into pages and put together again, whatever their shapes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_jax.errors import InputError
from qlora_jax.optim.pages import cut, joined, layer_count, page_count, parted, write


@st.composite
def trees(draw):
    """Layers, pages, and leaves of which some have more rows than layers."""
    count, per_page = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    layers = count * per_page
    more = draw(st.lists(st.integers(layers, 4 * layers), min_size=1, max_size=3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shapes = [(layers, 2, 3), *((rows, 2) for rows in more)]
    return layers, count, [jnp.float32(rng.standard_normal(shape)) for shape in shapes]


@given(trees())
def test_pages_written_one_by_one_are_the_tree(drawn):
    layers, count, tree = drawn
    assert layer_count(tree) == layers
    found = jax.tree.map(lambda leaf: jnp.full_like(leaf, 7), tree)
    for page in range(count):
        found = write(found, cut(tree, page, count, layers), page, count)
    for a, b in zip(found, tree, strict=True):
        np.testing.assert_array_equal(a, b)


@given(trees())
def test_a_state_is_parted_as_parameters_are_cut_and_joined_again(drawn):
    layers, count, tree = drawn
    state = {"count": np.int32(3), "m": tree}
    pages = [{"count": np.int32(3), "m": cut(tree, i, count, layers)} for i in range(count)]
    found = parted(state, pages[0], count)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(pages), strict=True):
        np.testing.assert_array_equal(a, b)
    whole = joined(found, state)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(a, b)


@given(st.integers(1, 200), st.integers(0, 10**9), st.integers(1, 10**8))
def test_pages_are_equal_and_as_few_as_their_size_allows(layers, nbytes, page_bytes):
    count = page_count(layers, nbytes, page_bytes)
    assert layers % count == 0
    assert count == layers or nbytes <= count * page_bytes
    fewer = [c for c in range(1, count) if layers % c == 0]
    assert all(nbytes > c * page_bytes for c in fewer)


def test_trees_without_layers_are_refused():
    for tree in ({"a": jnp.ones((2, 3)), "b": jnp.float32(1)}, {}):
        with pytest.raises(InputError, match=r"OPT-PAGES.*without an axis.*optim_memory=device"):
            layer_count(tree)
