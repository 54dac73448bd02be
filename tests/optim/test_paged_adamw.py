from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qlora_jax.errors import DoesNotFit, InputError
from qlora_jax.optim import paged
from qlora_jax.optim.paged import Paged, state_bytes
from qlora_jax.optim.paged_adamw import ADAMW, paged_adamw
from qlora_jax.optim.schedules import schedule
from qlora_jax.placement import memory_kind, to_device
from tests.golden_data import GoldenFile, golden_folder
from tests.tiers import tiered
from tests.tolerances import OPTIMIZER_ATOL

pytestmark = pytest.mark.fully_compiled

LAYERS, STEPS = 6, 12
SHAPES = {  # a layer has 4,800, 8,272, 2,064 and 1,040 numbers: two leaves go to 8 bits, two do not
    "q_proj": {"A": (LAYERS, 16, 300), "B": (LAYERS, 517, 16)},
    "down_proj": {"A": (LAYERS, 16, 129), "B": (LAYERS, 65, 16)},
}
COSINE = schedule("cosine", 1e-3, STEPS, 0.2)
TRANSFORMS = {  # and whether XLA may contract what they compute
    "adamw": (ADAMW[32](1e-3, weight_decay=1e-2), False),
    "adamw_schedule": (ADAMW[32](COSINE, weight_decay=1e-2), False),
    "adamw8bit": (ADAMW[8](1e-3, weight_decay=1e-2), False),
    "adamw8bit_schedule": (ADAMW[8](COSINE, weight_decay=1e-2), False),
    "optax_adamw": (optax.adamw(COSINE, weight_decay=1e-2), True),
    "optax_lion": (optax.lion(1e-4, weight_decay=1e-2), True),
}


def random_tree(seed, scale=1.0, shapes=SHAPES):
    rng = np.random.default_rng(seed)
    draw = lambda shape: (scale * rng.standard_normal(shape)).astype(np.float32)  # noqa: E731
    return to_device(jax.tree.map(draw, shapes, is_leaf=lambda x: isinstance(x, tuple)))


def bits(tree):
    arrays = map(np.asarray, jax.tree.leaves(tree))
    return [array.view(np.uint32) if array.itemsize == 4 else array for array in arrays]


def assert_same_bits(a, b):
    for left, right in zip(bits(a), bits(b), strict=True):
        np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize(
    ("name", "layers", "resident"),
    tiered(
        [
            (name, *pages)
            for name in TRANSFORMS
            for pages in [(1, 0), (1, 2), (1, LAYERS), (3, 1), (LAYERS, 0)]
        ],
        [("adamw8bit_schedule", 1, 2), ("optax_adamw", 3, 1)],
    ),
)
def test_paged_equals_resident_bit_for_bit(name, layers, resident):
    tx, contracts = TRANSFORMS[name]

    @jax.jit
    def plain_step(params, grads, state):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    start = random_tree(0, 0.1)
    plain, plain_state = start, tx.init(start)
    page = state_bytes(tx, start) * layers // LAYERS
    options = {"elementwise": True, "contracts": contracts, "page_bytes": page}
    optimizers = [
        Paged(tx, memory="host", resident=resident, **options),
        Paged(tx, memory="device", **options),
    ]
    runs = [(jax.tree.map(jnp.copy, start), optimizer.init(start)) for optimizer in optimizers]
    assert len(runs[0][1]) == LAYERS // layers
    for step in range(STEPS):
        grads = random_tree(step + 1)
        plain, plain_state = plain_step(plain, grads, plain_state)
        runs = [
            optimizer.apply(params, grads, state)
            for optimizer, (params, state) in zip(optimizers, runs, strict=True)
        ]
    for optimizer, (params, state) in zip(optimizers, runs, strict=True):
        assert_same_bits(params, plain)
        assert_same_bits(optimizer.whole(params, state), plain_state)
    assert any(np.any(a != b) for a, b in zip(bits(start), bits(plain), strict=True))


