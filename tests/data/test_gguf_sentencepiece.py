"""SentencePiece vocabularies in GGUF; expected pieces are those of the sentencepiece library."""

import itertools
import time
import tracemalloc

import pytest

from qlora_jax.data import gguf_sentencepiece as module
from qlora_jax.data.gguf_sentencepiece import BYTES
from qlora_jax.data.gguf_tokenizer import gguf_tokenizer
from qlora_jax.data.tokenizer import load_tokenizer
from qlora_jax.errors import InputError

# By falling score.
LINES = (
    "▁the ▁t he ▁a in ▁▁ ▁▁▁▁ th ▁th ing an ana aa aaa aaaa ab ba aba bab é llo ▁he ello ▁hello "
    "l o ▁ t h e a i n g b \n s 🚀 lo ll el hel < s> > 1 2 12"
)
PIECES = LINES.split(" ")
USER_DEFINED = ("  ", "   ", "    ", "<table>", "\n\n", "\n")  # Gemma's are of this kind

# (text, pieces with a space first, as Llama has it, pieces of Gemma's kind); sentencepiece 0.2.3,
# identity normalizer, byte fallback.
PINNED = [
    ("", "", ""),
    ("the hello thing", "▁the ▁hello ▁th ing", "t he ▁hello ▁th ing"),
    (" the", "▁ ▁the", "▁the"),
    (" ", "▁▁", "▁"),
    ("  ", "▁▁ ▁", "[2]"),
    ("the  thing", "▁the ▁ ▁th ing", "t he [2] th ing"),
    ("     hello", "▁▁▁▁ ▁▁ he llo", "[4] ▁hello"),
    ("aaaaaaa", "▁a aaaa aa", "aaaa aaa"),
    ("ababab", "▁a bab ab", "ab ab ab"),
    ("bababa ababa", "▁ bab aba ▁a b aba", "bab aba ▁a b aba"),
    ("banana", "▁ b an ana", "b an ana"),
    ("hellohello", "▁hello he llo", "he llo he llo"),
    ("é e\u0301", "▁ é ▁ e <0xCC> <0x81>", "é ▁ e <0xCC> <0x81>"),
    ("🚀🚀x", "▁ 🚀 🚀 <0x78>", "🚀 🚀 <0x78>"),
    ("a\nb\n\n", "▁a \n b \n \n", "a \n b \n\n"),
    ("s>/<", "▁ s> <0x2F> <", "s> <0x2F> <"),
    ("12 121", "▁ 12 ▁ 12 1", "12 ▁ 12 1"),
    ("\tthe", "▁ <0x09> t he", "<0x09> t he"),
    ("▁the", "▁ ▁the", "▁the"),
    ("<0x41>", "▁ < <0x30> <0x78> <0x34> 1 >", "< <0x30> <0x78> <0x34> 1 >"),
]


def metadata(user_defined=(), name="", **keys) -> dict:
    special = ["<unk>", "<s>", "</s>", "<|end|>"]
    normal = [piece for piece in PIECES if piece not in user_defined]
    normal = [piece for piece in normal if piece.replace("▁", " ") not in user_defined]
    tokens = [*special, *BYTES, *user_defined, *normal]
    types = [2, 3, 3, 3] + [6] * 256 + [4] * len(user_defined) + [1] * len(normal)
    scores = [0.0] * (len(tokens) - len(normal)) + [-float(PIECES.index(p)) for p in normal]
    own = {"model": "llama", "pre": "default", "tokens": tokens, "token_type": types}
    own |= {"scores": scores, "add_bos_token": False, **keys}
    found = {f"tokenizer.ggml.{k}": value for k, value in own.items() if value is not None}
    return {"general.name": name, **found}


@pytest.mark.parametrize(("text", "llama", "gemma"), PINNED, ids=[repr(row[0]) for row in PINNED])
def test_pieces_are_sentencepieces(text, llama, gemma):
    spaces = {"[2]": "  ", "[4]": "    "}
    expected = [spaces.get(piece, piece) for piece in gemma.split(" ") if piece]
    tokens = gguf_tokenizer(metadata(), "x.gguf").encode(text).tokens
    assert tokens == [piece for piece in llama.split(" ") if piece]
    of_gemma = metadata(USER_DEFINED, add_space_prefix=False)
    assert gguf_tokenizer(of_gemma, "x.gguf").encode(text).tokens == expected


