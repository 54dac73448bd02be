"""Text in, text out: a prompt or a chat, an adapter or none, whole or streamed."""

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from qlora_jax.adapters.adapter import Adapter
from qlora_jax.data.chat import render_chat
from qlora_jax.data.chat import stop_tokens as template_stops
from qlora_jax.data.encode import TextEncoder
from qlora_jax.errors import InputError, listed, nearest
from qlora_jax.inference.decode import generate_tokens
from qlora_jax.inference.detokenize import Detokenizer
from qlora_jax.inference.sampling import GREEDY, Sampling
from qlora_jax.models.decoder import Decoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Prompt = str | list[dict[str, Any]]


def generate(
    model: Decoder,
    tokenizer: "PreTrainedTokenizerBase",
    prompt: Prompt,
    *,
    adapter: Adapter | None = None,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    stop_tokens: Iterable[int | str] | None = None,
    chat: bool = False,
    chat_template: str | None = None,
    stream: Callable[[str], object] | None = None,
) -> str:
    """What the model writes after `prompt`: the new text alone.

        generate(model, tokenizer, "Once upon a time", temperature=0.8, top_p=0.95)
        generate(model, tokenizer, "Who are you?", chat=True, stream=print)

    Args:
      prompt: text, taken as it is; with `chat`, what the user says, or a list of messages.
      adapter: trained on this base; None is the base alone.
      max_new_tokens: how many at most.
      temperature, top_k, top_p, min_p, repetition_penalty: see `Sampling`; by default greedy.
      seed: the same seed gives the same text.
      stop_tokens: ids, or tokens as text, that end it; by default those of the model, the tokenizer
        and, with `chat`, the template. They are not part of the text.
      chat: put the prompt into the chat template.
      chat_template: another template than the tokenizer's.
      stream: called with each piece of text as it comes.

    Raises:
      InputError: GEN-..., an option out of range, or more tokens than the model has positions.
      NonFinite: the model's logits are NaN or infinite.
    """
    pieces = []
    for piece in stream_text(
        model,
        tokenizer,
        prompt,
        adapter=adapter,
        max_new_tokens=max_new_tokens,
        sampling=Sampling(temperature, top_k, top_p, min_p, repetition_penalty),
        seed=seed,
        stop_tokens=stop_tokens,
        chat=chat,
        chat_template=chat_template,
    ):
        pieces.append(piece)
        if stream:
            stream(piece)
    return "".join(pieces)


def stream_text(
    model: Decoder,
    tokenizer: "PreTrainedTokenizerBase",
    prompt: Prompt,
    *,
    adapter: Adapter | None = None,
    max_new_tokens: int = 256,
    sampling: Sampling = GREEDY,
    seed: int = 0,
    stop_tokens: Iterable[int | str] | None = None,
    chat: bool = False,
    chat_template: str | None = None,
) -> Iterator[str]:
    """The pieces of `generate`, each of whole characters, as the tokens are computed."""
    ids = prompt_ids(tokenizer, prompt, chat, chat_template)
    if stop_tokens is None:
        stops = {*model.config.eos_token_ids, tokenizer.eos_token_id}
        stops |= set(template_stops(tokenizer, chat_template)) if chat else set()
    else:
        stops = {token_id(tokenizer, token) for token in stop_tokens}
    detokenizer = Detokenizer(tokenizer)
    for token in generate_tokens(
        model,
        ids,
        adapter=adapter,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        seed=seed,
        stop=stops,
    ):
        if piece := detokenizer.add(token):
            yield piece
    if piece := detokenizer.finish():
        yield piece


def prompt_ids(
    tokenizer: "PreTrainedTokenizerBase", prompt: Prompt, chat: bool, chat_template: str | None
) -> list[int]:
    """The ids that training began a sequence with: text after BOS, a chat as its template says."""
    encoder = TextEncoder(tokenizer)
    if chat:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return encoder.plain(render_chat(tokenizer, messages, chat_template, True))
    if not isinstance(prompt, str):
        raise InputError("GEN-PROMPT", "prompt", "a list", "text", "chat=True for messages")
    return encoder.start(prompt)


def token_id(tokenizer: "PreTrainedTokenizerBase", token: int | str) -> int:
    """A token's id; text must be one token of the vocabulary."""
    if isinstance(token, int):
        return token
    vocabulary = tokenizer.get_vocab()
    if token not in vocabulary:
        close = nearest(token, tokenizer.all_special_tokens)
        found = f"{token!r} is not a token of this tokenizer"
        raise InputError("GEN-STOP", "stop_tokens", found, "a token or its id", listed(close))
    return vocabulary[token]
