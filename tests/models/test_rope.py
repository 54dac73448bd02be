"""Rotary positions of every rule against transformers, and what config.json may not say."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.errors import InputError
from qlora_jax.models.config import ModelConfig
from qlora_jax.models.rope import Rope, inverse_frequencies, rotate, rotation
from tests.tolerances import ROTATION_ATOL

FILE = Path(__file__).parent / "rope_by_transformers.json"
CASES = {case["name"]: case for case in json.loads(FILE.read_text())["cases"]}


@pytest.mark.parametrize("name", CASES)
def test_equals_transformers(name):
    case = CASES[name]
    config = ModelConfig.from_dict(case["config"])
    rope = config.local_rope if name.endswith("sliding_attention") else config.rope
    positions = jnp.asarray([case["positions"]])
    for ours, key in zip(rotation(rope, config.head_dim, positions), ("cos", "sin"), strict=True):
        np.testing.assert_allclose(ours[0], case[key], atol=ROTATION_ATOL, rtol=0)


def test_every_rule_has_a_case():
    rules = {ModelConfig.from_dict(case["config"]).rope.rule for case in CASES.values()}
    assert rules == {"default", "linear", "dynamic", "yarn", "llama3", "longrope"}


def test_channels_behind_the_rotated_ones_stay(strict_promotion):
    x = jnp.arange(16, dtype=jnp.float32).reshape(1, 1, 1, 16)
    cos, sin = rotation(Rope(partial=0.75), 16, jnp.asarray([[5]]))
    turned = rotate(x, cos, sin)
    np.testing.assert_array_equal(turned[..., 12:], x[..., 12:])
    first, second = x[0, 0, 0, :6], x[0, 0, 0, 6:12]
    expected = first * cos[0, 0] - second * sin[0, 0]
    np.testing.assert_allclose(turned[0, 0, 0, :6], expected, atol=ROTATION_ATOL)


def llama(**rope) -> dict:
    return CASES["default"]["config"] | {"rope_parameters": {"rope_theta": 1e4, **rope}}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rope_type": "warp"}, "unknown rule 'warp'"),
        ({"rope_type": "linear"}, "factor: is missing"),
        ({"rope_type": "linear", "factor": -1}, "factor: is '-1'"),
        ({"rope_type": "linear", "factor": 2.0, "beta_fast": 3}, "beta_fast: is no field of rule"),
        ({"rope_type": "default", "mrope_section": [2, 2]}, "mrope_section: is no field"),
        ({"rope_type": "default", "partial_rotary_factor": 1.5}, "partial_rotary_factor: is 1.5"),
        ({"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5},
         "partial_rotary_factor: is 0.5 (expected 1: in llama all channels of a head rotate)"),
        ({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0},
         "high_freq_factor: is 4.0 (expected above low_freq_factor"),
        ({"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]},
         "short_factor: is '[1.0]' (expected a list of 8 numbers above 0)"),
        ({"rope_type": "yarn", "factor": 4.0, "truncate": "no"}, "truncate: is 'no'"),
    ],
)  # fmt: skip
def test_a_wrong_rule_is_refused_by_name(fields, message):
    with pytest.raises(InputError) as error:
        ModelConfig.from_dict(llama(**fields))
    assert message in str(error.value)
    assert error.value.code == "CFG-MODEL"


def test_a_part_of_a_head_that_has_no_pairs_is_refused():
    config = CASES["longrope, long"]["config"]
    part = {"rope_theta": 1e4, "partial_rotary_factor": 0.2}
    with pytest.raises(InputError, match="3 of 16 channels rotate"):
        ModelConfig.from_dict(config | {"rope_parameters": part})


def test_phi3_takes_longrope_by_its_old_names_and_no_other_rule():
    config = CASES["longrope, long"]["config"]
    old = config | {"rope_parameters": config["rope_parameters"] | {"rope_type": "su"}}
    assert ModelConfig.from_dict(old).rope == ModelConfig.from_dict(config).rope
    linear = config | {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}
    with pytest.raises(InputError, match="unknown rule 'linear'"):
        ModelConfig.from_dict(linear)


def test_longrope_is_long_only_beyond_the_original_length():
    rope = Rope(rule="longrope", original=32, short_factor=(1.0,) * 4, long_factor=(2.0,) * 4)
    short, long = (inverse_frequencies(rope, 8, length) for length in (32, 33))
    np.testing.assert_array_equal(short, 2 * long)


def test_dynamic_counts_from_the_longest_position():
    fields = {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 16}
    assert ModelConfig.from_dict(llama(**fields)).rope.original == 64
