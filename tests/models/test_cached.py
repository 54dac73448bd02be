"""Logits with a cache against without one: every golden family, ragged rows, windows, 8 bits."""

from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.inference.decode import generate_batch
from qlora_jax.inference.weights import for_decoding
from qlora_jax.models import Decoder, KVCache, linear
from qlora_jax.models.cache import encoded
from tests.golden_data import GOLDEN, GoldenFile
from tests.models.test_golden_models import FOLDERS, decoder
from tests.random_arrays import normal
from tests.tiers import tiered
from tests.tolerances import BFLOAT16_RTOL, CACHED_ATOL, INT8_CACHE_ATOL

LENGTHS = (17, 5)  # of two rows: beyond the golden windows of 8 tokens, and within
PREFILL = 12  # tokens of the first piece
NEW = 5


@jax.jit
def step(model: Decoder, ids, real, cache):
    x, cache = model.states(ids, segment_ids=real, cache=cache)
    return model.logits(x), cache


def cached_logits(model: Decoder, ids: np.ndarray, dtype: str) -> list[np.ndarray]:
    """Each row's logits of its own tokens: a ragged prompt in two pieces, then one by one."""
    cache = KVCache.create(model.config, 2, 32, dtype)
    found: list[list[np.ndarray]] = [[], []]

    def feed(parts: list[np.ndarray], width: int) -> None:
        nonlocal cache
        padded, real = np.zeros((2, width), np.int32), np.zeros((2, width), np.int32)
        for row, part in enumerate(parts):
            padded[row, : len(part)], real[row, : len(part)] = part, 1
        logits, cache = step(model, padded, real, cache)
        for row, part in enumerate(parts):
            found[row].append(np.asarray(logits[row, : len(part)]))

    prompts = [ids[row, :length] for row, length in enumerate(LENGTHS)]
    feed([prompt[:PREFILL] for prompt in prompts], PREFILL)
    feed([prompt[PREFILL:] for prompt in prompts], 8)
    for new in range(NEW):
        feed([ids[row, length + new :][:1] for row, length in enumerate(LENGTHS)], 1)
    assert cache.length.tolist() == [length + NEW for length in LENGTHS]
    return [np.concatenate(parts) for parts in found]


def texts(name: str) -> np.ndarray:
    return np.load(GOLDEN / "models" / name / "io.npz")["input_ids"].astype(np.int32)


@pytest.mark.parametrize(
    ("name", "form"),
    tiered(
        product(FOLDERS, ["as stored", "joined"]),
        [("gemma3", "as stored")],
    ),
)
def test_cached_logits_are_those_without_a_cache(name, form):
    model, ids = decoder(name), texts(name)
    read = model if form == "as stored" else for_decoding(model, "dense").model
    found = cached_logits(read, ids, "float32")
    for row, length in enumerate(LENGTHS):
        whole = model(ids[row : row + 1])[0, : length + NEW]
        np.testing.assert_allclose(found[row], whole, atol=CACHED_ATOL, rtol=0)


@pytest.mark.parametrize("name", tiered(FOLDERS, ["gemma3"]))
def test_greedy_rows_are_the_golden_ones_beside_others(name):
    model = decoder(name)
    part = {"prompt", "greedy"}
    with GoldenFile(GOLDEN / "models" / name / "io.npz", inputs={"prompt"}, part=part) as golden:
        prompt = golden.input("prompt")[0].tolist()
        count = golden.arrays["greedy"].shape[1] - len(prompt)
        prompts = [[3, 4], prompt, [5] * 20]
        new = [[] for _ in prompts]
        for row, token in generate_batch(
            model, prompts, max_new_tokens=count, seeds=[0] * 3, decode_weights="dense"
        ):
            new[row].append(token)
        golden.compare_exact("greedy", np.array([[*prompt, *new[1]]]))


@pytest.mark.parametrize("name", tiered(FOLDERS, ["gemma3"]))
def test_an_8_bit_cache_is_near(name):
    model, ids = decoder(name), texts(name)
    near = cached_logits(model, ids, "int8")
    exact = cached_logits(model, ids, "float32")
    off = max(np.abs(a - b).max() for a, b in zip(near, exact, strict=True))
    spread = np.concatenate(exact).std()
    assert 0 < off <= INT8_CACHE_ATOL * spread


def test_8_bits_are_off_by_half_a_scale_at_most():
    new = normal(0, 2, 3, 4, 8).at[0, 0, 0].set(0)
    stored = encoded(new, jnp.int8)
    assert stored.codes.dtype == jnp.int8
    off = np.abs(stored.codes * stored.scales[..., None] - new)
    assert (off <= 0.501 * stored.scales[..., None]).all()
    cache = KVCache.create(decoder("llama").config, 2, 32, "int8")
    assert cache.nbytes == 2 * 2 * 2 * 2 * 32 * (16 + 4)  # k and v, L, B, K, T


@pytest.mark.parametrize("rows", [1, 3, 20])
def test_each_row_is_written_at_its_own_length(rows):
    config = decoder("llama").config
    cache = KVCache.create(config, rows, 8, "float32").advanced(jnp.arange(rows) % 5)
    k = normal(1, rows, 2, config.num_key_value_heads, 16)
    own, _ = cache.store(jnp.int32(1), k, k).of_layer(jnp.int32(1))
    for row in range(rows):
        at = row % 5
        np.testing.assert_array_equal(own.codes[row, :, at : at + 2], k[row].swapaxes(0, 1))
        assert np.count_nonzero(own.codes[row]) == np.count_nonzero(k[row])


@pytest.mark.parametrize("rows", [8, 12, 40])
def test_a_head_by_blocks_is_the_head(rows, monkeypatch):
    """One bfloat16 row on a CPU: whole blocks of the vocabulary, and what is left of it."""
    monkeypatch.setattr(linear, "HEAD_ROWS", rows)
    x = normal(0, 1, 1, 16, dtype="bfloat16")
    head = normal(1, 32, 16, dtype="bfloat16")
    found = linear.head_matmul(x, head, frozen=True)
    exact = x.astype(jnp.float32) @ head.astype(jnp.float32).T
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, exact, rtol=BFLOAT16_RTOL, atol=BFLOAT16_RTOL)
