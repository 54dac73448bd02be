"""Rows of a batch never see each other: tokens, seeds, stops and NaN are each row's own."""

from itertools import product

import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.errors import InputError, NonFinite
from qlora_jax.inference import Sampling, for_decoding, generate, stream_batch
from qlora_jax.inference.decode import advance, generate_batch, generate_tokens
from qlora_jax.inference.weights import chosen, dense_bytes, is_packed
from qlora_jax.models import Decoder
from qlora_jax.quantization import quantize
from qlora_jax.quantization.tensor import stack
from tests.adapters.test_stack import drawn
from tests.data.small_tokenizer import byte_level
from tests.inference.tiny_model import tiny_model
from tests.tiers import tiered
from tests.tiny_model import FEW_TARGETS

MODEL, TOKENIZER = tiny_model(), byte_level()
PROMPTS = [[7, 100, 42, 9, 201], [3], [*range(40)], [8, 8]]
WARM = Sampling(temperature=1.5, top_k=50, top_p=0.95, min_p=0.01, repetition_penalty=1.1)


def rows(model=MODEL, prompts=PROMPTS, count=8, seeds=None, **options) -> list[list[int]]:
    new = [[] for _ in prompts]
    seeds = range(len(prompts)) if seeds is None else seeds
    for row, token in generate_batch(
        model, prompts, max_new_tokens=count, seeds=list(seeds), **options
    ):
        new[row].append(token)
    return new


@pytest.mark.parametrize(
    ("sampling", "cache"),
    tiered(product([Sampling(), WARM], ["auto", "int8"]), [(WARM, "int8")]),
)
def test_ragged_rows_are_single_rows(sampling, cache):
    options = {"sampling": sampling, "cache_dtype": cache}
    together = rows(**options)
    for row, prompt in enumerate(PROMPTS):
        alone = generate_tokens(MODEL, prompt, max_new_tokens=8, seed=row, **options)
        assert together[row] == list(alone)


@pytest.mark.slow
def test_a_row_depends_on_its_own_seed_alone():
    first = rows(prompts=[[5, 6]] * 3, seeds=[1, 2, 1], sampling=WARM)
    assert first[0] == first[2] != first[1]
    assert rows(prompts=[[5, 6], [9, 9, 9]], seeds=[2, 7], sampling=WARM)[0] == first[1]


def test_a_row_that_has_stopped_leaves_the_others_going():
    whole = rows()
    stop = whole[1][2]
    cut = [row[: row.index(stop)] if stop in row else row for row in whole]
    assert rows(stop={stop}) == cut
    assert len({len(row) for row in cut}) > 1


def test_nan_names_the_row_and_a_stopped_row_is_not_looked_at():
    weights = dict(MODEL.weights())
    table = weights["model.embed_tokens.weight"]
    weights["model.embed_tokens.weight"] = table.at[3].set(jnp.nan)
    spoiled = Decoder.from_weights(MODEL.config, weights, "float32")
    with pytest.raises(NonFinite, match="new token 1 of row 1: the model's logits"):
        rows(spoiled, prompts=[[7], [3], *PROMPTS[2:]])


KINDS = {
    "none": None,
    "lora": {},
    "dora": {"use_dora": True, "targets": FEW_TARGETS},
    "head": {"modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("kind", tiered(KINDS, ["dora"]))
def test_dense_weights_give_the_tokens_of_packed_ones(kind):
    held = dict(MODEL.weights())
    for name, weight in held.items():
        if "_proj" in name:
            each = [quantize(np.asarray(layer), block_size=32) for layer in weight]
            held[name] = stack(each)
    packed = Decoder.from_weights(MODEL.config, held, "float32")
    fast = for_decoding(packed)
    assert (is_packed(packed), is_packed(fast.model)) == (True, False)
    assert fast.model.config.fused
    assert for_decoding(fast, "packed") is fast
    adapter = None if kind == "none" else drawn(4, **KINDS[kind])
    found = rows(fast, adapter=adapter)
    assert found == rows(packed, adapter=adapter, decode_weights="packed")
    assert kind == "none" or found != rows(fast)


def test_another_adapter_of_the_same_shape_compiles_nothing():
    fast = for_decoding(MODEL, "dense")
    first = rows(fast, adapter=drawn(4, **KINDS["dora"]))
    compiled = advance._cache_size()
    assert rows(fast, adapter=drawn(5, **KINDS["dora"])) != first
    assert advance._cache_size() == compiled


def test_auto_says_what_it_chose_and_why(monkeypatch):
    size = dense_bytes(MODEL)
    assert size == 4 * 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32)
    for room, expected in ((4 * size, "dense"), (4 * size - 1, "packed")):
        monkeypatch.setattr("qlora_jax.inference.weights.available", lambda room=room: (room, ""))
        choice, reason = chosen(MODEL, False, None)
        assert choice == expected
        assert "GB that are left" in reason
    assert chosen(MODEL, False, 3) == ("packed", "fewer than 16 tokens")
    assert chosen(MODEL, True, None) == ("packed", "the layers are streamed")
    assert for_decoding(MODEL, "dense").reason == "dense: asked for"


def test_text_of_several_prompts():
    options = {"max_new_tokens": 12, "stop_tokens": ()}
    prompts = ["the ab", "a", "b the the"]
    alone = [generate(MODEL, TOKENIZER, prompt, **options) for prompt in prompts]
    assert len(set(alone)) == 3
    pieces = []
    texts = generate(
        MODEL, TOKENIZER, prompts, stream=lambda *piece: pieces.append(piece), **options
    )
    assert texts == alone
    assert list(stream_batch(MODEL, TOKENIZER, prompts, **options)) == pieces
    assert ["".join(t for row, t in pieces if row == i) for i in range(3)] == alone
    warm = {"temperature": 1.5, **options}
    texts = generate(MODEL, TOKENIZER, ["a"] * 3, seed=[4, 9, 10], **warm)
    assert texts == [generate(MODEL, TOKENIZER, "a", seed=seed, **warm) for seed in (4, 9, 10)]
    assert generate(MODEL, TOKENIZER, ["a"] * 3, seed=8, **warm)[1] == texts[1]


def test_chats_in_a_batch():
    options = {"max_new_tokens": 6, "stop_tokens": (), "chat": True}
    chat = [{"role": "user", "content": "the"}]
    one = generate(MODEL, TOKENIZER, chat, **options)
    assert generate(MODEL, TOKENIZER, [chat, "the"], **options) == [one, one]


def test_what_cannot_be_a_batch_is_refused():
    def refused(match, prompts=("a", "b"), **options):
        with pytest.raises(InputError, match=match):
            generate(MODEL, TOKENIZER, list(prompts), **options)

    refused(r"GEN-EMPTY\]: prompts: none", ())
    refused(r"GEN-EMPTY\]: prompt 1: no tokens", ("a", ""))
    refused("prompt 1: 700 tokens", ("a", "b" * 700))
    refused(r"cache_dtype: 'int4' \(expected one of bfloat16", cache_dtype="int4")
    refused(r"decode_weights: 'some' \(expected one of", decode_weights="some")
    refused("seeds: 1 of them for 2 rows", seed=[1])
    refused("the adapter is not a stack", adapter=drawn(4), adapter_index=[0, 0])


def test_nothing_waits_for_the_reader():
    """The next token's work is queued before a token is given."""
    calls = []
    new = generate_tokens(MODEL, [5], max_new_tokens=3)
    real = advance

    def counted(*args):
        calls.append(1)
        return real(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qlora_jax.inference.decode.advance", counted)
        counts = []
        for _ in new:
            counts.append(len(calls))
    assert counts == [1, 2, 2]
