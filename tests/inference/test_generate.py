"""Tokens against the golden ones and against the plain model; text, streaming, stops, refusals."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.checkpoints.load import load_weights
from qlora_jax.checkpoints.shards import Shards
from qlora_jax.errors import InputError, NonFinite
from qlora_jax.inference import Sampling, decode, generate, stream_text
from qlora_jax.inference.decode import (
    advance,
    generate_tokens,
    prefill,
    prompt_pieces,
)
from qlora_jax.models import Decoder, ModelConfig
from tests.data.small_tokenizer import byte_level
from tests.golden_data import GoldenFile, golden_folder
from tests.inference.tiny_model import tiny_model
from tests.trained import trained

MODEL, TOKENIZER = tiny_model(), byte_level()
PROMPT = [7, 100, 42, 9, 201]


whole_logits = jax.jit(lambda model, ids, adapter: model(ids, adapter=adapter))


def plain_greedy(model, prompt, count, adapter=None) -> list[int]:
    """Without a cache: the whole text again for each token; what stands behind is not seen."""
    ids = list(prompt)
    for _ in range(count):
        padded = np.pad(np.array([ids], np.int32), ((0, 0), (0, 80 - len(ids))))
        logits = whole_logits(model, padded, adapter)
        ids.append(int(logits[0, len(ids) - 1].argmax()))
    return ids[len(prompt) :]


def tokens(model=MODEL, prompt=PROMPT, count=12, **options) -> list[int]:
    return list(generate_tokens(model, prompt, max_new_tokens=count, **options))


@pytest.mark.parametrize("name", ["llama", "llama_tied", "llama3_rope"])
def test_greedy_tokens_are_the_golden_ones(name):
    with Shards(golden_folder("models") / name) as source:
        config = ModelConfig.from_dict(source.config, name)
        weights = load_weights(source, config, quantization=None, dtype="float32")
    model = Decoder.from_weights(config, weights, "float32")
    path = golden_folder("models") / name / "io.npz"
    part = {"prompt", "greedy"}
    with GoldenFile(path, inputs={"prompt"}, part=part) as golden:
        prompt = golden.input("prompt")[0].tolist()
        new = tokens(model, prompt, golden.arrays["greedy"].shape[1] - len(prompt))
        golden.compare_exact("greedy", np.array([[*prompt, *new]]))


@pytest.mark.parametrize("with_adapter", [False, True])
def test_greedy_tokens_are_those_of_the_model_without_a_cache(with_adapter):
    adapter = trained(MODEL, 6, alpha=64) if with_adapter else None
    assert tokens(adapter=adapter) == plain_greedy(MODEL, PROMPT, 12, adapter)
    assert len(set(tokens(adapter=adapter))) > 3  # a model that repeats itself shows little


def test_an_adapter_changes_the_tokens():
    assert tokens(adapter=trained(MODEL, 6, alpha=64)) != tokens()


@pytest.mark.parametrize("length", [1, 15, 16, 17, 32, 33, 64, 70])
def test_a_prompt_in_pieces_is_the_prompt(length, monkeypatch):
    monkeypatch.setattr(decode, "LONGEST_PIECE", 32)
    prompt = (np.arange(length) * 37 % 265).tolist()
    assert tokens(prompt=prompt, count=4) == plain_greedy(MODEL, prompt, 4)


def test_the_pieces_of_a_prompt():
    pieces = prompt_pieces([list(range(300)), [7, 8]])
    found = [(ids.shape, counts.tolist()) for ids, counts in pieces]
    assert found == [((2, 256), [256, 2]), ((2, 64), [44, 0])]
    assert pieces[0][0][1, :4].tolist() == [7, 8, 0, 0]
    assert pieces[1][0][0].tolist() == [*range(256, 300), *[0] * 20]
    assert [prompt_pieces([[0] * n])[0][0].shape[1] for n in (1, 16, 17, 200)] == [16, 16, 32, 256]


def test_one_program_for_every_token_and_five_at_most_for_prompts():
    model = tiny_model(num_hidden_layers=1)
    for program in (advance, prefill):
        program.clear_cache()
    for length in (1, 3, 9, 16, 11):
        tokens(model, [5] * length, count=6)
    assert (advance._cache_size(), prefill._cache_size()) == (1, 1)
    for length in (20, 33, 65, 129, 250):
        tokens(model, [5] * length, count=6)
    assert (advance._cache_size(), prefill._cache_size()) == (1, 5)


def test_sampled_tokens_are_a_function_of_the_seed():
    warm = Sampling(temperature=1.5)
    runs = [tokens(sampling=warm, seed=seed) for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]
    # A token depends on the seed and its number alone, not on how many follow.
    assert tokens(sampling=warm, seed=1, count=5) == runs[0][:5]
    assert len(set(runs[0])) > 5


def test_the_penalty_sees_prompt_and_new_tokens():
    """With a penalty beyond every logit's reach, no token that was seen comes again."""
    new = tokens(count=30, sampling=Sampling(repetition_penalty=1e6))
    assert len({*new, *PROMPT}) == len(new) + len(PROMPT)


