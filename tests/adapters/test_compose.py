"""The algebra of adapters: sums, ranks, scales once, and what has no sum."""

import dataclasses
import json

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

from qlora_jax.adapters.adapter import Adapter, param_shapes
from qlora_jax.adapters.compose import compose
from qlora_jax.adapters.method import METHODS
from qlora_jax.adapters.parts import row_owners
from qlora_jax.adapters.spec import make_spec
from qlora_jax.checkpoints.peft import read_adapter, save_adapter
from qlora_jax.errors import InputError
from qlora_jax.models.config import ModelConfig
from qlora_jax.models.families import linear_shapes
from qlora_jax.weight_names import LINEARS
from tests.adapters.small_model import SHAPES, SmallModel
from tests.golden_data import golden_folder
from tests.tolerances import COMPOSED_ATOL, COMPOSED_RTOL, SAME_DELTA_ATOL

MODEL = SmallModel()
LAYERS = MODEL.config.num_hidden_layers
CONFIGS = sorted(golden_folder("models").glob("*/config.json"))
NAMES = "abc"
KEEPS = {method: {"density": 1.0} for method in METHODS if "_" in method or method == "ties"}


def trained(seed: int, shapes=SHAPES, layers=LAYERS, **settings) -> Adapter:
    """An adapter of random A and B; the padding of layers of smaller ranks is zero."""
    spec = make_spec(shapes, layers, **settings)
    random = np.random.default_rng(seed)
    params = {}
    for name, arrays in param_shapes(spec, shapes).items():
        there = np.arange(arrays["B"][2]) < np.array(spec.ranks(name))[:, None]
        A, B = (random.standard_normal(arrays[kind]).astype(np.float32) for kind in "AB")
        params[name] = {"A": A * there[..., None], "B": B * there[:, None]}
    return Adapter(jax.tree.map(jnp.asarray, params), spec)


def delta(adapter: Adapter, name: str, layer: int) -> np.ndarray:
    """scale B A, float64; zeros where the adapter has nothing."""
    if name not in adapter.spec.targets or not adapter.spec.ranks(name)[layer]:
        return np.zeros(SHAPES[name])
    A, B = (np.float64(adapter.params[name][half])[layer] for half in "AB")  # padding is zero
    return float(adapter.spec.scales(name)[layer]) * B @ A


def deltas(adapter: Adapter) -> dict[tuple[str, int], np.ndarray]:
    return {(n, layer): delta(adapter, n, layer) for n in SHAPES for layer in range(LAYERS)}


def assert_deltas(adapter: Adapter, expected: dict, atol: float = COMPOSED_ATOL) -> None:
    for place, found in deltas(adapter).items():
        np.testing.assert_allclose(found, expected[place], COMPOSED_RTOL, atol, err_msg=str(place))


def weighted(adapters: dict, weights: dict) -> dict[tuple[str, int], np.ndarray]:
    """The sum of the weighted deltas."""
    found = {name: deltas(adapter) for name, adapter in adapters.items()}
    places = next(iter(found.values()))
    return {p: sum(weights[name] * found[name][p] for name in found) for p in places}


TARGETS = st.one_of(
    st.just("all-linear"),
    st.lists(st.sampled_from(list(SHAPES)), min_size=1, max_size=3, unique=True),
)


@st.composite
def settings_of(draw, least: int = 1, **fixed) -> dict[str, dict]:
    """Of one to three adapters of any ranks, alphas, targets and kinds of scale."""
    found = {}
    for name in NAMES[: draw(st.integers(least, 3))]:
        settings = {
            "r": draw(st.integers(1, 5)),
            "alpha": draw(st.sampled_from([1, 3, 16, 0.5])),
            "use_rslora": draw(st.booleans()),
            "targets": draw(TARGETS),
        } | fixed
        if settings["targets"] == "all-linear" and "r" not in fixed:
            settings["rank_pattern"] = {"layers.1.self_attn.q_proj": draw(st.integers(1, 5))}
        found[name] = {"seed": draw(st.integers(0, 99)), **settings}
    return found


def made(settings: dict[str, dict]) -> dict[str, Adapter]:
    return {name: trained(**own) for name, own in settings.items()}


WEIGHTS = st.floats(-2, 2, width=32)


@given(settings=settings_of(), data=st.data())
def test_cat_is_the_weighted_sum(settings, data):
    adapters = made(settings)
    weights = {name: data.draw(WEIGHTS) for name in adapters}
    both = compose(adapters, weights)
    assert_deltas(both, weighted(adapters, weights))
    for name in both.spec.targets:
        specs = [one.spec for one in adapters.values() if name in one.spec.targets]
        assert both.spec.ranks(name) == tuple(
            sum(spec.ranks(name)[layer] for spec in specs) for layer in range(LAYERS)
        )
        assert (both.spec.scales(name)[np.array(both.spec.ranks(name)) > 0] == 1).all()


