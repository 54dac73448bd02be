"""Byte-level tokenizers from GGUF metadata: how text is cut, what is added, bad metadata."""

import pytest
from tokenizers import pre_tokenizers

from qlora_jax.data.gguf_tokenizer import CUTS, gguf_tokenizer
from qlora_jax.data.tokenizer import load_tokenizer
from qlora_jax.errors import InputError

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())


def tiny(pre: str = "gpt-2", **keys) -> dict:
    """A GGUF's metadata: all bytes, `th`, `the`, and two special tokens."""
    tokens = ["<s>", "</s>", *ALPHABET, "th", "the", "Ġthe"]
    metadata = {
        "general.architecture": "llama",
        "llama.context_length": 128,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3] + [1] * (len(tokens) - 2),
        "tokenizer.ggml.merges": ["t h", "th e"],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
    }
    return metadata | {f"tokenizer.ggml.{key}": value for key, value in keys.items()}


BY_DIGIT = ["I", "'ll", "Ġpay", "Ġ", "1", "2", "3", "4", "5", "!!", "ĠĠĊ", "Ġok"]
BY_THREE = ["I", "'ll", "Ġpay", "Ġ", "123", "45", "!!", "ĠĠĊ", "Ġok"]


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("gpt-2", ["I", "'ll", "Ġpay", "Ġ12345", "!!", "ĠĠĊ", "Ġok"]),
        *((pre, BY_DIGIT) for pre in ("smollm", "starcoder", "refact", "qwen2")),
        *((pre, BY_THREE) for pre in ("llama-bpe", "llama3", "llama-v3", "dbrx", "smaug-bpe")),
        ("deepseek-r1-qwen", BY_DIGIT),
        ("gpt-4o", ["I'll", "Ġpay", "Ġ", "123", "45", "!!", "ĠĠĊ", "Ġok"]),
        ("tekken", ["I", "'ll", "Ġpay", "Ġ", "1", "2", "3", "4", "5", "!!", "ĠĠĊ", "Ġok"]),
    ],
)
def test_how_each_model_cuts_text(pre, pieces):
    tokenizer = gguf_tokenizer(tiny(pre), "x.gguf")
    cut = tokenizer.pre_tokenizer.pre_tokenize_str("I'll pay 12345!!  \n ok")
    assert [piece for piece, _ in cut] == pieces


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("gpt-4o", ["get", "HTTPResponse", "Ġok", "://\n"]),
        ("tekken", ["get", "HTTPResponse", "Ġok", "://\n"]),
        ("llama-bpe", ["getHTTPResponse", "Ġok", "://\n"]),
    ],
)
def test_who_cuts_words_where_capitals_begin(pre, pieces):
    tokenizer = gguf_tokenizer(tiny(pre), "x.gguf")
    cut = tokenizer.pre_tokenizer.pre_tokenize_str("getHTTPResponse ok://\n")
    assert [piece.replace("Ċ", "\n") for piece, _ in cut] == pieces


def test_every_cut_is_tested():
    marks = test_how_each_model_cuts_text.pytestmark[0].args[1]
    assert {pre for pre, _ in marks} == set(CUTS)


def test_only_qwen_normalizes():
    decomposed = "e\N{COMBINING ACUTE ACCENT}"
    for pre in CUTS:
        tokenizer = load_tokenizer("x.gguf", tiny(pre, add_bos_token=False))
        composed = tokenizer.decode(tokenizer.encode(decomposed)) == "é"
        assert composed == (pre in ("qwen2", "deepseek-r1-qwen"))


@pytest.mark.parametrize(
    ("pre", "keys", "expected"),
    [
        ("gpt-2", {}, ["the"]),
        ("llama-bpe", {}, ["<s>", "the"]),
        ("llama-bpe", {"add_bos_token": False}, ["the"]),
        ("gpt-2", {"add_bos_token": True, "add_eos_token": True}, ["<s>", "the", "</s>"]),
    ],
)
def test_bos_and_eos_are_added_where_the_file_says(pre, keys, expected, tmp_path):
    tokenizer = load_tokenizer("x.gguf", tiny(pre, **keys))
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("the")) == expected
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).encode("the") == tokenizer.encode("the")


