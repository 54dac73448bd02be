"""A tokenizer as GGUF metadata: `gguf_tokenizer` undone, and asked whether it gives the same ids.

llama.cpp cuts text by the name `tokenizer.ggml.pre`, so a tokenizer whose cut has no name there is
refused: a guess gives other tokens than the model was trained on, and nothing would show it.

    gpt2    byte-level BPE: tokens, merges, the name of the cut
    llama   SentencePiece's BPE: tokens with scores, where the higher score is merged first
"""

import json
from itertools import groupby
from typing import TYPE_CHECKING, Any

from qlora_jax.data.gguf_sentencepiece import (
    BYTE,
    BYTES,
    CONTROL,
    NORMAL,
    SPACE,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    merges_of,
)
from qlora_jax.data.gguf_tokenizer import (
    CUTS,
    KEEP_SPACES,
    Cut,
    checked_vocabulary,
    gguf_tokenizer,
    pre_tokenizer,
    swallows_spaces,
)
from qlora_jax.errors import InputError, listed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

ADDED_SCORE, UNUSED_SCORE = -1000.0, -10000.0  # llama.cpp's
FOLDER = "the model's folder itself, served by transformers"
# Text whose ids must be the same before and after: scripts, digits, spaces, contractions, symbols.
PROBES = (
    "Hello world! I've 'told' HE'LL they're 3 33 333 3333 1234567 3.14 x1y22",
    " leading, trailing  \n\n \n\t\ttabs    four\r\nlines\n",
    "für Ærø, Привет мир, 你好世界, 日本語テスト, नमस्ते, مرحبا, ខ្មែរ, 한국어",
    "🚀🦙 👩‍👩‍👧 e\u0301 vs é, x²≥½ …“quoted”—dash --== `code_here()`; //!? \u00a0nbsp \u3000wide",
    "",
    "a",
)


def gguf_vocabulary(
    tokenizer: "PreTrainedTokenizerFast", vocab_size: int, where: str, name: str = ""
) -> tuple[dict[str, Any], list[str]]:
    """The metadata keys of a tokenizer, and what is to be said about them.

    Args:
      tokenizer: as `load_tokenizer` gives it.
      vocab_size: rows of the model's embedding; missing ids become [PADn], as in llama.cpp.
      where: the tokenizer's folder, for errors.
      name: the file's `general.name`, by which llama.cpp knows a Phi 3.

    Raises:
      InputError: TOK-GGUF for a tokenizer that llama.cpp would compute otherwise.
    """
    document = json.loads(tokenizer.backend_tokenizer.to_str())
    model = document["model"]
    if model["type"] != "BPE":
        raise refusal(where, f"the model is {model['type']}", "BPE")
    tokens, types = tokens_and_types(document, vocab_size)
    own = sentencepiece_keys(document, tokens, types, where) if model["byte_fallback"] else None
    own = byte_level_keys(document, where) if own is None else own
    metadata = {
        **{key: own.pop(key) for key in ("tokenizer.ggml.model", "tokenizer.ggml.pre")},
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        **own,
        **special_token_keys(tokenizer),
        **added_at_the_ends(tokenizer, where),
        **templates(tokenizer),
    }
    notes = space_notes(document, name)
    probes = [probe for probe in PROBES if not (notes and probe.startswith(" "))]
    refuse_other_ids(tokenizer, metadata, probes, where)
    return metadata, notes


