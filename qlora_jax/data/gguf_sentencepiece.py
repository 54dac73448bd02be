"""SentencePiece's BPE from a GGUF file's scores, as the merges that the tokenizers library wants.

SentencePiece merges the two neighbours whose join is the token with the highest score, the leftmost
ones first. So each token gives one merge for every way to cut it into two tokens:

    score  token         merges
     -1    ▁the          ▁ the, ▁t he
     -2    the           t he
     -3    he            h e
"""

import math
from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING

from qlora_jax.errors import InputError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # llama.cpp's token types
SPACE = "▁"  # stands for a space within tokens
BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))
# Merges are looked for in every cut of every token, which hostile tokens could make long. Gemma's
# 262,144 tokens have up to 31 characters, 1.5 million in all, and 514,906 merges.
MAX_TOKEN, MAX_TEXT, MAX_MERGES = 512, 1 << 22, 1 << 21


def sentencepiece(
    vocabulary: dict[str, int],
    types: list[int],
    scores: list[float],
    unknown: str | None,
    space_first: bool,
    where: str,
) -> "Tokenizer":
    """A `tokenizers.Tokenizer` with the ids of SentencePiece; what it lacks becomes bytes.

    Args:
      vocabulary: token to id, in the order of ids.
      types: llama.cpp's type of every token.
      scores: of every token.
      unknown: the unknown token.
      space_first: whether each text, and each after a special token, gets a space before it.

    Raises:
      InputError: TOK-VOCAB for bytes without a token, scores that are no numbers, texts too long.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers

    missing = [byte for byte in BYTES if vocabulary.get(byte) is None]
    if missing:
        found = f"{len(missing)} bytes have no token, such as {missing[0]}"
        raise InputError("TOK-VOCAB", where, found, "256 tokens <0x00> to <0xFF>")
    merges = merges_of(vocabulary, types, scores, where)
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    before = [normalizers.Prepend(SPACE)] if space_first else []
    tokenizer.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", SPACE)])
    after = [decoders.Strip(" ", 1, 0)] if space_first else []
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *after]
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def merges_of(
    vocabulary: dict[str, int], types: list[int], scores: list[float], where: str
) -> list[tuple[str, str]]:
    """All merges, the best score first.

    Special and user-defined tokens are matched whole before, so no merge leads to one.
    """
    if not all(type(score) in (int, float) and math.isfinite(score) for score in scores):
        raise InputError("TOK-VOCAB", where, "a score is not a finite number")
    tokens = list(vocabulary)
    normal = {token: token for token, kind in zip(tokens, types, strict=True) if kind == NORMAL}
    longest, together = max(map(len, normal), default=0), sum(map(len, normal))
    if longest > MAX_TOKEN or together > MAX_TEXT:
        found = f"a token of {longest} characters, {together} in all"
        expected = f"at most {MAX_TOKEN}, and {MAX_TEXT} in all"
        raise InputError("TOK-VOCAB", where, found, expected)
    for token, kind in zip(tokens, types, strict=True):
        if kind == UNUSED and len(token) <= MAX_TOKEN and any(cuts(token, normal)):
            found = f"the unused token {token!r:.80} could arise from others"
            raise InputError("TOK-TYPE", where, found, "unused tokens that only fill up ids")
    best_first = sorted(normal, key=lambda token: (-scores[vocabulary[token]], vocabulary[token]))
    every = (cut for token in best_first for cut in cuts(token, normal))
    merges = list(islice(every, MAX_MERGES + 1))
    if len(merges) > MAX_MERGES:
        raise InputError("TOK-VOCAB", where, f"more than {MAX_MERGES} merges arise from its tokens")
    return merges


def cuts(token: str, known: dict[str, str]) -> Iterator[tuple[str, str]]:
    """Every way to cut `token` into two that are known, as the strings of `known`: no copies."""
    for at in range(1, len(token)):
        left, right = known.get(token[:at]), known.get(token[at:])
        if left is not None and right is not None:
            yield left, right