@pytest.mark.parametrize("text", ["a b", "<s:1>", "<s>:0", "$A"])
def test_an_added_token_may_be_any_text(text, tmp_path):
    metadata = tiny("llama-bpe", add_eos_token=True)
    metadata["tokenizer.ggml.tokens"][0] = text
    tokenizer = load_tokenizer("x.gguf", metadata)
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("the")) == [text, "the", "</s>"]
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).encode("the") == tokenizer.encode("the")


def test_llama_takes_a_whole_word_that_no_merge_makes():
    def pieces(pre: str) -> list[str]:
        return gguf_tokenizer(tiny(pre, add_bos_token=False), "x.gguf").encode(" the").tokens

    assert pieces("gpt-2") == ["Ġ", "the"]
    assert pieces("llama-bpe") == ["Ġthe"]


def test_special_and_user_defined_tokens_are_matched_whole():
    metadata = tiny()
    metadata["tokenizer.ggml.token_type"][-3] = 4  # "th" becomes user defined
    tokenizer = load_tokenizer("x.gguf", metadata)
    ids = tokenizer.encode("<s>the")
    assert tokenizer.convert_ids_to_tokens(ids) == ["<s>", "th", "e"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "the"


BAD_METADATA = [
    ("WordPiece", "TOK-TYPE", {"model": "bert"}),
    ("flag a number", "TOK-TYPE", {"add_bos_token": 1}),
    ("no model", "TOK-TYPE", {"model": None}),
    ("unknown cut", "TOK-TYPE", {"pre": "gpt-5"}),
    ("no cut", "TOK-TYPE", {"pre": None}),
    ("tokens a number", "TOK-TYPE", {"tokens": 5}),
    ("no merges", "TOK-TYPE", {"merges": None}),
    ("doubled token", "TOK-VOCAB", {"tokens": ["a", "a"]}),
    ("empty token", "TOK-VOCAB", {"tokens": ["a", ""]}),
    ("tokens not text", "TOK-VOCAB", {"tokens": ["a", 5]}),
    ("too few types", "TOK-VOCAB", {"token_type": [1]}),
    ("bos out of range", "TOK-VOCAB", {"bos_token_id": 1 << 31}),
    ("bos without id", "TOK-VOCAB", {"bos_token_id": None, "add_bos_token": True}),
    ("merge of three", "TOK-MERGES", {"merges": ["t h e"]}),
    ("merge of nothing", "TOK-MERGES", {"merges": [" t"]}),
    ("merge to no token", "TOK-MERGES", {"merges": ["q z"]}),
    ("merge of no token", "TOK-MERGES", {"merges": ["tha t"]}),
]


@pytest.mark.parametrize(("code", "keys"), [r[1:] for r in BAD_METADATA], ids=lambda v: str(v)[:40])
def test_bad_metadata_is_refused(code, keys):
    with pytest.raises(InputError, match=r"x\.gguf") as caught:
        load_tokenizer("x.gguf", tiny(**keys))
    assert caught.value.code == code


def test_messages_name_the_value_and_the_choices():
    with pytest.raises(InputError, match=r"'gpt-5' \(expected one of: gpt-2, smollm, starcoder"):
        load_tokenizer("x.gguf", tiny("gpt-5"))


def test_more_ids_than_the_model_has_rows_are_refused():
    count = len(tiny()["tokenizer.ggml.tokens"])
    load_tokenizer("x.gguf", tiny(), vocab_size=count)
    with pytest.raises(InputError, match=f"ids go up to {count - 1}") as caught:
        load_tokenizer("x.gguf", tiny(), vocab_size=count - 1)
    assert caught.value.code == "TOK-VOCAB"
