"""Files of every format, and every way in which one of their rows can be bad."""

import io
import json
import os
import re

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qlora_jax.data import load_dataset, text_rows
from qlora_jax.data.rows import read_rows
from qlora_jax.errors import InputError
from tests.data.small_tokenizer import byte_level

GOOD = b'{"text": "secret words"}'
CHAT = '{"messages": [%s]}'
USER, BOT = '{"role": "user", "content": "q"}', '{"role": "assistant", "content": "a"}'

# name: (a line, code, what the message says). None of these lines can be trained on.
MALFORMED = {
    "half a row": (b'{"text": "secret', "DATA-JSON", "bad JSON at column 10"),
    "no quotes": (b"{text: secret}", "DATA-JSON", "bad JSON at column 2"),
    "two rows a line": (GOOD + GOOD, "DATA-JSON", "more after the row's end"),
    "tab in a string": (b'{"text": "secret\t"}', "DATA-JSON", "Invalid control character"),
    "too deep": (b'{"text": ' + b"[" * 100_000, "DATA-JSON", "too large or too deep"),
    "huge number": (b'{"text": ' + b"9" * 5000 + b"}", "DATA-JSON", "too large or too deep"),
    "array": (b'["secret"]', "DATA-OBJECT", "the row is an array (expected an object)"),
    "string": (b'"secret"', "DATA-OBJECT", "the row is a string"),
    "number": (b"5", "DATA-OBJECT", "the row is a number"),
    "null row": (b"null", "DATA-OBJECT", "the row is null"),
    "missing": (b'{"secret": 1}', "DATA-FIELD", "field text is missing"),
    "empty": (b'{"text": ""}', "DATA-FIELD", "field text is empty"),
    "blank": (b'{"text": " \\n "}', "DATA-FIELD", "field text is empty"),
    "null": (b'{"text": null}', "DATA-FIELD", "field text is null (expected a string)"),
    "number field": (b'{"text": 5}', "DATA-FIELD", "field text is a number (expected a string)"),
    "boolean": (b'{"text": true}', "DATA-FIELD", "field text is a boolean"),
    "list field": (b'{"text": ["secret"]}', "DATA-FIELD", "field text is an array"),
    "object field": (b'{"text": {"secret": 1}}', "DATA-FIELD", "field text is an object"),
    "NaN": (b'{"text": "secret", "x": NaN}', "DATA-JSON", "NaN is not JSON"),
    "Infinity": (b'{"text": "secret", "x": -Infinity}', "DATA-JSON", "-Infinity is not JSON"),
    "overflow": (b'{"text": "secret", "x": 1e999}', "DATA-JSON", "a number is not finite"),
    "lone surrogate": (b'{"text": "secret \\ud800"}', "DATA-UTF8", "a lone surrogate"),
    "BOM": (b"\xef\xbb\xbf" + GOOD, "DATA-BOM", "byte order mark (BOM)"),
    "Latin-1": (b'{"text": "secret \xe9"}', "DATA-UTF8", "byte 18 of the line is not UTF-8"),
    "UTF-16": (GOOD.decode().encode("utf-16"), "DATA-NUL", "a NUL byte"),
    "NUL": (b'{"text": "secret\0"}', "DATA-NUL", "a NUL byte"),
    "escaped NUL": (b'{"text": "secret\\u0000"}', "DATA-NUL", "field text has a NUL character"),
    "doubled key": (b'{"text": "secret", "text": "b"}', "DATA-JSON", "the same key twice"),
    "doubled key inside": (b'{"text": "s", "m": {"a": 1, "a": 2}}', "DATA-JSON", "same key twice"),
}

CHATS = {
    "no messages": ("", "DATA-FIELD", "field messages is empty"),
    "message is text": ('"secret"', "DATA-FIELD", "message 1 is a string"),
    "no role": ('{"content": "secret"}', "DATA-ROLE", "message 1 has no known role"),
    "unknown role": (
        '{"role": "secret", "content": "s"}',
        "DATA-ROLE",
        "message 1 has no known role (expected one of system, user, assistant, tool)",
    ),
    "assistant first": (f"{BOT}, {USER}", "DATA-ROLE", "message 1 (assistant) is first"),
    "user twice": (
        f"{USER}, {USER}",
        "DATA-ROLE",
        "role order: message 2 (user) follows user (expected assistant)",
    ),
    "assistant twice": (f"{USER}, {BOT}, {BOT}", "DATA-ROLE", "(assistant) follows assistant"),
    "late system": (
        USER + ', {"role": "system", "content": "s"}',
        "DATA-ROLE",
        "message 2 (system) follows user",
    ),
    "no content": (f'{USER}, {{"role": "assistant"}}', "DATA-FIELD", "2: content is missing"),
    "empty content": (
        USER + ', {"role": "assistant", "content": ""}',
        "DATA-FIELD",
        "message 2: content is empty",
    ),
    "content is a list": (
        '{"role": "user", "content": [{"type": "text"}]}',
        "DATA-FIELD",
        "message 1: content is an array (expected a string)",
    ),
    "NUL in content": (
        '{"role": "user", "content": "secret\\u0000"}',
        "DATA-NUL",
        "message 1: content has a NUL",
    ),
    "nothing to train": (USER, "DATA-UNTRAINED", "no trainable token"),
}