def tokens_and_types(document: dict[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    """Text and llama.cpp's type of every id."""
    model = document["model"]
    tokens = [f"[PAD{index}]" for index in range(vocab_size)]
    types = [UNUSED] * vocab_size
    for token, index in model["vocab"].items():
        tokens[index] = token
        is_byte = model["byte_fallback"] and token in BYTES
        types[index] = BYTE if is_byte else UNKNOWN if token == model["unk_token"] else NORMAL
    for added in document["added_tokens"]:
        token, index = added["content"], added["id"]
        special = added["special"] or looks_special(token)
        tokens[index] = token if special else token.replace(SPACE, " ")
        if types[index] != UNKNOWN:
            types[index] = CONTROL if special else USER_DEFINED
    return tokens, types


def looks_special(token: str) -> bool:
    """llama.cpp's rule for added tokens that their model forgot to mark as special."""
    if token in ("<pad>", "<mask>", "<2mass>", "[@BOS@]"):
        return True
    ends = (("<|", "|>"), ("<\uff5c", "\uff5c>"), ("<unused", ">"))
    return any(token.startswith(first) and token.endswith(last) for first, last in ends)


def byte_level_keys(document: dict[str, Any], where: str) -> dict[str, Any]:
    """The keys of a byte-level BPE."""
    parts = [plain(document["normalizer"]), plain(document["pre_tokenizer"])]
    whole_words = document["model"]["ignore_merges"]
    names = [name for name, cut in CUTS.items() if parts_of(cut) == parts]
    names = [name for name in names if CUTS[name].whole_words == whole_words]
    if not names:
        found = f"unknown normalizer and pre-tokenizer {json.dumps(parts)[:300]}"
        raise refusal(where, found, f"those that llama.cpp calls {listed(CUTS)}")
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": names[0],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in document["model"]["merges"]],
    }


def parts_of(cut: Cut) -> list[list[dict[str, Any]]]:
    """Normalizer and pre-tokenizer of a cut, as `plain` gives those of a tokenizer.json."""
    steps = json.loads(pre_tokenizer(cut).__getstate__())
    return [[{"type": "NFC"}] if cut.nfc else [], plain(steps)]


def plain(part: Any) -> list[dict[str, Any]]:
    """A component as the list of its steps, without what only moves offsets."""
    if part is None:
        return []
    if part["type"] == "Sequence":
        inner = next(value for value in part.values() if isinstance(value, list))
        return [step for one in inner for step in plain(one)]
    return [{key: value for key, value in part.items() if key != "trim_offsets"}]


def sentencepiece_keys(
    document: dict[str, Any], tokens: list[str], types: list[int], where: str
) -> dict[str, Any]:
    """The keys of SentencePiece's BPE; a token's score says when it is merged."""
    steps = [*plain(document["normalizer"]), *plain(document["pre_tokenizer"])]
    words = not any(SPACE in t[1:] for t, kind in zip(tokens, types, strict=True) if kind == NORMAL)
    if not steps or not all(is_space_step(step, words) for step in steps):
        found = f"unknown normalizer or pre-tokenizer {json.dumps(steps)[:300]}"
        raise refusal(where, found, f"{SPACE} for each space, as in SentencePiece")
    merges = [tuple(pair) for pair in document["model"]["merges"]]
    scores = scores_of(merges, tokens, types)
    refuse_other_merges(merges, checked_vocabulary(tokens, where), types, scores, where)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.add_space_prefix": any(map(adds_space, steps)),
    }


def scores_of(merges: list[tuple[str, str]], tokens: list[str], types: list[int]) -> list[float]:
    """A score for each token: the sooner it is merged, the higher."""
    ranks: dict[str, int] = {}
    for left, right in merges:
        ranks.setdefault(left + right, len(ranks))
    others = {UNKNOWN: 0.0, BYTE: 0.0, UNUSED: UNUSED_SCORE}
    return [
        -float(ranks.get(token, len(ranks))) if kind == NORMAL else others.get(kind, ADDED_SCORE)
        for token, kind in zip(tokens, types, strict=True)
    ]


def refuse_other_merges(
    merges: list[tuple[str, str]],
    vocabulary: dict[str, int],
    types: list[int],
    scores: list[float],
    where: str,
) -> None:
    """Scores say neither that two tokens are not merged, nor that one has two places in a row."""
    wanted = set(merges)
    for left, right in merges_of(vocabulary, types, scores, where):
        if (left, right) not in wanted:
            found = f"llama.cpp would merge {left!r} and {right!r} too"
            raise refusal(where, found, "a merge for every cut of a token, as in SentencePiece")
    normal = {token for token, index in vocabulary.items() if types[index] == NORMAL}
    runs = [token for token, _ in groupby(left + right for left, right in merges)]
    runs = [token for token in runs if token in normal]
    if len(runs) != len(set(runs)):
        expected = "the merges of a token side by side, as in SentencePiece"
        raise refusal(where, "merges of a token lie apart", expected)