@given(settings=settings_of(), data=st.data())
def test_svd_of_enough_rank_is_the_weighted_sum_too(settings, data):
    adapters = made(settings)
    weights = {name: data.draw(WEIGHTS) for name in adapters}
    assert_deltas(
        compose(adapters, weights, method="svd", svd_rank=16), weighted(adapters, weights)
    )


@given(settings=settings_of(least=2), rank=st.integers(1, 4))
def test_svd_is_the_nearest_of_its_rank(settings, rank):
    adapters = made(settings)
    weights = dict.fromkeys(adapters, 0.5)
    whole = weighted(adapters, weights)
    found = deltas(compose(adapters, weights, method="svd", svd_rank=rank))
    for place, dense in whole.items():
        assert np.linalg.matrix_rank(found[place], tol=1e-4) <= rank
        left = np.linalg.svd(dense, compute_uv=False)[rank:]  # Eckart and Young
        error = np.linalg.norm(dense - found[place])
        np.testing.assert_allclose(error, np.linalg.norm(left), COMPOSED_RTOL, COMPOSED_ATOL)


@given(settings=settings_of(least=2), energy=st.floats(0.05, 1))
def test_energy_gives_the_smallest_rank_that_keeps_it(settings, energy):
    adapters = made(settings)
    weights = dict.fromkeys(adapters, 1)
    both = compose(adapters, weights, method="svd", energy=energy)
    for (name, layer), dense in weighted(adapters, weights).items():
        if not dense.any():
            continue
        squares = np.square(np.linalg.svd(dense, compute_uv=False))
        kept = np.cumsum(squares) / squares.sum()
        rank = both.spec.ranks(name)[layer]
        assert kept[rank - 1] >= energy - 1e-9
        assert rank == 1 or kept[rank - 2] < energy + 1e-9


def test_energy_that_is_written_down():
    """Singular values 3, 2, 1: 9/14, 13/14, 14/14 of the energy."""
    lora = trained(0, r=3, alpha=3, targets=["q_proj"])
    A, B = np.eye(3, 8, dtype=np.float32), np.eye(16, 3, dtype=np.float32) * [3, 2, 1]
    pair = {"A": np.stack([A] * LAYERS), "B": np.stack([np.float32(B)] * LAYERS)}
    lora = Adapter({"self_attn.q_proj": pair}, lora.spec)
    for energy, rank in {0.6: 1, 9 / 14 + 1e-9: 2, 0.92: 2, 0.95: 3, 1: 3}.items():
        found = compose({"a": lora}, {"a": 1}, method="svd", energy=energy)
        assert found.spec.ranks("self_attn.q_proj") == (rank,) * LAYERS
    by_default = compose({"a": lora}, {"a": 1}, method="svd")
    assert by_default.spec.r == 3


@given(settings=settings_of(r=3), data=st.data())
def test_linear_has_the_products_of_different_adapters_too(settings, data):
    adapters = made(settings)
    weights = {name: data.draw(WEIGHTS) for name in adapters}
    found = deltas(compose(adapters, weights, method="linear"))
    for (name, layer), composed in found.items():
        A = B = 0
        for key, adapter in adapters.items():
            if name in adapter.spec.targets:
                factor = weights[key] * float(adapter.spec.scales(name)[layer])
                own = [np.float64(matrix) for matrix in adapter.layer(name, layer)]
                A = A + np.sign(factor) * np.sqrt(abs(factor)) * own[0]
                B = B + np.sqrt(abs(factor)) * own[1]
        expected = B @ A if np.ndim(A) else np.zeros(SHAPES[name])
        np.testing.assert_allclose(composed, expected, COMPOSED_RTOL, 4 * COMPOSED_ATOL)


@given(
    settings=settings_of(least=2, r=3), method=st.sampled_from(["magnitude_prune", "dare_linear"])
)
def test_with_every_entry_kept_pruning_is_linear(settings, method):
    adapters = made(settings)
    weights = dict.fromkeys(adapters, 0.3)
    linear = compose(adapters, weights, method="linear")
    assert same(compose(adapters, weights, method=method, density=1.0), linear)


def same(one: Adapter, other: Adapter) -> bool:
    """Equal to the bit."""
    leaves = jax.tree.map(np.array_equal, one.params, other.params)
    return one.spec == other.spec and all(jax.tree.leaves(leaves))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("alpha", [8, 6])
def test_one_adapter_with_weight_1_is_itself(method, alpha):
    lora = trained(1, r=4, alpha=alpha, rank_pattern={"layers.1.mlp.up_proj": 2})
    found = compose({"a": lora}, {"a": 1}, method=method, **KEEPS.get(method, {}))
    atol = SAME_DELTA_ATOL["svd" if method == "svd" else "linear"]
    if method == "cat" and alpha == 8:
        atol = 0.0
    for name in SHAPES:
        for layer in range(LAYERS):
            own, again = (in_float32(one, name, layer) for one in (lora, found))
            size = max(1.0, np.abs(own).max())
            np.testing.assert_allclose(again, own, rtol=0, atol=atol * size)


