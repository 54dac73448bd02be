import dataclasses
import math

import numpy as np
import pytest

from qlora_jax.adapters.spec import make_spec
from qlora_jax.errors import InputError
from tests.adapters.small_model import SHAPES


def spec(**settings):
    return make_spec(SHAPES, 3, **settings)


def test_the_table_of_the_module_docstring():
    found = spec(r=8, targets=["q_proj", "down_proj"], rank_pattern={r"layers\.1\.mlp\..*": 4})
    assert found.targets == ("self_attn.q_proj", "mlp.down_proj")
    assert found.ranks("self_attn.q_proj") == (8, 8, 8)
    assert found.ranks("mlp.down_proj") == (8, 4, 8)
    assert found.alphas("mlp.down_proj") == (16, 16, 16)


def test_all_linear_is_every_linear_in_the_models_order():
    found = spec()
    assert found.targets == tuple(SHAPES)
    assert found.target_modules == ("q_proj", "k_proj", "o_proj", "up_proj", "down_proj")


@pytest.mark.parametrize(
    ("targets", "targeted"),
    [
        (["q_proj"], {"self_attn.q_proj": (2, 2, 2)}),
        (["self_attn.q_proj"], {"self_attn.q_proj": (2, 2, 2)}),
        (["layers.1.self_attn.q_proj"], {"self_attn.q_proj": (0, 2, 0)}),
        (["model.layers.2.mlp.up_proj"], {"mlp.up_proj": (0, 0, 2)}),
        (r".*\.(q|k)_proj", {"self_attn.q_proj": (2, 2, 2), "self_attn.k_proj": (2, 2, 2)}),
        (r"model\.layers\.[01]\.mlp\.up_proj", {"mlp.up_proj": (2, 2, 0)}),
    ],
)
def test_targets_by_pefts_rules(targets, targeted):
    found = spec(r=2, targets=targets)
    assert {name: found.ranks(name) for name in found.targets} == targeted


@pytest.mark.parametrize("exclude", [["k_proj", "mlp.up_proj", "lm_head"], r".*(k|up)_proj"])
def test_exclude_wins_over_targets(exclude):
    assert spec(exclude=exclude).targets == (
        *("self_attn.q_proj", "self_attn.o_proj"),
        "mlp.down_proj",
    )


def test_the_first_pattern_that_matches_holds():
    found = spec(
        r=2,
        targets=["q_proj", "up_proj"],
        rank_pattern={"layers.0.self_attn.q_proj": 5, "q_proj": 4, r".*_proj": 7},
        alpha_pattern={"up_proj": 32.5},
    )
    assert found.ranks("self_attn.q_proj") == (5, 4, 4)
    assert found.ranks("mlp.up_proj") == (7, 7, 7)
    assert found.alphas("mlp.up_proj") == (32.5,) * 3


def test_each_regular_expression_costs_a_process_so_they_are_few():
    pattern = {rf"(q_proj|x{index})": 4 for index in range(1000)}
    with pytest.raises(InputError, match=r"LORA-REGEX.*too many .*at most 32"):
        spec(targets=["q_proj"], rank_pattern=pattern)


def test_layers_to_transform():
    found = spec(r=2, targets=["q_proj"], layers_to_transform=[0, 2])
    assert found.ranks("self_attn.q_proj") == (2, 0, 2)
    assert spec(r=2, layers_to_transform=1).ranks("mlp.up_proj") == (0, 2, 0)


def test_scales():
    settings = {"r": 16, "alpha": 8, "targets": ["q_proj"]}
    layers = {"layers_to_transform": [0, 2]}
    plain, stable = spec(**settings, **layers), spec(**settings, **layers, use_rslora=True)
    assert plain.scales("self_attn.q_proj").dtype == np.float32
    np.testing.assert_array_equal(plain.scales("self_attn.q_proj"), [0.5, 0, 0.5])
    np.testing.assert_array_equal(stable.scales("self_attn.q_proj"), [2, 0, 2])
    rank_8 = dict(settings, r=8, use_rslora=True)
    assert spec(**rank_8).scales("self_attn.q_proj")[0] == np.float32(8 / math.sqrt(8))


