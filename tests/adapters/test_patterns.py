import re
import time

import pytest

from qlora_jax.adapters.patterns import MAX_LENGTH, end_matches, full_matches
from qlora_jax.errors import InputError

PATHS = [f"model.layers.{i}.{name}" for i in range(12) for name in ("self_attn.q_proj", "mlp.up")]

PATTERNS = [
    "q_proj",
    "self_attn.q_proj",
    "model.layers.1.mlp.up",
    r"layers\.[0-3]\..*",
    r".*\.(q_proj|up)",
    r"model\.layers\.(1|11)\.self_attn\.q_proj",
    "q_pro",
    "q_proj|up",
    "^model.layers.0.mlp.up",
    r"(?:\d+)\.mlp\.up",
]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_full_matches_is_re_fullmatch(pattern):
    expected = [re.fullmatch(pattern, path) is not None for path in PATHS]
    assert full_matches(pattern, PATHS, "here") == expected


@pytest.mark.parametrize("pattern", PATTERNS)
def test_end_matches_is_pefts_rule(pattern):
    expected = [re.match(rf"(.*\.)?({pattern})$", path) is not None for path in PATHS]
    assert end_matches(pattern, PATHS, "here") == expected


def test_a_pattern_that_would_run_for_years_is_refused():
    start = time.process_time()
    with pytest.raises(InputError, match="takes too long to match") as error:
        full_matches(r"((\w+)+\.)+x", ["model.layers.0.self_attn.q_proj" * 3], "lora: targets")
    assert error.value.code == "LORA-REGEX"
    assert time.process_time() - start < 1  # the time is the child's


def test_what_is_no_regular_expression_is_refused():
    with pytest.raises(InputError, match=r"'q_proj\(' is not a regular expression: missing \)"):
        full_matches("q_proj(", PATHS, "lora: targets")


def test_the_longest_pattern_is_taken_and_a_longer_one_refused():
    assert end_matches("(q_proj|" + "x" * (MAX_LENGTH - 9) + ")", PATHS[:1], "here") == [True]
    with pytest.raises(InputError, match="a pattern of 513 characters"):
        end_matches("x" * (MAX_LENGTH + 1), PATHS, "here")