@pytest.mark.parametrize(
    ("rows", "bits_of_moments"),
    tiered(product([LAYERS, LAYERS + 1, 2 * LAYERS, 31], [8, 32]), [(31, 8)]),
)
def test_a_longer_leaf_is_paged_by_rows(rows, bits_of_moments):
    shapes = SHAPES | {"lm_head": {"weight": (rows, 1111)}}
    start = random_tree(0, 0.1, shapes)
    settings = {"weight_decay": 1e-2, "bits": bits_of_moments, "page_bytes": 1}
    optimizers = [paged_adamw(1e-3, memory=memory, **settings) for memory in ("host", "device")]
    runs = [(jax.tree.map(jnp.copy, start), optimizer.init(start)) for optimizer in optimizers]
    assert len(runs[0][1]) == LAYERS
    for step in range(3):
        grads = random_tree(step + 1, shapes=shapes)
        runs = [
            optimizer.apply(params, grads, state)
            for optimizer, (params, state) in zip(optimizers, runs, strict=True)
        ]
    assert_same_bits(runs[0][0], runs[1][0])
    wholes = [
        optimizer.whole(params, state)
        for optimizer, (params, state) in zip(optimizers, runs, strict=True)
    ]
    assert_same_bits(*wholes)
    assert all(np.any(a != b) for a, b in zip(bits(start), bits(runs[0][0]), strict=True))