def in_float32(adapter: Adapter, name: str, layer: int) -> np.ndarray:
    A, B = (np.asarray(matrix) for matrix in adapter.layer(name, layer))
    return adapter.spec.scales(name)[layer] * (B @ A)


def test_a_weight_for_each_layer():
    lora = trained(1, r=2)
    found = deltas(compose({"a": lora}, {"a": [0.0, 1.0, -2.0]}))
    for (name, layer), composed in found.items():
        expected = [0.0, 1.0, -2.0][layer] * delta(lora, name, layer)
        np.testing.assert_allclose(composed, expected, COMPOSED_RTOL, COMPOSED_ATOL)


def test_cat_does_not_depend_on_how_adapters_are_grouped():
    a, b, c = (trained(seed, r=2) for seed in range(3))
    two = compose({"a": a, "b": b}, {"a": 0.5, "b": 2})
    grouped = compose({"ab": two, "c": c}, {"ab": 3, "c": 1})
    at_once = compose({"a": a, "b": b, "c": c}, {"a": 1.5, "b": 6, "c": 1})
    assert_deltas(grouped, deltas(at_once))


@pytest.mark.parametrize("method", METHODS)
def test_every_composition_saves_and_reads_back_equal(method, tmp_path):
    settings = {"r": 2} if method not in ("cat", "svd") else {}
    adapters = {
        "a": trained(1, **({"r": 3} | settings), targets=["down_proj"], alpha=7),
        "b": trained(2, **({"r": 5} | settings), targets=["layers.1.self_attn.q_proj", "up_proj"]),
        "c": trained(3, **({"r": 2} | settings), targets=["k_proj", "up_proj"], use_rslora=True),
    }
    both = compose(adapters, {"a": 0.7, "b": -0.4, "c": 0.1}, method=method)
    assert both.spec.ranks("self_attn.q_proj")[::2] == (0, 0)
    save_adapter(tmp_path / "both", both)
    again = read_adapter(tmp_path / "both", MODEL.module_shapes(), LAYERS)
    assert same(again, both)
    assert again.num_parameters == both.num_parameters


def test_the_same_seed_keeps_the_same_entries():
    adapters = {name: trained(seed, r=3) for seed, name in enumerate("ab")}
    weights = {"a": 1, "b": 1}
    make = lambda **more: compose(adapters, weights, method="dare_linear", **more)  # noqa: E731
    assert same(make(seed=3), make(seed=3))
    assert not same(make(seed=3), make(seed=4))
    moved = compose(
        {"elsewhere": adapters["a"], "b": adapters["b"]},
        {"elsewhere": 1, "b": 1},
        method="dare_linear",
        seed=3,
    )
    assert same(moved, make(seed=3))


def test_dropout_stays_where_all_have_the_same():
    one, other = trained(0, r=2, dropout=0.1), trained(1, r=2, dropout=0.1)
    none = trained(2, r=2)
    weights = {"a": 1, "b": 1}
    assert compose({"a": one, "b": other}, weights).spec.lora_dropout == 0.1
    assert compose({"a": one, "b": none}, weights).spec.lora_dropout == 0


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.parent.name)
def test_targets_come_in_the_order_of_every_family(config):
    own = list(linear_shapes(ModelConfig.from_dict(json.loads(config.read_text()))))
    assert own == [linear for linear in LINEARS if linear in own]


LORA = trained(0, r=2)
DORA = Adapter(
    {n: {**pair, "m": np.ones(pair["B"].shape[:2])} for n, pair in LORA.params.items()},
    dataclasses.replace(LORA.spec, use_dora=True),
)
SAVED = Adapter(
    {**LORA.params, "lm_head": {"weight": np.ones((9, 8))}},
    dataclasses.replace(LORA.spec, modules_to_save=("lm_head",)),
)


@pytest.mark.parametrize("alone", [DORA, SAVED], ids=["dora", "modules_to_save"])
def test_what_has_no_sum_comes_back_when_it_is_alone(alone):
    assert same(compose({"a": alone}, {"a": 1.0}), alone)


def poisoned() -> Adapter:
    bad = {n: {k: np.array(v) for k, v in pair.items()} for n, pair in LORA.params.items()}
    bad["mlp.up_proj"]["B"][1, 3, 0] = np.nan
    return Adapter(bad, LORA.spec)