def is_space_step(step: dict[str, Any], words: bool) -> bool:
    """Whether a step does no more than SentencePiece does to spaces.

    `words` says that no token goes on behind a space, so that a text may be split there.
    """
    kind = step["type"]
    if kind == "Replace":
        return step["pattern"] == {"String": " "} and step["content"] == SPACE
    if kind == "Split":  # Gemma's: no spaces are left to split at
        return step["pattern"] == {"String": " "}
    if kind == "Metaspace":
        return step["replacement"] == SPACE and (words or not step["split"])
    return kind == "Prepend" and step["prepend"] == SPACE


def adds_space(step: dict[str, Any]) -> bool:
    """Whether a step puts a space before the text."""
    return step["type"] == "Prepend" or step.get("prepend_scheme", "never") != "never"


def space_notes(document: dict[str, Any], name: str) -> list[str]:
    """Spaces that llama.cpp has no key for."""
    notes = []
    schemes = [step.get("prepend_scheme") for step in plain(document["pre_tokenizer"])]
    if "first" in schemes or "always" in schemes:
        notes.append("llama.cpp puts a space before texts that begin with one, too")
    if "first" in schemes:
        notes.append("llama.cpp puts a space after special tokens too, not only before the text")
    added = document["added_tokens"]
    swallow = {token["content"] for token in added if token["lstrip"] or token["rstrip"]}
    if swallows_spaces({"general.name": name}):
        swallow ^= {token["content"] for token in added} - set(KEEP_SPACES)
    if swallow:
        notes.append(f"llama.cpp takes spaces beside these otherwise: {listed(sorted(swallow))}")
    return notes


def special_token_keys(tokenizer: "PreTrainedTokenizerFast") -> dict[str, int]:
    """The ids that have a role."""
    roles = {
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "unknown": tokenizer.unk_token_id,
        "padding": tokenizer.pad_token_id,
    }
    found = {role: index for role, index in roles.items() if index is not None}
    return {f"tokenizer.ggml.{role}_token_id": index for role, index in found.items()}


def added_at_the_ends(tokenizer: "PreTrainedTokenizerFast", where: str) -> dict[str, bool]:
    """Whether BOS and EOS are put around a text, seen in what they do."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    ids = tokenizer("a")["input_ids"]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    first = len(ids) > len(bare) and ids[0] == bos
    last = len(ids) > len(bare) + first and ids[-1] == eos
    if ids != [bos] * first + bare + [eos] * last:
        found = f"adds special tokens to a text: {ids} of {bare}"
        raise refusal(where, found, "BOS before it and EOS after it, or neither")
    return {"tokenizer.ggml.add_bos_token": first, "tokenizer.ggml.add_eos_token": last}


def templates(tokenizer: "PreTrainedTokenizerFast") -> dict[str, Any]:
    """The chat template, or several by name."""
    found = tokenizer.chat_template
    if found is None:
        return {}
    if isinstance(found, str):
        return {"tokenizer.chat_template": found}
    named = {name: text for name, text in found.items() if name != "default"}
    keys = {f"tokenizer.chat_template.{name}": text for name, text in named.items()}
    if named:
        keys["tokenizer.chat_templates"] = list(named)
    return keys | ({"tokenizer.chat_template": found["default"]} if "default" in found else {})


def refuse_other_ids(
    tokenizer: "PreTrainedTokenizerFast", metadata: dict[str, Any], probes: list[str], where: str
) -> None:
    """Reads the keys as a tokenizer again: it must give the same ids."""
    again = gguf_tokenizer(metadata, where)
    for probe in (*probes, *tokenizer.all_special_tokens):
        ids, expected = again.encode(probe).ids, tokenizer(probe)["input_ids"]
        if ids != expected:
            found = f"{probe!r:.60} would become {ids[:20]} in llama.cpp"
            raise refusal(where, found, f"{expected[:20]}")


def refusal(where: str, found: str, expected: str) -> InputError:
    """The error for a tokenizer that GGUF cannot say."""
    return InputError("TOK-GGUF", where, found, expected, FOLDER)
