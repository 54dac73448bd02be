"""A tokenizer from a GGUF file's metadata, as llama.cpp understands it.

    gpt2    byte-level BPE: vocabulary, merges, and the name of how text is cut
    llama   SentencePiece's BPE: a score for each token; Gemma's too

GGUF stores only the name of the cut (`tokenizer.ggml.pre`); the cuts themselves are those of the
models' published tokenizer.json. An unknown name is refused: a guess gives other tokens than the
model was trained on, and nothing would show it.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qlora_jax.data.gguf_sentencepiece import CONTROL, UNKNOWN, USER_DEFINED, sentencepiece
from qlora_jax.data.tokenizer_json import MAX_TOKENS, check_merges, pairs
from qlora_jax.errors import InputError, listed

if TYPE_CHECKING:
    from tokenizers import Tokenizer, processors

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
WORDS = (
    CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
CASED_WORDS = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+ENDING|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*ENDING"
    r"|\p{N}DIGITS| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Cut:
    """How text is cut before BPE.

    Attributes:
      digits: every digit is a piece of its own.
      regex: a piece; None for GPT-2's own.
      nfc: text is normalized to NFC first.
      whole_words: a piece that is a token is taken as it is, whatever the merges say.
      adds_bos: whether BOS is added where the file does not say.
    """

    digits: bool = False
    regex: str | None = None
    nfc: bool = False
    whole_words: bool = False
    adds_bos: bool = False


LLAMA3 = Cut(regex=WORDS.replace("DIGITS", "{1,3}"), whole_words=True, adds_bos=True)
QWEN2 = Cut(regex=WORDS.replace("DIGITS", ""), nfc=True)
GPT4O = CASED_WORDS.replace("ENDING", CONTRACTIONS + "?").replace("DIGITS", "{1,3}")
TEKKEN = CASED_WORDS.replace("ENDING", "").replace("DIGITS", "")

CUTS = {
    "gpt-2": Cut(),
    "smollm": Cut(digits=True),
    "starcoder": Cut(digits=True),
    "refact": Cut(digits=True),
    "llama-bpe": LLAMA3,
    "llama3": LLAMA3,
    "llama-v3": LLAMA3,
    "dbrx": Cut(regex=LLAMA3.regex),  # Phi 4's
    "smaug-bpe": Cut(regex=LLAMA3.regex),
    "gpt-4o": Cut(regex=GPT4O),  # Phi 4 mini's
    "tekken": Cut(regex=TEKKEN, whole_words=True, adds_bos=True),
    "qwen2": QWEN2,
    "deepseek-r1-qwen": QWEN2,
}
MODELS = ("gpt2", "llama")
SENTENCEPIECE_IDS = {"bos": 1, "eos": 2, "unknown": 0}  # llama.cpp's, where a file names none
# llama.cpp lets Phi 3's special tokens swallow the spaces behind them, but for these.
KEEP_SPACES = ("<unk>", "<s>", "<|endoftext|>")


def gguf_special_tokens(metadata: dict[str, Any], where: str) -> dict[str, str]:
    """`bos_token`, `eos_token`, `unk_token`, `pad_token`: those that the file names, as text."""
    tokens = typed(metadata, "tokens", list, where)
    ids = ids_by_role(metadata, len(tokens), where)
    fields = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    return {f"{field}_token": tokens[ids[key]] for field, key in fields.items() if key in ids}


def ids_by_role(metadata: dict[str, Any], count: int, where: str) -> dict[str, int]:
    """Ids of `bos`, `eos`, `unknown`, `padding`: those that the file names."""
    defaults = SENTENCEPIECE_IDS if metadata.get("tokenizer.ggml.model") == "llama" else {}
    ids = {}
    for key in ("bos", "eos", "unknown", "padding"):
        index = metadata.get(f"tokenizer.ggml.{key}_token_id", defaults.get(key))
        if index is None:
            continue
        if type(index) is not int or not 0 <= index < count:
            found = f"tokenizer.ggml.{key}_token_id is {index!r:.80}"
            raise InputError("TOK-VOCAB", where, found, f"0 to {count - 1}")
        ids[key] = index
    return ids


def gguf_tokenizer(metadata: dict[str, Any], where: str) -> "Tokenizer":
    """The `tokenizers.Tokenizer` of a GGUF file.

    Args:
      metadata: the file's keys; read are `tokenizer.ggml.*`, and `general.name` for Phi 3, whose
        special tokens swallow spaces.
      where: the file, for messages.

    Raises:
      InputError: TOK-TYPE for another model than BPE or an unknown cut, TOK-VOCAB, TOK-MERGES for
        an inconsistent vocabulary.
    """
    from tokenizers import AddedToken

    model = typed(metadata, "model", str, where)
    if model not in MODELS:
        hint = "the model's folder with its tokenizer.json"
        expected = "gpt2 or llama (BPE)"
        raise InputError("TOK-TYPE", where, f"tokenizer model {model!r:.80}", expected, hint)
    vocabulary = checked_vocabulary(typed(metadata, "tokens", list, where), where)
    types = per_token(metadata, "token_type", len(vocabulary), where)
    if model == "llama":
        tokenizer = from_scores(metadata, vocabulary, types, where)
    else:
        tokenizer = byte_level(metadata, vocabulary, where)
    swallow = swallows_spaces(metadata)
    whole = [
        AddedToken(
            token,
            special=kind != USER_DEFINED,
            normalized=False,
            rstrip=swallow and token not in KEEP_SPACES,
        )
        for token, kind in zip(vocabulary, types, strict=True)
        if kind in (UNKNOWN, CONTROL, USER_DEFINED)
    ]
    tokenizer.add_tokens(whole)
    return tokenizer


def swallows_spaces(metadata: dict[str, Any]) -> bool:
    """llama.cpp's rule: a Phi 3, by the name that its file bears."""
    name = str(metadata.get("general.name", "")).lower()
    return "phi-3" in name or "phi3" in name