@pytest.mark.parametrize("user_defined", [(), USER_DEFINED])
@pytest.mark.parametrize("text", [row[0] for row in PINNED if "▁" not in row[0]], ids=repr)
def test_a_text_comes_back(text, user_defined):
    keys = metadata(user_defined, add_space_prefix=not user_defined)
    tokenizer = load_tokenizer("x.gguf", keys)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_in_a_text_are_matched_and_a_space_comes_after():
    tokenizer = gguf_tokenizer(metadata(add_bos_token=None, add_eos_token=True), "x.gguf")
    tokens = tokenizer.encode("the</s>the").tokens
    assert tokens == ["<s>", "▁the", "</s>", "▁the", "</s>"]  # as llama.cpp has it
    assert tokenizer.decode(tokenizer.encode("the</s>").ids) == "the"


def test_phi_3s_special_tokens_swallow_spaces():
    text = "the<|end|>\n the<s> the"
    plain = gguf_tokenizer(metadata(name="Llama"), "x.gguf").encode(text).tokens
    assert plain == ["▁the", "<|end|>", "▁", "\n", "▁the", "<s>", "▁", "▁the"]
    phi3 = gguf_tokenizer(metadata(name="Phi3 Mini"), "x.gguf")
    swallowed = [phi3.id_to_token(index) for index in phi3.encode(text).ids]
    assert swallowed == ["▁the", "<|end|>", "▁the", "<s>", "▁", "▁the"]


def test_saved_as_a_folder_and_loaded_again_it_is_the_same(tmp_path):
    tokenizer = load_tokenizer("x.gguf", metadata(USER_DEFINED, name="phi-3", add_bos_token=True))
    tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    for text, _, _ in PINNED:
        assert again.encode(text) == tokenizer.encode(text)
    assert (again.bos_token, again.eos_token, again.unk_token) == ("<s>", "</s>", "<unk>")


def without_a_byte() -> dict:
    keys = metadata()
    keys["tokenizer.ggml.tokens"][4 + 65] = "not a byte"
    return keys


def spoiled(key: str, index: int, value) -> dict:
    keys = metadata()
    keys[f"tokenizer.ggml.{key}"][index] = value
    return keys


BAD = [
    ("no scores", "TOK-TYPE", metadata(scores=None)),
    ("too few scores", "TOK-VOCAB", metadata(scores=[0.0])),
    ("score NaN", "TOK-VOCAB", spoiled("scores", -1, float("nan"))),
    ("score a word", "TOK-VOCAB", spoiled("scores", -1, "1")),
    ("a byte without token", "TOK-VOCAB", without_a_byte()),
    ("a long token", "TOK-VOCAB", spoiled("tokens", -1, "a" * 513)),
    ("an unused token that arises", "TOK-TYPE", spoiled("token_type", -1, 5)),
    ("prefix a number", "TOK-TYPE", metadata(add_space_prefix=1)),
    ("spaces removed", "TOK-TYPE", metadata(remove_extra_whitespaces=True)),
    ("normalized", "TOK-TYPE", metadata(precompiled_charsmap=[1, 2])),
    ("unknown out of range", "TOK-VOCAB", metadata(unknown_token_id=10_000)),
    ("no types", "TOK-TYPE", metadata(token_type=None)),
]


@pytest.mark.parametrize(("code", "keys"), [r[1:] for r in BAD], ids=[r[0] for r in BAD])
def test_bad_metadata_is_refused(code, keys):
    with pytest.raises(InputError, match=r"x\.gguf") as caught:
        load_tokenizer("x.gguf", keys)
    assert caught.value.code == code


def test_tokens_that_only_fill_up_ids_are_allowed():
    keys = metadata()
    for key, value in (("tokens", "[PAD9]"), ("token_type", 5), ("scores", -1e4)):
        keys[f"tokenizer.ggml.{key}"].append(value)
    assert gguf_tokenizer(keys, "x.gguf").encode("the").tokens == ["▁the"]


def with_tokens(more: list[str]) -> dict:
    keys = metadata()
    for key, values in (("tokens", more), ("token_type", [1]), ("scores", [0.0])):
        keys[f"tokenizer.ggml.{key}"] += values if key == "tokens" else values * len(more)
    return keys


@pytest.mark.parametrize(
    ("more", "found"),
    [
        ([f"{i:x}" * 100 for i in range(1 << 14)], r"a token of 400 characters, \d+ in all"),
        (
            ["".join(w) for n in range(1, 11) for w in itertools.product("xy", repeat=n)],
            "more than 1000 merges",
        ),
    ],
)
def test_tokens_made_to_cost_time_and_memory_are_refused(monkeypatch, more, found):
    monkeypatch.setattr(module, "MAX_MERGES", 1000)
    keys = with_tokens(more)
    tracemalloc.start()
    start = time.process_time()
    with pytest.raises(InputError, match=found):
        gguf_tokenizer(keys, "x.gguf")
    assert time.process_time() - start < 2
    assert tracemalloc.get_traced_memory()[1] < 16 << 20
    tracemalloc.stop()