@pytest.fixture(scope="module")
def tokenizer():
    return byte_level()


def load(path, tokenizer, **options):
    return load_dataset(path, tokenizer, max_seq_length=64, **options)


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_line_is_named_or_skipped(name, tmp_path, tokenizer):
    line, code, reason = MALFORMED[name]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join([GOOD, line, GOOD]) + b"\n")
    check_named_or_skipped(path, 2, code, reason, tokenizer)


@pytest.mark.parametrize("name", CHATS)
def test_a_malformed_chat_is_named_or_skipped(name, tmp_path, tokenizer):
    messages, code, reason = CHATS[name]
    path = tmp_path / "rows.jsonl"
    good = CHAT % f"{USER}, {BOT}"
    path.write_text("\n".join([good, CHAT % messages, good]))
    check_named_or_skipped(path, 2, code, reason, tokenizer)


def check_named_or_skipped(path, line, code, reason, tokenizer):
    with pytest.raises(InputError) as caught:
        load(path, tokenizer)
    message = str(caught.value)
    assert message.startswith(f"error[{code}]: {path}:{line}: ")
    assert reason in message
    assert "\n" not in message
    assert "secret" not in message  # no text of the row
    statistics = load(path, tokenizer, skip_invalid=True).statistics
    assert (statistics.rows, statistics.kept, statistics.invalid) == (3, 2, 1)
    assert statistics.rejected == (message,)


def test_a_line_over_the_limit_is_passed_over_and_not_kept(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(text_rows, "MAX_LINE_BYTES", 100)
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join([GOOD, b'{"text": "' + b"s" * 1000 + b'"}', GOOD]))
    reason = "a line of more than 100 bytes"
    check_named_or_skipped(path, 2, "DATA-LINE", reason, tokenizer)


def test_a_long_line_is_read_in_pieces(monkeypatch):
    monkeypatch.setattr(text_rows, "MAX_LINE_BYTES", 4)
    file = io.BytesIO(b"abc\n" + b"x" * 13 + b"\nabcd\ntail-without-end")
    assert list(text_rows.bounded_lines(file)) == [b"abc\n", None, None, None]
    file = io.BytesIO(b"abcd")
    assert list(text_rows.bounded_lines(file)) == [b"abcd"]


def test_crlf_blank_lines_and_a_last_line_without_end(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "a"}\r\n\r\n  \n{"text": "b\\r\\n"}')
    assert [(row.where, row.value) for row in read_rows(path)] == [
        (f"{path}:1", {"text": "a"}),
        (f"{path}:4", {"text": "b\r\n"}),
    ]


def test_a_json_array_and_its_lines(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(' [\n{"text": "a"},\n\n {"text": NaN}, 5,\n{"text":\n "b"}]\n')
    rows = list(read_rows(path))
    assert [row.where for row in rows] == [
        f"{path}:{line} (row {row})" for row, line in enumerate((2, 4, 4, 5), 1)
    ]
    assert [rows[0].value, rows[3].value] == [{"text": "a"}, {"text": "b"}]
    assert "NaN is not JSON" in str(rows[1].value)
    assert "the row is a number" in str(rows[2].value)


def test_a_json_file_of_lines(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text('{"text": "a"}\n{"text": "b"}\n')
    assert [row.value["text"] for row in read_rows(path)] == ["a", "b"]


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        ('[{"text": "a"}\n{"text": "b"}]', 1, "without a comma, or has no end"),
        ('[{"text": "a"},\n', 2, "Expecting value"),
        ('[{"text": "a"}', 1, "has no end"),
        ('[\n\n{"text": secret}]', 3, "Expecting value"),
        ("[\n" + "[" * 100_000, 2, "too large or too deep"),
    ],
)
def test_a_broken_json_array_stops_with_its_line(tmp_path, text, line, reason):
    path = tmp_path / "rows.json"
    path.write_text(text)
    with pytest.raises(InputError, match=re.escape(f"{path}:{line}")) as caught:
        list(read_rows(path))
    assert reason in str(caught.value)
    assert "secret" not in str(caught.value)


