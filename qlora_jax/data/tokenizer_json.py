"""tokenizer.json, checked before the tokenizers library sees it: crafted files make that panic."""

import base64
import binascii
import json
import math
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from qlora_jax.errors import InputError

MAX_BYTES = 64 << 20
MAX_TOKENS = 1 << 21
DICT_MODELS = ("BPE", "WordPiece", "WordLevel")


def check_tokenizer_json(path: Path) -> None:
    """Refuses a tokenizer.json that is malformed, or that would crash or exhaust its reader.

    Raises:
      InputError: TOK-FILE, -SIZE, -JSON, -TYPE, -VOCAB, -MERGES, -ADDED or -PART.
    """
    where = str(path)
    document = read_object(path, MAX_BYTES)
    model = document.get("model")
    if not isinstance(model, dict):
        raise InputError("TOK-TYPE", where, "has no model", "an object named model")
    kind = model.get("type") or implied_type(model)
    vocabulary = model.get("vocab")
    if kind in DICT_MODELS:
        check_ids(vocabulary, where)
        if kind == "BPE":
            if model.get("continuing_subword_prefix"):
                raise InputError("TOK-MERGES", where, "continuing_subword_prefix is not read")
            check_merges(vocabulary, pairs(model.get("merges"), where), where)
    elif kind == "Unigram":
        check_scores(vocabulary, where)
    else:
        raise InputError("TOK-TYPE", where, f"model type {kind!r}", "BPE, Unigram, WordPiece")
    check_added(document.get("added_tokens", []), where)
    for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        for component in objects(document.get(part)):
            check_component(component, where)


def read_object(path: Path, limit: int) -> dict[str, Any]:
    """The JSON object in a regular file of at most `limit` bytes, without doubled keys or NaN."""
    where = str(path)
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe must not block
    except OSError as error:
        raise InputError("TOK-FILE", where, f"cannot be opened: {error.strerror}") from None
    with open(handle, "rb") as file:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise InputError("TOK-FILE", where, "is not a regular file")
        if status.st_size > limit:
            raise InputError("TOK-SIZE", where, "is too large", f"at most {limit} bytes")
        text = file.read(status.st_size)
    try:
        document = json.loads(text, object_pairs_hook=unique, parse_constant=no_constant)
    except (ValueError, RecursionError) as error:
        raise InputError("TOK-JSON", where, f"is not strict JSON: {error}") from None
    if not isinstance(document, dict):
        raise InputError("TOK-JSON", where, f"is a JSON {type(document).__name__}", "an object")
    return document


