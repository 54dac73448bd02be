"""Token by token with a key/value cache: a few programs for prompts, one for every token after.

Prompts go in by pieces of at most 256 tokens, padded to a power of two, so that prompts of any
length compile five programs at most, and the head sees one state a row. Rows of a batch have
lengths of their own and never see each other:

    prompts    a b c d e            pieces of 4: a b c d | e . . .      . is padding: the next
               x y                               x y . . | . . . .      token overwrites it
    new tokens f g h, z w                        f g h   and   z w

The device is given the next token's work before the last token is read, so that it never waits for
the reader.
"""

import functools
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from qlora_jax.adapters.adapter import Adapter
from qlora_jax.adapters.prepared import Prepared
from qlora_jax.adapters.stack import AdapterStack, Which
from qlora_jax.errors import InputError, NonFinite
from qlora_jax.inference.sampling import GREEDY, Sampling, sample
from qlora_jax.inference.weights import ForDecoding, for_decoding
from qlora_jax.models.cache import KVCache
from qlora_jax.models.config import ModelConfig
from qlora_jax.models.decoder import Decoder

SHORTEST_PIECE, LONGEST_PIECE = 16, 256  # tokens, powers of two
ROOM = 256  # the cache's length is a multiple of it, so that few lengths are compiled
# On a CPU: each weight is made float32 right before its product. By default XLA begins a layer with
# all of them, and the caches no longer hold the first when its product comes (docs/log.md).
IN_TURN = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
NOT_FINITE = -1  # stands for a token where the logits are NaN or infinite

Prompt = Sequence[int]


class State(NamedTuple):
    """What decoding carries from token to token; its memory is used again.

    Attributes:
      cache: keys and values.
      seen: which tokens each row has, for the repetition penalty; None without one.
      number: of the token that comes next, from 0.
    """

    cache: KVCache
    seen: Bool[Array, "B V"] | None
    number: Int[Array, ""]


def generate_tokens(
    model: Decoder | ForDecoding,
    prompt: Prompt,
    *,
    adapter: Adapter | AdapterStack | None = None,
    adapter_index: Which = None,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    seed: int = 0,
    stop: Collection[int] = (),
    cache_dtype: str = "auto",
    decode_weights: str = "auto",
) -> Iterator[int]:
    """New token ids, one at a time as they are computed, until a stop token, which is not given.

    Args: as of `generate_batch`, for one prompt.
    """
    batch = generate_batch(
        model,
        [prompt],
        adapter=adapter,
        adapter_index=adapter_index,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        seeds=[seed],
        stop=stop,
        cache_dtype=cache_dtype,
        decode_weights=decode_weights,
    )
    return (token for _, token in batch)


def generate_batch(
    model: Decoder | ForDecoding,
    prompts: Sequence[Prompt],
    *,
    adapter: Adapter | AdapterStack | None = None,
    adapter_index: Which = None,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    seeds: Sequence[int] = (0,),
    stop: Collection[int] = (),
    cache_dtype: str = "auto",
    decode_weights: str = "auto",
) -> Iterator[tuple[int, int]]:
    """(row, new token id) as they are computed; a row ends with a stop token, which is not given.

    A row's tokens are those that it would have alone, but that in bfloat16 products of one row and
    of many are rounded otherwise, and that two tokens may be as likely as each other.

    Args:
      model: the base, or what `for_decoding` made of it.
      prompts: of each row token ids, at least one.
      adapter: trained on this base; or a stack of several.
      adapter_index: with a stack, which of them each row uses; see `AdapterStack.index`.
      max_new_tokens: how many at most, a row.
      sampling: how each is chosen.
      seeds: of each row; the same seed gives the same tokens.
      stop: ids that end a row.
      cache_dtype: of keys and values: one of `cache.DTYPES`; auto is the model's own dtype.
      decode_weights: see `for_decoding`.

    Raises:
      InputError: an empty prompt, an id that the model does not have, too many tokens, an adapter
        that is not there.
      NonFinite: the model's logits are NaN or infinite.
    """
    config = (model.base if isinstance(model, ForDecoding) else model).config
    check_prompts(config, prompts, max_new_tokens)
    if len(seeds) != len(prompts):
        found = f"{len(seeds)} of them for {len(prompts)} rows"
        raise InputError("GEN-SAMPLING", "seeds", found, "one a row")
    for seed in seeds:
        if not -(2**63) <= seed < 2**63:
            raise InputError("GEN-SAMPLING", "seed", f"{seed}", "a whole number of 64 bits")
    fast = for_decoding(model, decode_weights, max_new_tokens)
    dtype = fast.model.dtype if cache_dtype == "auto" else cache_dtype
    own = fast.adapter(adapter, adapter_index, len(prompts))
    keys = jnp.stack([jax.random.key(seed) for seed in seeds])
    state, token = started(fast.model, own, prompts, max_new_tokens, keys, sampling, dtype)
    return read_late(fast.model, own, state, token, keys, sampling, max_new_tokens, stop)


