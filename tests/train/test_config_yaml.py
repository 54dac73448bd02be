"""A run's YAML and key=value pairs: what the words mean, and what is no YAML."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_jax.errors import InputError
from qlora_jax.train.config import TrainConfig
from qlora_jax.train.config_yaml import parse, parse_overrides


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2e-4", 2e-4),
        ("1E5", 1e5),
        (".5", 0.5),
        ("5", 5),
        ("010", 10),
        ("-3", -3),
        ("1:30", "1:30"),
        ("on", "on"),
        ("no", "no"),
        ("true", True),
        ("null", None),
        ("", None),
        ("~", None),
        ("2024-01-01", "2024-01-01"),
        ("'2e-4'", "2e-4"),
        ("[1, a]", [1, "a"]),
        ("{a: 1e-3}", {"a": 1e-3}),
    ],
)
def test_yaml_means_what_people_mean(text, value):
    found = parse(text, "here")
    assert (type(found), found) == (type(value), value)


@given(st.floats(allow_nan=False))
def test_every_float_that_python_prints_is_read_as_that_float(number):
    assert parse(f"x: {number!r}".replace("inf", ".inf"), "here") == {"x": number}


@pytest.mark.parametrize("override", ["lora_r", "=3", ""])
def test_an_override_without_a_key_or_value_is_refused(override):
    with pytest.raises(InputError, match=r"CFG-OVERRIDE\]: command line: .*expected key=value"):
        parse_overrides([override])


def test_an_override_is_cut_at_its_first_equals_sign():
    assert parse_overrides(["dataset=rows.jsonl?a=b"]) == {"dataset": "rows.jsonl?a=b"}


def test_a_doubled_override_is_refused():
    with pytest.raises(InputError, match="command line:seed: the key is doubled"):
        parse_overrides(["seed=1", "seed=2"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nseed: 2\n", r"line 2: the key 'seed' is doubled"),
        ("rank_pattern: {a: 1, a: 2}\n", r"line 1: the key 'a' is doubled"),
        ("seed: [1\n", r"run.yaml:2: is not YAML"),
        ("- a\n- b\n", r"does not hold keys"),
        ("just text\n", r"does not hold keys"),
        ("1: 2\n", r"does not hold keys"),
        ("a: &x [1]\nb: *x\n", r"line 2: an alias"),
        ("a: !!python/object:os.system x\n", r"is not YAML: could not determine"),
        ("a: \x07\n", r"CFG-YAML.*run.yaml"),
        (f"seed: {'9' * 5000}\n", r"CFG-YAML.*run.yaml"),
        ("a: " + "[" * 5000, r"CFG-YAML.*run.yaml"),
    ],
)
def test_yaml_that_is_none_is_one_line(tmp_path, text, message):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        TrainConfig.from_yaml(path)
    assert len(str(caught.value).splitlines()) == 1


def test_missing_file_folder_and_encoding(tmp_path):
    with pytest.raises(InputError, match=r"none.yaml: missing: no such file"):
        TrainConfig.from_yaml(tmp_path / "none.yaml")
    with pytest.raises(InputError, match="is a folder"):
        TrainConfig.from_yaml(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"run_name: caf\xe9\n")
    with pytest.raises(InputError, match=r"not UTF-8 at byte 13"):
        TrainConfig.from_yaml(tmp_path / "latin.yaml")
