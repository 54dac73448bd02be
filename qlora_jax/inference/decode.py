"""Token by token with a key/value cache: a few programs for prompts, one for every token after.

A prompt goes in by pieces of at most 256 tokens, padded to a power of two, so that prompts of any
length compile five programs at most and no logits (S, V) of a long one exist at once.
"""

import functools
from collections.abc import Collection, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from qlora_jax.adapters.adapter import Adapter
from qlora_jax.errors import InputError, NonFinite
from qlora_jax.inference.sampling import GREEDY, Sampling, sample
from qlora_jax.models.cache import KVCache
from qlora_jax.models.decoder import Decoder

SHORTEST_PIECE, LONGEST_PIECE = 16, 256  # tokens, powers of two
ROOM = 256  # the cache's length is a multiple of it, so that few lengths are compiled
NOT_FINITE = -1  # stands for a token where the logits are NaN or infinite


def generate_tokens(
    model: Decoder,
    prompt: Sequence[int],
    *,
    adapter: Adapter | None = None,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    seed: int = 0,
    stop: Collection[int] = (),
) -> Iterator[int]:
    """New token ids, one at a time as they are computed, until a stop token, which is not given.

    Args:
      model: the base.
      prompt: token ids, at least one.
      adapter: trained on this base.
      max_new_tokens: how many at most.
      sampling: how each is chosen.
      seed: the same seed gives the same tokens.
      stop: ids that end the text.

    Raises:
      InputError: an empty prompt, an id that the model does not have, or too many tokens.
      NonFinite: the model's logits are NaN or infinite.
    """
    check_prompt(model, prompt, max_new_tokens)
    if not -(2**63) <= seed < 2**63:
        raise InputError("GEN-SAMPLING", "seed", f"{seed}", "a whole number of 64 bits")
    pieces = prompt_pieces(prompt)
    room = max(sum(len(ids) for ids, _ in pieces), len(prompt) + max_new_tokens)
    cache = KVCache.create(model.config, 1, -(-room // ROOM) * ROOM, model.dtype)
    penalized = sampling.repetition_penalty != 1
    seen = jnp.zeros((1, model.config.vocab_size), bool) if penalized else None
    root = jax.random.key(seed)
    key = jax.random.fold_in(root, 0)
    for ids, count in pieces:
        token, cache, seen = advance(model, adapter, cache, seen, ids[None], count, key, sampling)
    for number in range(1, max_new_tokens + 1):
        index = int(token[0])
        if index == NOT_FINITE:
            where = f"new token {number}"
            raise NonFinite("GEN-NAN", where, "the model's logits are not finite")
        if index in stop:
            return
        yield index
        if number < max_new_tokens:
            key = jax.random.fold_in(root, number)
            token, cache, seen = advance(model, adapter, cache, seen, token[None], 1, key, sampling)


@functools.partial(jax.jit, static_argnames="sampling", donate_argnames=("cache", "seen"))
def advance(
    model: Decoder,
    adapter: Adapter | None,
    cache: KVCache,
    seen: Bool[Array, "1 V"] | None,
    ids: Int[Array, "1 S"],
    count: Int[Array, ""],
    key: Array,
    sampling: Sampling,
) -> tuple[Int[Array, " 1"], KVCache, Bool[Array, "1 V"] | None]:
    """The token that follows the first `count` of `ids`, and the cache with those in it."""
    real = jnp.arange(ids.shape[1])[None] < count
    logits, cache = model(ids, segment_ids=real.astype(jnp.int32), cache=cache, adapter=adapter)
    last = jax.lax.dynamic_index_in_dim(logits, count - 1, axis=1, keepdims=False)
    if seen is not None:
        seen = seen.at[0, ids[0]].max(real[0])
    token = sample(last, key, sampling, seen)
    return jnp.where(jnp.isfinite(last).all(-1), token, NOT_FINITE), cache, seen


def prompt_pieces(prompt: Sequence[int]) -> list[tuple[Int[np.ndarray, " S"], int]]:
    """(ids padded with 0, how many are real): whole pieces of LONGEST_PIECE, then the rest."""
    pieces = []
    for start in range(0, len(prompt), LONGEST_PIECE):
        real = prompt[start : start + LONGEST_PIECE]
        length = max(SHORTEST_PIECE, 1 << (len(real) - 1).bit_length())
        pieces.append((np.pad(np.array(real, np.int32), (0, length - len(real))), len(real)))
    return pieces


def check_prompt(model: Decoder, prompt: Sequence[int], max_new_tokens: int) -> None:
    """Refuse what would be cut, clamped or extrapolated in silence."""
    config = model.config
    if not len(prompt):
        raise InputError("GEN-EMPTY", "prompt", "no tokens", "at least one")
    if not 0 <= min(prompt) <= max(prompt) < config.vocab_size:
        found = f"token ids {min(prompt)} to {max(prompt)}"
        expected = f"0 to {config.vocab_size - 1}, the model's vocabulary"
        raise InputError("GEN-VOCAB", "prompt", found, expected, "the model's own tokenizer")
    if max_new_tokens < 1:
        raise InputError("GEN-LENGTH", "max_new_tokens", f"{max_new_tokens}", "at least 1")
    if len(prompt) + max_new_tokens > config.max_position_embeddings:
        found = f"{len(prompt)} tokens and max_new_tokens={max_new_tokens} more"
        expected = f"at most {config.max_position_embeddings} in all, the model's positions"
        raise InputError("GEN-LENGTH", "prompt", found, expected)
