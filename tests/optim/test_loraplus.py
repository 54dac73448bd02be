"""LoRA+: B and m learn at a multiple of A's rate, in pages as in one piece; null changes no bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.optim.adamw import are_faster
from qlora_jax.optim.paged_adamw import paged_adamw
from qlora_jax.optim.schedules import schedule
from qlora_jax.placement import to_device
from tests.golden_data import GoldenFile, golden_folder
from tests.optim.test_paged_adamw import LAYERS, assert_same_bits, random_tree
from tests.tiers import tiered
from tests.tolerances import OPTIMIZER_ATOL

PEER = {"b1": 0.9, "b2": 0.95, "weight_decay": 0.1}


def as_params(arrays):
    """The golden arrays as an adapter of one layer has them."""
    one = {kind: arrays[kind][None] for kind in ("A", "B", "m")}
    return to_device({"self_attn.q_proj": one, "lm_head": {"weight": arrays["lm_head"]}})


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("memory", ["device", "host"])
def test_golden(memory, bits):
    """8 bits: every part has fewer than 4096 numbers, and stays in 32."""
    names = ("A", "B", "m", "lm_head")
    with GoldenFile(
        golden_folder("init") / "init.npz",
        inputs=lambda key: key.startswith(("loraplus.initial.", "loraplus.grads.")),
        part=lambda key: key.startswith("loraplus."),
    ) as golden:
        optimizer = paged_adamw(1e-3, **PEER, loraplus_lr_ratio=16.0, memory=memory, bits=bits)
        params = as_params({name: golden.input(f"loraplus.initial.{name}") for name in names})
        grads = {name: golden.input(f"loraplus.grads.{name}") for name in names}
        state = optimizer.init(params)
        for step in range(5):
            own = as_params({name: grads[name][step] for name in names})
            params, state = optimizer.apply(params, own, state)
        for kind in ("A", "B", "m"):
            found = params["self_attn.q_proj"][kind][0]
            golden.compare(f"loraplus.after5.{kind}", found, atol=OPTIMIZER_ATOL)
        golden.compare("loraplus.after5.lm_head", params["lm_head"]["weight"], atol=OPTIMIZER_ATOL)


def stepped(memory="device", steps=4, **settings):
    """Parameters and the whole state behind some steps."""
    shapes = {
        "q_proj": {"A": (LAYERS, 16, 300), "B": (LAYERS, 517, 16), "m": (LAYERS, 517)},
        "lm_head": {"weight": (31, 70)},
    }
    rate = schedule("cosine", 1e-3, 8, 0.2)
    optimizer = paged_adamw(rate, weight_decay=1e-2, memory=memory, page_bytes=1, **settings)
    params = random_tree(0, 0.1, shapes)
    state = optimizer.init(params)
    for step in range(steps):
        params, state = optimizer.apply(params, random_tree(step + 1, shapes=shapes), state)
    return params, optimizer.whole(params, state)


@pytest.mark.slow
@pytest.mark.fully_compiled
@pytest.mark.parametrize("bits", [32, 8])
def test_pages_are_the_whole_bit_for_bit(bits):
    whole, paged = (stepped(m, bits=bits, loraplus_lr_ratio=16.0) for m in ("device", "host"))
    assert_same_bits(whole, paged)


@pytest.mark.fully_compiled
@pytest.mark.parametrize("bits", tiered([32, 8], [8]))
def test_a_ratio_of_1_is_none_and_another_moves_b_and_m_alone(bits):
    plain, one, many = (stepped(bits=bits, loraplus_lr_ratio=r)[0] for r in (None, 1.0, 16.0))
    assert_same_bits(plain, one)
    same = jax.tree.map(lambda a, b: bool(jnp.array_equal(a, b)), plain, many)
    assert same == {"q_proj": {"A": True, "B": False, "m": False}, "lm_head": {"weight": True}}


def test_the_ratio_is_of_the_rate():
    """B behind steps at ratio 16 is B behind steps at 16 times the rate."""
    params, grads = random_tree(0), random_tree(1)
    quick, slow = paged_adamw(1e-3, loraplus_lr_ratio=16.0), paged_adamw(16e-3)
    found, expected = (
        optimizer.apply(jax.tree.map(jnp.copy, params), grads, optimizer.init(params))[0]
        for optimizer in (quick, slow)
    )
    for name, pair in expected.items():
        np.testing.assert_allclose(found[name]["B"], pair["B"], atol=OPTIMIZER_ATOL)
        assert np.abs(found[name]["A"] - pair["A"]).max() > 1e-2


def test_trees_of_other_kinds_have_nothing_faster():
    assert are_faster([jnp.ones(2), {"x": jnp.ones(2)}]) == [False, False]
    assert are_faster(jnp.ones(2)) == [False]