def unique(items: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, refused when a key comes twice."""
    table = dict(items)
    if len(table) != len(items):
        seen: set[str] = set()
        doubled = next(key for key, _ in items if key in seen or seen.add(key))
        raise ValueError(f"doubled key {doubled!r}")
    return table


def no_constant(name: str) -> float:
    """Refuses NaN and Infinity."""
    raise ValueError(f"{name} is not a JSON number")


def implied_type(model: dict[str, Any]) -> str:
    """The type of a model that names none, as old files do; tokenizers tries in this order."""
    if "merges" in model:
        return "BPE"
    return "Unigram" if isinstance(model.get("vocab"), list) else "WordPiece"


def check_ids(vocabulary: Any, where: str) -> None:
    """Refuses a token-to-id table with ids that are doubled, negative, huge or no integers."""
    if not isinstance(vocabulary, dict) or not 0 < len(vocabulary) <= MAX_TOKENS:
        found = "the vocabulary is missing, empty or too large"
        raise InputError("TOK-VOCAB", where, found, f"1 to {MAX_TOKENS} tokens")
    for token, index in vocabulary.items():
        if type(index) is not int or not 0 <= index < MAX_TOKENS:
            found = f"token {token!r} has the id {index!r}"
            raise InputError("TOK-VOCAB", where, found, f"an integer from 0 to {MAX_TOKENS - 1}")
    if len(set(vocabulary.values())) != len(vocabulary):
        raise InputError("TOK-VOCAB", where, "two tokens have the same id", "unique ids")


def pairs(merges: Any, where: str) -> Iterator[tuple[str, str]]:
    """The merges, written `"a b"` or `["a", "b"]`, as pairs."""
    if not isinstance(merges, list):
        raise InputError("TOK-MERGES", where, "has no list of merges")
    for index, merge in enumerate(merges):
        parts = merge.split(" ") if isinstance(merge, str) else merge
        good = isinstance(parts, list) and len(parts) == 2
        if not good or not all(isinstance(part, str) and part for part in parts):
            raise InputError("TOK-MERGES", where, f"merge {index} is {merge!r:.80}", "two tokens")
        yield parts[0], parts[1]


def check_merges(vocabulary: dict[str, int], merges: Iterable[tuple[str, str]], where: str) -> None:
    """Refuses a merge of which a part, or the result, is no token."""
    for index, (left, right) in enumerate(merges):
        for token in (left, right, left + right):
            if token not in vocabulary:
                found = f"merge {index} needs the unknown token {token!r:.80}"
                raise InputError("TOK-MERGES", where, found)


def check_scores(vocabulary: Any, where: str) -> None:
    """Refuses a list of [token, score] with anything else in it."""
    if not isinstance(vocabulary, list) or not 0 < len(vocabulary) <= MAX_TOKENS:
        found = "the vocabulary is missing, empty or too large"
        raise InputError("TOK-VOCAB", where, found, f"1 to {MAX_TOKENS} tokens")
    for index, entry in enumerate(vocabulary):
        good = isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str)
        if not good or type(entry[1]) not in (int, float) or not math.isfinite(entry[1]):
            found = f"token {index} is {entry!r:.80}"
            raise InputError("TOK-VOCAB", where, found, "[text, finite score]")


def check_added(added: Any, where: str) -> None:
    """Refuses added tokens without a text and an id of their own."""
    if not isinstance(added, list) or len(added) > MAX_TOKENS:
        raise InputError("TOK-ADDED", where, "added_tokens is not a list of tokens")
    texts, ids = set(), set()
    for token in added:
        entry = token if isinstance(token, dict) else {}
        text, index = entry.get("content"), entry.get("id")
        good = isinstance(text, str) and text and type(index) is int and 0 <= index < MAX_TOKENS
        if not good or text in texts or index in ids:
            found = f"added token {text!r:.80} has the id {index!r:.80}"
            raise InputError("TOK-ADDED", where, found, "a text and an id of its own")
        texts.add(text)
        ids.add(index)


def objects(part: Any) -> Iterator[dict[str, Any]]:
    """Every object within `part`, itself included; without recursion, whatever its depth."""
    waiting = [part]
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict):
            yield part
            waiting.extend(part.values())
        elif isinstance(part, list):
            waiting.extend(part)


def check_component(component: dict[str, Any], where: str) -> None:
    """Refuses the settings of a tokenizer's part that are known to crash its reader."""
    kind = component.get("type")
    if kind == "FixedLength":
        length = component.get("length", 5)
        if type(length) is not int or length < 1:
            raise InputError("TOK-PART", where, f"FixedLength of {length!r}", "at least 1")
    elif kind == "Precompiled":
        check_charsmap(component.get("precompiled_charsmap"), where)
    elif kind == "TemplateProcessing":
        known = component.get("special_tokens")
        for piece in objects([component.get("single"), component.get("pair")]):
            name = (piece.get("SpecialToken") or {}).get("id") if "SpecialToken" in piece else None
            if name is not None and (not isinstance(known, dict) or name not in known):
                found = f"post_processor names the unknown special token {name!r:.80}"
                raise InputError("TOK-PART", where, found)


def check_charsmap(charsmap: Any, where: str) -> None:
    """Refuses a table whose reader would panic, or end the process for want of memory.

    bytes of the trie, u32 | the trie, u32 each | UTF-8
    """
    try:
        data = base64.b64decode(charsmap, validate=True)
        trie = int.from_bytes(data[:4], "little")
        data[4 + trie :].decode()
        good = len(data) >= 4 and trie % 4 == 0 and 4 + trie <= len(data)
    except (binascii.Error, TypeError, ValueError):
        good = False
    if not good:
        found = "precompiled_charsmap is damaged"
        raise InputError("TOK-PART", where, found, "a table of SentencePiece in base64")