def test_specs_that_adapt_alike_are_equal_however_written():
    a = spec(r=4, targets=["q_proj"])
    b = spec(r=8, targets=r".*\.q_proj", rank_pattern={"q_proj": 4})
    assert a == b
    assert hash(a) == hash(b)
    assert a != spec(r=4, targets=["q_proj"], dropout=0.1)
    assert dataclasses.replace(a, use_rslora=True) != a


@pytest.mark.parametrize(
    "targets",
    ["all-linear", ["q_proj"], ["layers.1.mlp.up_proj", "q_proj"], r"model\.layers\.\d\.mlp.*"],
)
def test_the_saved_names_mean_the_same(targets):
    found = spec(r=2, targets=targets)
    assert spec(r=2, targets=list(found.target_modules)) == found


def test_a_short_name_that_two_linears_share_is_saved_longer():
    shapes = {"self_attn.o_proj": (4, 4), "cross_attn.o_proj": (4, 4)}
    found = make_spec(shapes, 2, r=2, targets=["self_attn.o_proj"])
    assert found.target_modules == ("self_attn.o_proj",)


@pytest.mark.parametrize(
    ("settings", "code", "message"),
    [
        (
            {"targets": ["q_porj"]},
            "LORA-TARGETS",
            r"'q_porj' matches no linear.*did you mean q_proj",
        ),
        ({"targets": ["q_proj", "lm_head"]}, "LORA-TARGETS", "lm_head has no A and B here"),
        ({"targets": ".*embed.*|.*q_proj"}, "LORA-TARGETS", r"modules_to_save=\[embed_tokens\]"),
        ({"modules_to_save": ["lm_haed"]}, "LORA-MODULES", "cannot be .* did you mean lm_head"),
        ({"modules_to_save": "lm_head"}, "LORA-MODULES", r"a list: \['lm_head'\]"),
        ({"modules_to_save": ["norm"]}, "LORA-MODULES", "'norm'.*some of lm_head, embed_tokens"),
        ({"targets": []}, "LORA-TARGETS", "self_attn.q_proj, self_attn.k_proj"),
        ({"targets": r"layers\.0.*"}, "LORA-TARGETS", "matches no module path"),
        ({"exclude": ["gate_proj"]}, "LORA-TARGETS", "exclude_modules: 'gate_proj'"),
        ({"exclude": ".*"}, "LORA-TARGETS", "nothing is left to adapt"),
        (
            {"rank_pattern": {"v_proj": 4}},
            "LORA-TARGETS",
            "rank_pattern: 'v_proj' matches no target",
        ),
        (
            {"targets": ".*q_proj", "layers_to_transform": 1},
            "LORA-TARGETS",
            "layers_to_transform=1",
        ),
        ({"targets": ["q_proj"], "layers_to_transform": 3}, "LORA-TARGETS", "matches no linear"),
        ({"layers_to_transform": [7]}, "LORA-TARGETS", "nothing is left"),
        ({"r": 0}, "LORA-RANK", r"lora: r: 0 \(expected a whole number from 1 to 4096\)"),
        ({"r": 4097}, "LORA-RANK", "4097"),
        ({"rank_pattern": {"q_proj": -1}}, "LORA-RANK", r"rank_pattern\['q_proj'\]: -1"),
        ({"alpha": 0}, "LORA-ALPHA", "lora_alpha: 0"),
        ({"alpha": math.nan}, "LORA-ALPHA", "nan"),
        ({"alpha": math.inf}, "LORA-ALPHA", "inf"),
        ({"alpha": 10**400}, "LORA-ALPHA", "a finite number above 0"),
        ({"dropout": 1.0}, "LORA-DROPOUT", r"1.0 \(expected at least 0 and below 1\)"),
        ({"dropout": -0.1}, "LORA-DROPOUT", "-0.1"),
    ],
)
def test_what_is_refused(settings, code, message):
    with pytest.raises(InputError, match=message) as error:
        spec(**settings)
    assert error.value.code == code