def test_state_lives_where_it_was_asked_to_and_bytes_are_counted():
    params = random_tree(0)
    optimizer = paged_adamw(1e-3, memory="host", resident=2, page_bytes=1)
    state = optimizer.init(params)
    for _ in range(2):
        kinds = [{memory_kind(leaf) for leaf in jax.tree.leaves(page)} for page in state]
        assert kinds == [{"device"}] * 2 + [{"pinned_host"}] * 4
        optimizer.seconds_moved = 1e9  # of an earlier step
        params, state = optimizer.apply(params, random_tree(1), state)
    assert all(memory_kind(leaf) == "device" for leaf in jax.tree.leaves(params))
    moments = 2 * sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    count = 4  # one int32 a page
    assert optimizer.bytes_moved == 2 * 4 * (moments // LAYERS + count)
    assert 0 < optimizer.seconds_moved < 60
    assert state_bytes(optimizer.tx, params) == moments + count
    resident = paged_adamw(1e-3)
    resident.apply(params, random_tree(1), resident.init(params))
    assert (resident.bytes_moved, resident.seconds_moved) == (0, 0.0)


def test_bytes_of_8_bit_state():
    """What a layer has fewer than 4096 numbers of stays in 32 bits."""
    params = random_tree(0)
    packed = LAYERS * (19 + 33) * 2 * (256 + 4)  # blocks of 4,800 and 8,272 numbers
    kept = LAYERS * 16 * (129 + 65) * 2 * 4
    assert state_bytes(ADAMW[8](1e-3), params) == packed + kept + 4
    state = jax.tree.leaves(paged_adamw(1e-3, bits=8).init(params))
    assert sum(leaf.nbytes for leaf in state) == packed + kept + 4


@pytest.mark.parametrize("name", tiered(TRANSFORMS, ["adamw8bit_schedule"]))
def test_a_state_is_moved_at_any_step_and_no_number_changes(name):
    tx, contracts = TRANSFORMS[name]
    options = {"elementwise": True, "contracts": contracts, "page_bytes": 1}
    still, moving = Paged(tx, **options), Paged(tx, **options)
    size = state_bytes(tx, random_tree(0))
    runs = [(random_tree(0, 0.1), optimizer.init(random_tree(0))) for optimizer in (still, moving)]
    # Pages that fit beside the step, and those that are on the device then: 3 are in flight.
    for step, (room, resident) in enumerate([(0, 0), (LAYERS, LAYERS), (5, 2), (0, 0), (4, 1)]):
        params, state = runs[1]
        room = -(-room * size // LAYERS)

        def fit(state, params=params, room=room):
            free = room - paged.on_device(state)
            return moving.fit(params, state, free_bytes=free + 77, reserved_bytes=77)[0]

        state = fit(state)
        assert fit(state) is state
        if resident == LAYERS:
            assert {memory_kind(leaf) for leaf in jax.tree.leaves(state)} == {"device"}
            assert moving.memory == "device"
        else:
            kinds = [{memory_kind(leaf) for leaf in jax.tree.leaves(page)} for page in state]
            assert kinds == [{"device"}] * resident + [{"pinned_host"}] * (LAYERS - resident)
        runs[1] = (params, state)
        grads = random_tree(step + 1)
        runs = [
            optimizer.apply(params, grads, state)
            for optimizer, (params, state) in zip((still, moving), runs, strict=True)
        ]
    assert_same_bits(runs[0][0], runs[1][0])
    assert_same_bits(still.whole(*runs[0]), moving.whole(*runs[1]))


@pytest.mark.parametrize("memory", ["host", "device"])
def test_a_step_takes_params_over_leaves_grads_and_is_traced_once(memory):
    params, grads = to_device((random_tree(0), random_tree(1)))
    before = [array.copy() for array in bits(grads)]
    adamw, traces = optax.adamw(1e-3), []

    def counted(*args):
        traces.append(1)
        return adamw.update(*args)

    transform = optax.GradientTransformation(adamw.init, counted)
    optimizer = Paged(transform, memory=memory, elementwise=True)
    state = optimizer.init(params)
    first = params
    for _ in range(3):
        params, state = optimizer.apply(params, grads, state)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(first))
    assert_same_bits(grads, [array.view(np.float32) for array in before])
    assert len(traces) == 1


@pytest.mark.parametrize("memory", tiered(["host", "device"], ["host"]))
def test_optimizers_of_equal_settings_share_their_programs(memory):
    def programs():
        return paged.update_all._cache_size() + paged.update_rows._cache_size()

    counts = []
    for rate in (3e-3, 3e-3, 4e-3):
        optimizer = paged_adamw(schedule("cosine", rate, STEPS, 0.2), memory=memory)
        params = random_tree(0)
        optimizer.apply(params, random_tree(1), optimizer.init(params))
        counts.append(programs())
    assert counts[0] == counts[1] == counts[2] - 1


@pytest.mark.parametrize("bits_of_moments", ADAMW)
def test_every_setting_reaches_the_transform(bits_of_moments):
    """8 bits: a leaf of fewer than 4096 numbers stays in 32."""
    settings = {"b1": 0.8, "b2": 0.7, "eps": 0.5, "weight_decay": 0.3}
    ours, peer = paged_adamw(1e-2, bits=bits_of_moments, **settings), optax.adamw(1e-2, **settings)
    shapes = {"w": {"A": (LAYERS, 7, 9)}}
    params = expected = random_tree(0, shapes=shapes)
    params = jax.tree.map(jnp.copy, params)
    state, peer_state = ours.init(params), peer.init(expected)
    for step in range(3):
        grads = random_tree(step + 1, shapes=shapes)
        params, state = ours.apply(params, grads, state)
        updates, peer_state = peer.update(grads, peer_state, expected)
        expected = optax.apply_updates(expected, updates)
    np.testing.assert_allclose(params["w"]["A"], expected["w"]["A"], atol=OPTIMIZER_ATOL)


def test_a_schedule_begins_with_0():
    rates, moved = (1.0, 10.0, 100.0), []
    optimizer = paged_adamw(lambda count: jnp.take(jnp.asarray(rates), count), eps=0.0)
    shapes = {"w": {"A": (LAYERS, 2, 2)}}
    params = random_tree(0, 0.0, shapes)
    grads = jax.tree.map(jnp.ones_like, params)
    state, before = optimizer.init(params), 0.0
    for _ in rates:  # a constant gradient moves by the rate alone
        params, state = optimizer.apply(params, grads, state)
        now = float(params["w"]["A"][0, 0, 0])
        moved.append(before - now)
        before = now
    np.testing.assert_allclose(moved, rates, rtol=1e-3)


def test_a_learning_rate_may_be_an_array():
    """Which has no hash: its transform is its own."""
    found = []
    for rate in (1e-3, jnp.float32(1e-3)):
        optimizer, params = paged_adamw(rate), random_tree(0)
        found.append(optimizer.apply(params, random_tree(1), optimizer.init(params))[0])
    assert_same_bits(*found)


def test_host_memory_is_refused_for_a_transform_not_declared_elementwise():
    clipped = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    with pytest.raises(InputError, match=r"OPT-ELEMENTWISE.*elementwise=True.*optim_memory=device"):
        Paged(clipped, memory="host")
    Paged(clipped, memory="device")


def test_wrong_words_and_trees_are_refused():
    with pytest.raises(InputError, match="unknown 'cpu'"):
        Paged(optax.adamw(1e-3), memory="cpu")
    for tree in ({"a": jnp.ones((2, 3)), "b": jnp.float32(1)}, {}):
        with pytest.raises(InputError, match=r"OPT-PAGES.*without an axis.*optim_memory=device"):
            paged_adamw(1e-3, memory="host").init(tree)


def test_only_auto_moves_a_state():
    params = random_tree(0)
    for memory in ("host", "device"):
        optimizer = paged_adamw(1e-3, memory=memory)
        state = optimizer.init(params)
        found, reason = optimizer.fit(params, state, requested=memory, free_bytes=10**12)
        assert found is state
        assert reason == f"optimizer state on the {memory}: asked for"


@pytest.mark.parametrize("error", [MemoryError(), jax.errors.JaxRuntimeError])
def test_a_full_host_is_one_error(monkeypatch, error):
    params = random_tree(0)
    optimizer = paged_adamw(1e-3, memory="host")
    state = optimizer.init(params)
    if isinstance(error, type):
        error = error("RESOURCE_EXHAUSTED: Out of memory allocating 77 bytes.")

    def full(leaves, shardings):
        raise error

    monkeypatch.setattr(paged, "put", full)
    for call in (lambda: optimizer.init(params), lambda: optimizer.home(0, state[0])):
        with pytest.raises(
            DoesNotFit, match=r"OPT-HOST\]: optim_memory: no room in pinned_host mem"
        ):
            call()
    monkeypatch.undo()
    other = jax.errors.JaxRuntimeError("INTERNAL: something else")
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"), paged.room_on_host({}):
        raise other


GOLDEN = {32: {"torch_adamw", "bnb_adamw32", "bnb_paged_adamw32"}, 8: {"bnb_adamw8"}}
SHARED = {"initial", "grads"}


@pytest.mark.parametrize(
    ("memory", "width", "layers"),
    tiered(
        product(["host", "device"], GOLDEN, [1, 3]),
        [*product(["host"], GOLDEN, [3]), *product(["device"], GOLDEN, [1])],
    ),
)
def test_golden_optimizers(memory, width, layers):
    """One layer, and three layers alike: each is what a whole tensor is in PyTorch."""
    path = golden_folder("training") / "optimizers.npz"
    with GoldenFile(path, SHARED, part=SHARED | GOLDEN[width]) as golden:
        assert set(golden.outputs()) == GOLDEN[width]
        initial, grads = golden.input("initial"), golden.input("grads")
        params = to_device({"w": np.tile(initial, (layers, 1))})
        settings = {"bits": width, "memory": memory, "page_bytes": 1}
        optimizer = paged_adamw(1e-2, b2=0.95, weight_decay=0.1, **settings)
        state, found = optimizer.init(params), []
        for step, grad in enumerate(grads, 1):
            grad = {"w": jnp.asarray(np.tile(grad, (layers, 1)))}
            params, state = optimizer.apply(params, grad, state)
            if step in (1, 5, 20):
                found.append(np.asarray(params["w"]))
        for layer in range(layers):
            for key in golden.outputs():
                golden.compare(key, np.stack(found)[:, layer], atol=OPTIMIZER_ATOL)


def test_every_golden_optimizer_is_compared():
    with np.load(golden_folder("training") / "optimizers.npz") as arrays:
        assert set(arrays) == SHARED.union(*GOLDEN.values())
