"""What Python's json takes silently is refused, with the file named."""

import os

import pytest

from qlora_jax.checkpoints.strict_json import parse_json, read_json
from qlora_jax.errors import InputError

BAD = {
    b"": ("JSON-SYNTAX", "x.json:1"),
    b'{"a": 1,}': ("JSON-SYNTAX", "x.json:1"),
    b'{\n"a": 1\n"b"}': ("JSON-SYNTAX", "x.json:3"),
    b"\xef\xbb\xbf{}": ("JSON-SYNTAX", "x.json"),
    b'{"a": "\xff"}': ("JSON-SYNTAX", "byte 7"),
    b'{"a": NaN}': ("JSON-NUMBER", "NaN"),
    b'{"a": -Infinity}': ("JSON-NUMBER", "Infinity"),
    b'{"a": 1e999}': ("JSON-NUMBER", "1e999"),
    b'{"a": ' + b"9" * 5000 + b"}": ("JSON-NUMBER", "digits"),
    b'{"a": {"b": 1, "c": 3, "b": 2}}': ("JSON-KEYS", "'b' is doubled"),
    b"[1]": ("JSON-OBJECT", "holds a list"),
    b"null": ("JSON-OBJECT", "null"),
    b"3": ("JSON-OBJECT", "a number"),
    b'{"a": ' + b"[" * 70 + b"]" * 70 + b"}": ("JSON-DEPTH", "64"),
    b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}": ("JSON-DEPTH", "too deep"),
    b'{"a": [' + b"1," * 4_000_000 + b"1]}": ("JSON-ITEMS", "4000000"),
}


@pytest.mark.parametrize(("text", "code", "words"), [(t, *v) for t, v in BAD.items()])
def test_refuses(text, code, words):
    with pytest.raises(InputError) as error:
        parse_json(text, "x.json")
    assert error.value.code == code
    assert "x.json" in str(error.value)
    assert words in str(error.value)


def test_reads_an_object(tmp_path):
    path = tmp_path / "good.json"
    path.write_text('{"a": [1, 2.5, {"b": null}], "\u00fc": "x"}', encoding="utf-8")
    assert read_json(path, 100) == {"a": [1, 2.5, {"b": None}], "\u00fc": "x"}


def test_depth_is_counted_from_the_top():
    assert parse_json(b'{"a": {"b": []}}', "x", depth=3) == {"a": {"b": []}}
    with pytest.raises(InputError, match="JSON-DEPTH"):
        parse_json(b'{"a": {"b": [[]]}}', "x", depth=3)


def test_refuses_files_by_size_and_kind(tmp_path):
    (tmp_path / "large.json").write_text("{}" + " " * 99)
    os.mkfifo(tmp_path / "pipe.json")
    for name, code in [
        ("large.json", "JSON-SIZE"),
        ("pipe.json", "FILE-KIND"),
        ("none.json", "JSON-MISSING"),
        (".", "FILE-KIND"),
    ]:
        with pytest.raises(InputError) as error:
            read_json(tmp_path / name, 100)
        assert error.value.code == code