def byte_level(metadata: dict[str, Any], vocabulary: dict[str, int], where: str) -> "Tokenizer":
    """GPT-2's kind: text is cut, and the bytes of a piece are merged."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors

    name = typed(metadata, "pre", str, where)
    if name not in CUTS:
        found = f"unknown tokenizer.ggml.pre {name!r:.80}"
        raise InputError("TOK-TYPE", where, found, f"one of: {listed(CUTS)}")
    cut = CUTS[name]
    merges = list(pairs(typed(metadata, "merges", list, where), where))
    check_merges(vocabulary, merges, where)
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=cut.whole_words))
    if cut.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizer(cut)
    tokenizer.decoder = decoders.ByteLevel()
    bytes_first = processors.ByteLevel(trim_offsets=False)
    ends = added_ends(metadata, cut.adds_bos, len(vocabulary), where)
    tokenizer.post_processor = processors.Sequence([bytes_first, ends]) if ends else bytes_first
    return tokenizer


def from_scores(
    metadata: dict[str, Any], vocabulary: dict[str, int], types: list[int], where: str
) -> "Tokenizer":
    """SentencePiece's kind: the whole text is merged."""
    for key in ("remove_extra_whitespaces", "precompiled_charsmap"):
        if metadata.get(f"tokenizer.ggml.{key}"):
            found = f"tokenizer.ggml.{key} is set"
            raise InputError("TOK-TYPE", where, found, "text that enters as it is")
    scores = per_token(metadata, "scores", len(vocabulary), where)
    space_first = flag(metadata, "add_space_prefix", True, where)
    unknown = gguf_special_tokens(metadata, where).get("unk_token")
    tokenizer = sentencepiece(vocabulary, types, scores, unknown, space_first, where)
    if ends := added_ends(metadata, True, len(vocabulary), where):
        tokenizer.post_processor = ends
    return tokenizer


def typed(metadata: dict[str, Any], key: str, kind: type, where: str) -> Any:
    """The value of `tokenizer.ggml.KEY`, of exactly the type `kind`."""
    value = metadata.get(f"tokenizer.ggml.{key}")
    if type(value) is not kind:
        found = "is missing" if value is None else f"is {type(value).__name__} {value!r:.80}"
        raise InputError("TOK-TYPE", where, f"tokenizer.ggml.{key} {found}", kind.__name__)
    return value


def checked_vocabulary(tokens: list, where: str) -> dict[str, int]:
    """Token to id; texts are unique and not empty."""
    vocabulary = {token: index for index, token in enumerate(tokens) if isinstance(token, str)}
    if len(vocabulary) != len(tokens) or "" in vocabulary or not 0 < len(tokens) <= MAX_TOKENS:
        found = f"{len(tokens)} tokens, {len(vocabulary)} different texts"
        raise InputError("TOK-VOCAB", where, found, f"1 to {MAX_TOKENS} different, none empty")
    return vocabulary


def per_token(metadata: dict[str, Any], key: str, count: int, where: str) -> list:
    """An array that has an entry for every token."""
    values = typed(metadata, key, list, where)
    if len(values) != count:
        found = f"tokenizer.ggml.{key} has {len(values)} entries"
        raise InputError("TOK-VOCAB", where, found, str(count))
    return values


def flag(metadata: dict[str, Any], key: str, default: bool, where: str) -> bool:
    """The value of `tokenizer.ggml.KEY`, true or false."""
    return typed({f"tokenizer.ggml.{key}": default, **metadata}, key, bool, where)


def pre_tokenizer(cut: Cut) -> Any:
    """The cut as tokenizers' own components."""
    from tokenizers import Regex, pre_tokenizers

    if cut.regex is not None:
        first = pre_tokenizers.Split(Regex(cut.regex), behavior="isolated", invert=False)
        last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        return pre_tokenizers.Sequence([first, last])
    last = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if cut.digits:
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), last])
    return last


def added_ends(
    metadata: dict[str, Any], adds_bos: bool, count: int, where: str
) -> "processors.TemplateProcessing | None":
    """Adds BOS, and EOS, where the file asks for it; `adds_bos` is what no word of it means."""
    from tokenizers import processors

    tokens, ids = metadata["tokenizer.ggml.tokens"], ids_by_role(metadata, count, where)
    single, special = "$A", []  # by role: a token's own text could read as a part of a template
    for field, default in (("bos", adds_bos), ("eos", False)):
        if not flag(metadata, f"add_{field}_token", default, where):
            continue
        if field not in ids:
            found = f"add_{field}_token is set without {field}_token_id"
            raise InputError("TOK-VOCAB", where, found)
        single = "bos $A" if field == "bos" else f"{single} eos"
        special.append({"id": field, "ids": [ids[field]], "tokens": [tokens[ids[field]]]})
    return processors.TemplateProcessing(single=single, special_tokens=special) if special else None