WIDER = SHAPES | {"mlp.up_proj": (13, 8)}
TWO = {"a": 1, "b": 1}
BAD = {
    "no adapter": ({}, {}, {}, r"COMPOSE-NONE"),
    "no weight": ({"b": LORA}, {"a": 1}, {}, r"COMPOSE-WEIGHT\]: weights: none for b"),
    "no such adapter": ({}, {"a": 1, "c": 1}, {}, r"COMPOSE-WEIGHT.* for c, .*one of a\)"),
    "weight NaN": ({}, {"a": np.nan}, {}, r"COMPOSE-WEIGHT\]: a: the weight is nan"),
    "weight inf": ({}, {"a": [1, np.inf, 1]}, {}, r"COMPOSE-WEIGHT\]: a: the weight is inf"),
    "two weights": ({}, {"a": [1, 2]}, {}, r"2 weights \(expected one, or one for each of 3"),
    "DoRA": ({"b": DORA}, TWO, {}, r"COMPOSE-KIND\]: b: is a DoRA adapter"),
    "DoRA by half": ({"a": DORA}, {"a": 0.5}, {}, r"COMPOSE-KIND\]: a: is a DoRA adapter"),
    "DoRA by svd": ({"a": DORA}, {"a": 1}, {"method": "svd"}, r"COMPOSE-KIND\]: a: is a DoRA"),
    "saved": ({"b": SAVED}, TWO, {}, r"COMPOSE-KIND\]: b: has lm_head trained in full"),
    "NaN": ({"b": poisoned()}, TWO, {}, r"b: model.layers.1.mlp.up_proj.lora_B: nan at \[3, 0\]"),
    "layers": (
        {"b": trained(0, layers=2, r=2)},
        TWO,
        {},
        r"MODEL\]: b: is for 2 layers, and a for 3",
    ),
    "shape": (
        {"b": trained(0, WIDER, r=2)},
        TWO,
        {},
        r"b: mlp.up_proj is \(13, 8\), and \(12",
    ),
    "ranks": (
        {"b": trained(0, r=3)},
        TWO,
        {"method": "linear"},
        r"COMPOSE-RANK.*layers.0.self_attn.q_proj: ranks differ: a 2, b 3 .*method cat.* or svd",
    ),
    "method": ({}, {"a": 1}, {"method": "lineer"}, r"COMPOSE-METHOD.*'lineer'.*Try: .*linear"),
    "rank 0": ({}, {"a": 1}, {"method": "svd", "svd_rank": 0}, r"LORA-RANK\]: svd_rank: 0 "),
    "energy": ({}, {"a": 1}, {"method": "svd", "energy": 1.5}, r"energy: 1.5 \(expected over 0"),
    "energy and rank": (
        {},
        {"a": 1},
        {"method": "svd", "energy": 0.5, "svd_rank": 2},
        r"energy: given beside svd_rank",
    ),
    "density 0": ({}, {"a": 1}, {"method": "ties", "density": 0}, r"density: 0 \(expected over"),
    "density NaN": ({}, {"a": 1}, {"method": "ties", "density": np.nan}, r"density: nan"),
    "density unused": ({}, {"a": 1}, {"density": 0.5}, r"density: has no effect with method cat"),
    "sign unused": ({}, {"a": 1}, {"sign": "frequency"}, r"sign: has no effect with method cat"),
    "seed unused": ({}, {"a": 1}, {"seed": 3}, r"seed: has no effect with method cat"),
    "rank unused": ({}, {"a": 1}, {"svd_rank": 4}, r"svd_rank: has no effect with method cat"),
    "sign": ({}, {"a": 1}, {"method": "ties", "sign": "both"}, r"sign: 'both' .*frequency"),
    "seed": ({}, {"a": 1}, {"method": "dare_ties", "seed": -1}, r"seed: -1"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_combined_is_refused_by_name(case):
    changed, weights, options, words = BAD[case]
    adapters = {} if case == "no adapter" else {"a": LORA} | changed
    with pytest.raises(InputError, match=words):
        compose(adapters, weights, **options)


def test_ranks_that_add_up_to_too_much_are_refused(monkeypatch):
    monkeypatch.setattr("qlora_jax.adapters.composable.MAX_RANK", 3)
    with pytest.raises(InputError, match=r"COMPOSE-RANK.* add up to 4 .*at most 3.*method svd"):
        compose({"a": LORA, "b": LORA}, TWO)


def test_rows_belong_to_the_adapter_that_they_come_from():
    a = trained(0, r=2, targets=["q_proj"])
    rising = {"layers.1.self_attn.q_proj": 3, "layers.2.self_attn.q_proj": 2}
    b = trained(1, r=1, targets=["q_proj"], rank_pattern=rising)
    owners = row_owners({"a": a, "b": b})["self_attn.q_proj"]
    np.testing.assert_array_equal(owners, [[0, 0, 1, 0, 0], [0, 0, 1, 1, 1], [0, 0, 1, 1, 0]])
