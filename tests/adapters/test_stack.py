"""Rows of a batch with adapters of their own: as each alone, compiled once, refused by name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chex import assert_max_traces

from qlora_jax.adapters import AdapterStack, init_lora, stack_adapters
from qlora_jax.errors import InputError, NonFinite
from qlora_jax.evaluation import perplexity
from qlora_jax.inference.decode import generate_batch, generate_tokens
from tests.inference.tiny_model import tiny_model
from tests.random_arrays import normals_like
from tests.tiers import tiered
from tests.tolerances import ROW_ADAPTER_ATOL

MODEL = tiny_model()
IDS = np.random.default_rng(3).integers(0, 265, (4, 9)).astype(np.int32)


def drawn(seed: int, model=MODEL, **options):
    """A trained adapter: A and B of size 0.2."""
    adapter = init_lora(model, key=jax.random.key(seed), **{"r": 4, "alpha": 8.0, **options})
    return normals_like(adapter, seed + 100, size=0.2)


ADAPTERS = {
    "all": drawn(0),
    "thin": drawn(1, r=2, alpha=16.0, use_rslora=True),
    "attention": drawn(2, r=8, targets=["q_proj", "v_proj"]),
    "uneven": drawn(3, targets=["down_proj", "k_proj"], rank_pattern={"layers.1.mlp.down_proj": 2}),
}
STACK = stack_adapters(ADAPTERS)


def close(found, expected):
    np.testing.assert_allclose(found, expected, atol=ROW_ADAPTER_ATOL, rtol=ROW_ADAPTER_ATOL)


@pytest.mark.parametrize("index", [[0, 1, 2, 3], [3, -1, 3, 0], [-1] * 4])
def test_each_row_is_as_with_its_own_adapter(index):
    found = MODEL(IDS, adapter=STACK, adapter_index=index)
    for row, own in enumerate(index):
        adapter = None if own < 0 else list(ADAPTERS.values())[own]
        close(found[row], MODEL(IDS[row : row + 1], adapter=adapter)[0])


def test_adapters_are_told_by_name_too():
    names = ["uneven", None, "all", "thin"]
    found = MODEL(IDS, adapter=STACK, adapter_index=names)
    np.testing.assert_array_equal(found, MODEL(IDS, adapter=STACK, adapter_index=[3, -1, 0, 1]))
    one = MODEL(IDS, adapter=STACK, adapter_index="thin")
    np.testing.assert_array_equal(one, MODEL(IDS, adapter=STACK, adapter_index=[1] * 4))


def test_another_index_and_another_adapter_compile_nothing():
    @jax.jit
    @assert_max_traces(n=1)
    def logits(model, stack, index):
        return model(IDS, adapter=stack, adapter_index=index)

    first = logits(MODEL, STACK, jnp.array([0, 1, 2, 3]))
    second = logits(MODEL, STACK, jnp.array([1, 1, -1, 0]))
    assert np.abs(first - second).max() > 0.1
    other = stack_adapters({**ADAPTERS, "all": drawn(9)})
    renamed = stack_adapters({f"new {name}": one for name, one in ADAPTERS.items()})
    assert np.abs(logits(MODEL, other, jnp.array([0, 1, 2, 3])) - first)[0].max() > 0.1
    np.testing.assert_array_equal(logits(MODEL, renamed, jnp.array([0, 1, 2, 3])), first)


def test_a_gradient_goes_to_the_rows_own_adapter():
    def loss(stack):
        return MODEL(IDS, adapter=stack, adapter_index=[0, 2, 2, -1]).sum()

    found = jax.jit(jax.grad(loss, allow_int=True))(STACK).params["self_attn.q_proj"]["A"]
    moved = np.abs(found).max((0, 2, 3)) > 0
    assert moved.tolist() == [True, False, True, False]


def test_an_index_that_only_a_program_knows_gives_nan_when_it_is_out_of_range():
    logits = jax.jit(lambda index: MODEL(IDS, adapter=STACK, adapter_index=index))
    found = logits(jnp.array([0, 4, -2, -1]))
    assert np.isfinite(found).all((1, 2)).tolist() == [True, False, False, True]


def test_rows_read_nothing_of_adapters_that_they_do_not_use():
    """The matrices of a pass are those of its rows, however many are held."""
    many = stack_adapters({str(i): drawn(i) for i in range(9)})
    shapes = jax.eval_shape(lambda: MODEL.own_rows(many, [8, 0], 2)).linears["mlp.up_proj"]
    assert shapes["A"].shape == (2, 2, 4, 32)
    spoiled = jax.tree.map(lambda leaf: leaf.at[:, 1:8].set(jnp.nan), many)
    found = MODEL(IDS[:2], adapter=spoiled, adapter_index=[8, 0])
    np.testing.assert_array_equal(found, MODEL(IDS[:2], adapter=many, adapter_index=[8, 0]))


@pytest.mark.parametrize("weights", tiered(["packed", "dense"], ["dense"]))
def test_generated_rows_are_those_of_each_adapter_alone(weights):
    prompts = [[5, 6, 7], [9], list(range(20, 40)), [1, 2]]
    options = {"max_new_tokens": 8, "decode_weights": weights}
    new = [[] for _ in prompts]
    which = ["all", None, "attention", "uneven"]
    batch = generate_batch(
        MODEL, prompts, adapter=STACK, adapter_index=which, seeds=[0] * 4, **options
    )
    for row, token in batch:
        new[row].append(token)
    for row, name in enumerate(which):
        alone = generate_tokens(MODEL, prompts[row], adapter=ADAPTERS.get(name), **options)
        assert new[row] == list(alone)
    assert len({tuple(row) for row in new}) == 4


def test_perplexity_by_adapter():
    data = np.tile(IDS[:1], (3, 1))
    alone = [perplexity(MODEL, data[:1], adapter=ADAPTERS.get(n)).mean_nll for n in ("all", "base")]
    which = ["all", None, None]
    result = perplexity(MODEL, data, adapter=STACK, adapter_index=which, batch_size=2)
    close(result.mean_nll, (alone[0] + 2 * alone[1]) / 3)
    one = perplexity(MODEL, data, adapter=STACK, adapter_index="all")
    close(one.mean_nll, alone[0])


def test_a_stack_goes_through_transformations():
    copied = jax.tree.map(jnp.asarray, STACK)
    assert isinstance(copied, AdapterStack)
    assert (copied.count, copied.depth, STACK.names) == (4, 2, tuple(ADAPTERS))


def test_what_cannot_be_stacked_or_used_is_refused():
    def refused(match, act):
        with pytest.raises(InputError, match=match):
            act()

    def used(which, adapter=STACK):
        return lambda: MODEL(IDS, adapter=adapter, adapter_index=which)

    refused("STACK-EMPTY", lambda: stack_adapters({}))
    dora = drawn(0, use_dora=True)
    refused(r"STACK-KIND\]: d: is DoRA", lambda: stack_adapters({"d": dora}))
    head = drawn(0, modules_to_save=["lm_head"])
    refused(r"h: holds lm_head in full \(modules", lambda: stack_adapters({"h": head}))
    wide = drawn(0, tiny_model(intermediate_size=64))
    refused(
        r"STACK-BASE\]: w: mlp.gate_proj is \(64, 32\), and \(48, 32\) in another adapter",
        lambda: stack_adapters({**ADAPTERS, "w": wide}),
    )
    deep = drawn(0, tiny_model(num_hidden_layers=3))
    refused("d: 3 layers, and all has 2", lambda: stack_adapters({**ADAPTERS, "d": deep}))
    nan = jax.tree.map(lambda leaf: leaf.at[0, 0, 0].set(jnp.nan), ADAPTERS["all"])
    refused("LORA-FINITE", lambda: stack_adapters({"n": nan}))
    refused(r"adapter_index: 4 \(expected 0 to 3: all, thin, attention, uneven", used([0, 4, 0, 0]))
    refused(r"adapter_index: -2 ", used([0, -2, 0, 0]))
    refused("'al' is no adapter of this stack .*Try: did you mean all", used("al"))
    refused("3 of them for 4 rows", used([0, 1, 2]))
    refused("the adapter is not a stack", used(0, ADAPTERS["all"]))
    refused(r"STACK-BASE\]: adapter: ", used(0, stack_adapters({"w": wide})))
    spoiled = jax.tree.map(lambda leaf: leaf * jnp.nan, STACK)
    new = generate_tokens(MODEL, [1], adapter=spoiled, adapter_index=0, max_new_tokens=1)
    with pytest.raises(NonFinite):
        next(new)
