"""A byte-level BPE tokenizer from a GGUF file's metadata: vocabulary, merges, and how text is cut.

GGUF stores only the name of the cut (`tokenizer.ggml.pre`); the cuts themselves are those of the
models' published tokenizer.json. An unknown name is refused: a guess gives other tokens than the
model was trained on, and nothing would show it.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qlora_jax.data.tokenizer_json import MAX_TOKENS, check_merges, pairs
from qlora_jax.errors import InputError, listed

if TYPE_CHECKING:
    from tokenizers import Tokenizer

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
WORDS = (
    CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4  # llama.cpp's token types that are matched whole


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


CUTS = {
    "gpt-2": Cut(),
    "smollm": Cut(digits=True),
    "llama-bpe": Cut(regex=WORDS.replace("DIGITS", "{1,3}"), whole_words=True, adds_bos=True),
    "qwen2": Cut(regex=WORDS.replace("DIGITS", ""), nfc=True),
}


def gguf_special_tokens(metadata: dict[str, Any], where: str) -> dict[str, str]:
    """`bos_token`, `eos_token`, `unk_token`, `pad_token`: those that the file names, as text."""
    tokens = typed(metadata, "tokens", list, where)
    special = {}
    for field, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        index = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if index is None:
            continue
        if type(index) is not int or not 0 <= index < len(tokens):
            found = f"tokenizer.ggml.{key}_token_id is {index!r:.80}"
            raise InputError("TOK-VOCAB", where, found, f"0 to {len(tokens) - 1}")
        special[f"{field}_token"] = tokens[index]
    return special


def gguf_tokenizer(metadata: dict[str, Any], where: str) -> "Tokenizer":
    """The `tokenizers.Tokenizer` of a GGUF file.

    Args:
      metadata: the file's keys; read are `tokenizer.ggml.model`, `pre`, `tokens`, `token_type`,
        `merges`, `add_bos_token`, `add_eos_token` and the special ids.
      where: the file, for messages.

    Raises:
      InputError: TOK-TYPE for another model than byte-level BPE or an unknown cut, TOK-VOCAB,
        TOK-MERGES for an inconsistent vocabulary.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    model = typed(metadata, "model", str, where)
    if model != "gpt2":
        hint = "the model's folder with its tokenizer.json"
        raise InputError("TOK-TYPE", where, f"tokenizer model {model!r}", "gpt2 (BPE)", hint)
    name = typed(metadata, "pre", str, where)
    if name not in CUTS:
        found = f"unknown tokenizer.ggml.pre {name!r}"
        raise InputError("TOK-TYPE", where, found, f"one of: {listed(CUTS)}")
    cut = CUTS[name]

    vocabulary = checked_vocabulary(typed(metadata, "tokens", list, where), where)
    merges = list(pairs(typed(metadata, "merges", list, where), where))
    check_merges(vocabulary, merges, where)
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=cut.whole_words))
    if cut.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizer(cut)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = post_processor(cut, metadata, where)
    types = token_types(metadata, len(vocabulary), where)
    whole = [
        AddedToken(token, special=kind != USER_DEFINED, normalized=False)
        for token, kind in zip(vocabulary, types, strict=True)
        if kind in (UNKNOWN, CONTROL, USER_DEFINED)
    ]
    tokenizer.add_tokens(whole)
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


def token_types(metadata: dict[str, Any], count: int, where: str) -> list[int]:
    """llama.cpp's type of every token."""
    types = typed(metadata, "token_type", list, where)
    if len(types) != count:
        found = f"tokenizer.ggml.token_type has {len(types)} entries"
        raise InputError("TOK-VOCAB", where, found, str(count))
    return types


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


def post_processor(cut: Cut, metadata: dict[str, Any], where: str) -> Any:
    """Adds BOS and EOS where the file asks for it."""
    from tokenizers import processors

    special = gguf_special_tokens(metadata, where)
    single, ids = "$A", []
    for field, default in (("bos", cut.adds_bos), ("eos", False)):
        added = metadata.get(f"tokenizer.ggml.add_{field}_token", default)
        if not added:
            continue
        token = special.get(f"{field}_token")
        if token is None:
            found = f"add_{field}_token is set without {field}_token_id"
            raise InputError("TOK-VOCAB", where, found)
        single = f"{token} $A" if field == "bos" else f"{single} {token}"
        ids.append((token, metadata[f"tokenizer.ggml.{field}_token_id"]))
    bytes_first = processors.ByteLevel(trim_offsets=False)
    if not ids:
        return bytes_first
    template = processors.TemplateProcessing(single=single, special_tokens=ids)
    return processors.Sequence([bytes_first, template])