def started(
    model: Decoder,
    adapter: Prepared | None,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    keys: Array,
    sampling: Sampling,
    cache_dtype: str,
) -> tuple[State, Int[Array, " B"]]:
    """The state behind the prompts, and each row's first new token."""
    rows, longest = len(prompts), max(map(len, prompts))
    pieces = prompt_pieces(prompts)
    room = max(sum(ids.shape[1] for ids, _ in pieces), longest + max_new_tokens)
    cache = KVCache.create(model.config, rows, -(-room // ROOM) * ROOM, cache_dtype)
    penalized = sampling.repetition_penalty != 1
    seen = jnp.zeros((rows, model.config.vocab_size), bool) if penalized else None
    last = jnp.zeros((rows, model.config.hidden_size), model.dtype)
    for ids, counts in pieces:
        cache, seen, last = prefill(model, adapter, cache, seen, last, ids, counts)
    state = State(cache, seen, jnp.int32(0))
    return chosen(model, adapter, state, last, keys, sampling)


def read_late(
    model: Decoder,
    adapter: Prepared | None,
    state: State,
    token: Int[Array, " B"],
    keys: Array,
    sampling: Sampling,
    max_new_tokens: int,
    stop: Collection[int],
) -> Iterator[tuple[int, int]]:
    """Reads each token once the next one is on its way; what follows a row's last is not given."""
    going = dict.fromkeys(range(len(token)))
    for number in range(1, max_new_tokens + 1):
        ahead = None
        if number < max_new_tokens:
            state, ahead = advance(model, adapter, state, token, keys, sampling)
        ids = np.asarray(token).tolist()
        for row in list(going):
            if ids[row] == NOT_FINITE:
                where = f"new token {number}" + (f" of row {row}" if len(ids) > 1 else "")
                raise NonFinite("GEN-NAN", where, "the model's logits are not finite")
            if ids[row] in stop:
                del going[row]
            else:
                yield row, ids[row]
        if not going:
            return
        token = ahead


@functools.partial(jax.jit, donate_argnames=("cache", "seen", "last"))
def prefill(
    model: Decoder,
    adapter: Prepared | None,
    cache: KVCache,
    seen: Bool[Array, "B V"] | None,
    last: Float[Array, "B D"],
    ids: Int[Array, "B S"],
    counts: Int[Array, " B"],
) -> tuple[KVCache, Bool[Array, "B V"] | None, Float[Array, "B D"]]:
    """A piece of every prompt into the cache; `last` becomes the state of each row's last token."""
    real = jnp.arange(ids.shape[1]) < counts[:, None]
    x, cache = model.states(ids, segment_ids=real.astype(jnp.int32), adapter=adapter, cache=cache)
    own = jnp.take_along_axis(x, jnp.maximum(counts - 1, 0)[:, None, None], axis=1)[:, 0]
    last = jnp.where(counts[:, None] > 0, own, last)
    if seen is not None:
        seen = seen.at[jnp.arange(len(ids))[:, None], ids].max(real)
    return cache, seen, last


@functools.partial(jax.jit, static_argnames="sampling", donate_argnames="state")
def chosen(
    model: Decoder,
    adapter: Prepared | None,
    state: State,
    last: Float[Array, "B D"],
    keys: Array,
    sampling: Sampling,
) -> tuple[State, Int[Array, " B"]]:
    """The token that follows the states `last`."""
    logits = model.logits(last, adapter)
    own = keys
    if sampling.temperature:
        own = jax.vmap(jax.random.fold_in, (0, None))(keys, state.number)
    token = sample(logits, own, sampling, state.seen)
    token = jnp.where(jnp.isfinite(logits).all(-1), token, NOT_FINITE)
    return state._replace(number=state.number + 1), token


@functools.partial(
    jax.jit, static_argnames="sampling", donate_argnames="state", compiler_options=IN_TURN
)
def advance(
    model: Decoder,
    adapter: Prepared | None,
    state: State,
    token: Int[Array, " B"],
    keys: Array,
    sampling: Sampling,
) -> tuple[State, Int[Array, " B"]]:
    """The token that follows `token` in each row, and the state with `token` in it."""
    cache, seen, number = state
    ids = jnp.maximum(token, 0)
    x, cache = model.states(ids[:, None], adapter=adapter, cache=cache)
    if seen is not None:
        seen = seen.at[jnp.arange(len(ids)), ids].set(True)
    return chosen(model, adapter, State(cache, seen, number), x[:, 0], keys, sampling)


def prompt_pieces(
    prompts: Sequence[Prompt],
) -> list[tuple[Int[np.ndarray, "B S"], Int[np.ndarray, " B"]]]:
    """(ids padded with 0, how many are real): whole pieces of LONGEST_PIECE, then the rest."""
    longest = max(map(len, prompts))
    pieces = []
    for start in range(0, longest, LONGEST_PIECE):
        real = [prompt[start : start + LONGEST_PIECE] for prompt in prompts]
        counts = np.array([len(ids) for ids in real], np.int32)
        length = max(SHORTEST_PIECE, 1 << (int(counts.max()) - 1).bit_length())
        ids = np.zeros((len(prompts), length), np.int32)
        for row, own in zip(ids, real, strict=True):
            row[: len(own)] = own
        pieces.append((ids, counts))
    return pieces


def check_prompts(config: ModelConfig, prompts: Sequence[Prompt], max_new_tokens: int) -> None:
    """Refuse what would be cut, clamped or extrapolated in silence."""
    if not len(prompts):
        raise InputError("GEN-EMPTY", "prompts", "none", "at least one")
    if max_new_tokens < 1:
        raise InputError("GEN-LENGTH", "max_new_tokens", f"{max_new_tokens}", "at least 1")
    for number, prompt in enumerate(prompts):
        where = "prompt" if len(prompts) == 1 else f"prompt {number}"
        if not len(prompt):
            raise InputError("GEN-EMPTY", where, "no tokens", "at least one")
        if not 0 <= min(prompt) <= max(prompt) < config.vocab_size:
            found = f"token ids {min(prompt)} to {max(prompt)}"
            expected = f"0 to {config.vocab_size - 1}, the model's vocabulary"
            raise InputError("GEN-VOCAB", where, found, expected, "the model's own tokenizer")
        if len(prompt) + max_new_tokens > config.max_position_embeddings:
            found = f"{len(prompt)} tokens and max_new_tokens={max_new_tokens} more"
            expected = f"at most {config.max_position_embeddings} in all, the model's positions"
            raise InputError("GEN-LENGTH", where, found, expected)