def test_more_after_an_array_and_bytes_that_are_not_utf8(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text("[] []")
    with pytest.raises(InputError, match="more after the array's end"):
        list(read_rows(path))
    path.write_bytes(b'[\n{"text": "\xe9"}]')
    with pytest.raises(InputError, match=re.escape(f"{path}:2: a byte that is not UTF-8")):
        list(read_rows(path))


def test_csv_keeps_text_and_names_lines(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes(
        b'prompt,completion\r\n1.0,NaN\r\n"two\nlines",b\r\nonly one\r\n\r\n"c"d,e\r\nf,\xe9\r\n'
    )
    rows = list(read_rows(path))
    assert [row.where for row in rows] == [f"{path}:{line}" for line in (2, 3, 5, 7, 8)]
    assert rows[0].value == {"prompt": "1.0", "completion": "NaN"}
    assert rows[1].value == {"prompt": "two\nlines", "completion": "b"}
    assert "1 fields (expected 2, as in the header)" in str(rows[2].value)
    assert "bad CSV" in str(rows[3].value)
    assert rows[4].value["completion"] == "\udce9"


def test_csv_bytes_that_are_not_utf8(tmp_path, tokenizer):
    path = tmp_path / "rows.csv"
    path.write_bytes(b"text\nsecret \xe9\n")
    with pytest.raises(InputError, match="DATA-UTF8") as caught:
        load(path, tokenizer)
    assert f"{path}:2: field text is not Unicode text" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "reason"),
    [(b"text,text\na,b\n", "a column name is doubled"), (b"\xef\xbb\xbftext\na\n", "(BOM)")],
)
def test_a_bad_csv_header(tmp_path, text, reason):
    path = tmp_path / "rows.csv"
    path.write_bytes(text)
    with pytest.raises(InputError, match=re.escape(f"{path}:1")) as caught:
        list(read_rows(path))
    assert reason in str(caught.value)


def test_tab_separated_values(tmp_path):
    path = tmp_path / "rows.tsv"
    path.write_text("text\tid\na, b\t1\n")
    assert next(iter(read_rows(path))).value == {"text": "a, b", "id": "1"}


def test_parquet_without_the_nulls_that_arrow_adds(tmp_path):
    path = tmp_path / "rows.parquet"
    messages = [[{"role": "user", "content": "a"}], [{"role": "user", "name": "x"}]]
    pq.write_table(pa.table({"messages": messages, "text": ["a", None]}), path)
    rows = list(read_rows(path))
    assert [row.where for row in rows] == [f"{path}:row 1", f"{path}:row 2"]
    assert [row.value for row in rows] == [
        {"messages": messages[0], "text": "a"},
        {"messages": messages[1]},
    ]


def test_a_damaged_parquet_file(tmp_path):
    path = tmp_path / "rows.parquet"
    path.write_bytes(b"PAR1 and no more")
    with pytest.raises(InputError, match="not a whole Parquet file"):
        list(read_rows(path))


def test_what_datasets_saves_and_holds(tmp_path):
    rows = datasets.Dataset.from_list([{"text": "a"}, {"text": "b"}])
    datasets.DatasetDict({"train": rows, "test": rows.select([1])}).save_to_disk(tmp_path / "both")
    rows.save_to_disk(tmp_path / "one")

    def texts(source, split="train"):
        return [row.value["text"] for row in read_rows(source, split=split)]

    assert texts(rows) == texts(tmp_path / "one") == texts(tmp_path / "both") == ["a", "b"]
    assert texts(tmp_path / "both", "test") == ["b"]
    with pytest.raises(InputError, match=r"no split dev \(expected train, test\)"):
        texts(tmp_path / "both", "dev")


def test_a_folder_has_one_file_a_split(tmp_path):
    (tmp_path / "train.jsonl").write_bytes(GOOD)
    (tmp_path / "test.csv").write_text("text\na\n")
    assert len(list(read_rows(tmp_path))) == len(list(read_rows(tmp_path, split="test"))) == 1
    with pytest.raises(InputError, match=r"no file of split dev in test\.csv, train\.jsonl"):
        read_rows(tmp_path, split="dev")
    (tmp_path / "train.csv").write_text("text\na\n")
    with pytest.raises(InputError, match="several files of split train"):
        read_rows(tmp_path)
    with pytest.raises(InputError, match="split dev of a single file"):
        read_rows(tmp_path / "test.csv", split="dev")


def test_rows_from_memory_have_numbers():
    rows = list(read_rows([{"text": "a"}, "secret"]))
    assert rows[0] == ("row 1", {"text": "a"})
    assert str(rows[1].value).startswith("error[DATA-OBJECT]: row 2: the row is a string")


def test_a_file_that_is_none(tmp_path):
    def refused(name: str, match: str):
        with pytest.raises(InputError, match=match) as caught:
            read_rows(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)

    refused("absent.jsonl", "no such file")
    (tmp_path / "rows.xlsx").write_bytes(b"PK")
    refused("rows.xlsx", r"unknown suffix '\.xlsx' \(expected \.jsonl \.json \.csv")
    (tmp_path / "empty.jsonl").write_bytes(b"")
    refused("empty.jsonl", "the file is empty")
    (tmp_path / "lfs.jsonl").write_text("version https://git-lfs.github.com/spec/v1\noid x\n")
    refused("lfs.jsonl", "a Git LFS pointer")
    os.mkfifo(tmp_path / "pipe.jsonl")  # opening it would block for ever
    refused("pipe.jsonl", "not a regular file")


def test_a_row_of_fifty_megabytes(tmp_path, tokenizer):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"text": "s" * 50_000_000}) + "\n" + GOOD.decode())
    with pytest.raises(InputError, match=f"{path}:1: a line of more than 16,777,216 bytes"):
        load(path, tokenizer)