def test_a_stop_token_ends_the_text_and_is_not_part_of_it():
    whole = tokens()
    at = whole.index(whole[5])
    assert tokens(stop={whole[5]}) == whole[:at]
    assert tokens(stop={whole[0]}) == []


def test_text_is_what_the_tokens_say():
    prompt = TOKENIZER("the ab")["input_ids"]
    expected = TOKENIZER.decode(tokens(prompt=prompt, count=20), skip_special_tokens=True)
    pieces = []
    text = generate(
        MODEL, TOKENIZER, "the ab", max_new_tokens=20, stop_tokens=(), stream=pieces.append
    )
    assert text == expected == "".join(pieces)
    assert len(pieces) > 3
    streamed = list(stream_text(MODEL, TOKENIZER, "the ab", max_new_tokens=20, stop_tokens=()))
    assert streamed == pieces


def test_sampling_options_reach_the_sampler():
    options = {"max_new_tokens": 20, "stop_tokens": ()}
    greedy = generate(MODEL, TOKENIZER, "the", **options)
    assert generate(MODEL, TOKENIZER, "the", temperature=5.0, top_k=1, **options) == greedy
    drawn = generate(MODEL, TOKENIZER, "the", temperature=5.0, seed=3, **options)
    assert drawn != greedy
    assert drawn == generate(MODEL, TOKENIZER, "the", temperature=5.0, seed=3, **options)
    sampling = Sampling(temperature=5.0)
    streamed = stream_text(MODEL, TOKENIZER, "the", sampling=sampling, seed=3, **options)
    assert drawn == "".join(streamed)


def test_a_chat_goes_through_the_template_and_bos_comes_once():
    chat = {"max_new_tokens": 8, "chat": True, "stop_tokens": ()}
    written = "<|start|>user\nthe<|end|>\n<|start|>assistant\n"
    plain = generate(MODEL, TOKENIZER, written, max_new_tokens=8, stop_tokens=())
    assert generate(MODEL, TOKENIZER, "the", **chat) == plain
    messages = [{"role": "user", "content": "the"}]
    assert generate(MODEL, TOKENIZER, messages, **chat) == plain
    other = generate(MODEL, TOKENIZER, "the", chat_template="{{ messages[0].content }}", **chat)
    assert other == generate(MODEL, TOKENIZER, "the", max_new_tokens=8, stop_tokens=())
    assert other != plain
    with_bos = generate(MODEL, byte_level(bos=True), "the", max_new_tokens=8, stop_tokens=())
    ids = byte_level(bos=True)("the")["input_ids"]
    assert ids[0] == 2
    assert with_bos == TOKENIZER.decode(tokens(prompt=ids, count=8), skip_special_tokens=True)


def test_default_stops_are_the_model_s_the_tokenizer_s_and_the_template_s(monkeypatch):
    stops = []

    def record(*args, stop, **options):
        stops.append(stop)
        return iter(())

    module = importlib.import_module("qlora_jax.inference.generate")
    monkeypatch.setattr(module, "generate_batch", record)
    model = tiny_model(eos_token_id=[200, 201])
    generate(model, TOKENIZER, "a")
    template = "{% for m in messages %}{{ m.content }}<|start|>{% endfor %}"
    generate(model, TOKENIZER, "a", chat=True, chat_template=template)
    generate(model, TOKENIZER, "a", stop_tokens=["<|bos|>", 7])
    assert stops == [{200, 201, 0}, {200, 201, 0, 1}, {2, 7}]


def test_what_cannot_be_generated_is_refused():
    def refused(match, prompt="a", tokenizer=TOKENIZER, model=MODEL, **options):
        with pytest.raises(InputError, match=match):
            generate(model, tokenizer, prompt, **options)

    refused(r"prompt: no tokens", "")
    refused(r"max_new_tokens: 0 \(expected at least 1\)", max_new_tokens=0)
    refused(r"1 tokens and max_new_tokens=600 more \(expected at most 600", max_new_tokens=600)
    refused(r"token ids 105 to 130 \(expected 0 to 63", model=tiny_model(vocab_size=64), prompt="é")
    refused(r"'<end>' is not a token .*Try: <\|end\|>", stop_tokens=["<end>"])
    refused(r"chat=True for messages", [{"role": "user", "content": "a"}])
    refused(r"temperature: -1", temperature=-1)
    refused(r"temperature: 1e\+40", temperature=1e40)
    refused(r"seed: \d+ \(expected a whole number of 64 bits", seed=2**70)
    refused(r"DATA-UTF8", "half \ud800")


def test_logits_that_are_not_finite_stop_generation():
    model = tiny_model()
    weights = model.weights()
    weights["model.norm.weight"] = jnp.full_like(weights["model.norm.weight"], jnp.nan)
    with pytest.raises(NonFinite, match="new token 1: the model's logits are not finite"):
        tokens(Decoder.from_weights(model.config, weights, "float32"))
