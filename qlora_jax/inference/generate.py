"""Text in, text out: prompts or chats, adapters or none, whole or streamed."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from qlora_jax.adapters.adapter import Adapter
from qlora_jax.adapters.stack import AdapterStack, Which
from qlora_jax.data.chat import render_chat
from qlora_jax.data.chat import stop_tokens as template_stops
from qlora_jax.data.encode import TextEncoder
from qlora_jax.errors import InputError, listed, nearest
from qlora_jax.inference.decode import generate_batch
from qlora_jax.inference.detokenize import Detokenizer
from qlora_jax.inference.sampling import GREEDY, Sampling
from qlora_jax.inference.weights import ForDecoding
from qlora_jax.models.config import ModelConfig
from qlora_jax.models.decoder import Decoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Prompt = str | list[dict[str, Any]]


def generate(
    model: Decoder | ForDecoding,
    tokenizer: "PreTrainedTokenizerBase",
    prompt: Prompt | Sequence[Prompt],
    *,
    adapter: Adapter | AdapterStack | None = None,
    adapter_index: Which = None,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int | Sequence[int] = 0,
    stop_tokens: Iterable[int | str] | None = None,
    chat: bool = False,
    chat_template: str | None = None,
    stream: Callable[..., object] | None = None,
    cache_dtype: str = "auto",
    decode_weights: str = "auto",
) -> str | list[str]:
    """What the model writes after `prompt`: the new text alone; of several prompts a list.

        generate(model, tokenizer, "Once upon a time", temperature=0.8, top_p=0.95)
        generate(model, tokenizer, "Who are you?", chat=True, stream=print)
        generate(model, tokenizer, ["Hello", "Bonjour"], adapter=stack, adapter_index=["en", "fr"])

    Args:
      model: the base, or what `for_decoding` made of it.
      prompt: text, taken as it is; with `chat`, what the user says, or a list of messages. A list
        of such prompts is a batch: each is continued as it would be alone.
      adapter: trained on this base; None is the base alone; or a stack of several.
      adapter_index: with a stack, the number or name of the adapter for all prompts, or one for
        each; None or -1 is the base alone.
      max_new_tokens: how many at most, a prompt.
      temperature, top_k, top_p, min_p, repetition_penalty: see `Sampling`; by default greedy.
      seed: the same seed gives the same text; prompt i of several has seed + i, or its own of a
        list.
      stop_tokens: ids, or tokens as text, that end it; by default those of the model, the tokenizer
        and, with `chat`, the template. They are not part of the text.
      chat: put the prompt into the chat template.
      chat_template: another template than the tokenizer's.
      stream: called with each piece of text as it comes; of several prompts, with the number of the
        prompt before it.
      cache_dtype: of keys and values: bfloat16, float32, float16, or int8, which takes half of
        bfloat16's memory; auto is the model's own dtype.
      decode_weights: `dense` dequantizes the weights once, `packed` at every token, `auto` chooses:
        see `for_decoding`.

    Raises:
      InputError: GEN-..., an option out of range, or more tokens than the model has positions;
        STACK-..., an adapter that is not there.
      NonFinite: the model's logits are NaN or infinite.
    """
    one = isinstance(prompt, str) or is_chat(prompt)
    pieces = stream_batch(
        model,
        tokenizer,
        [prompt] if one else prompt,
        adapter=adapter,
        adapter_index=adapter_index,
        max_new_tokens=max_new_tokens,
        sampling=Sampling(temperature, top_k, top_p, min_p, repetition_penalty),
        seed=seed,
        stop_tokens=stop_tokens,
        chat=chat,
        chat_template=chat_template,
        cache_dtype=cache_dtype,
        decode_weights=decode_weights,
    )
    texts: list[list[str]] = [[] for _ in range(1 if one else len(prompt))]
    for row, piece in pieces:
        texts[row].append(piece)
        if stream:
            stream(*(() if one else (row,)), piece)
    whole = ["".join(text) for text in texts]
    return whole[0] if one else whole


def is_chat(prompt: Any) -> bool:
    """Whether this is one chat, a list of messages, and not a list of prompts."""
    return isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], dict)


def stream_text(
    model: Decoder | ForDecoding, tokenizer: "PreTrainedTokenizerBase", prompt: Prompt, **options
) -> Iterator[str]:
    """The pieces of `generate`, each of whole characters, as the tokens are computed.

    Args: as of `stream_batch`, for one prompt.
    """
    for _, piece in stream_batch(model, tokenizer, [prompt], **options):
        yield piece


def stream_batch(
    model: Decoder | ForDecoding,
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[Prompt],
    *,
    adapter: Adapter | AdapterStack | None = None,
    adapter_index: Which = None,
    max_new_tokens: int = 256,
    sampling: Sampling = GREEDY,
    seed: int | Sequence[int] = 0,
    stop_tokens: Iterable[int | str] | None = None,
    chat: bool = False,
    chat_template: str | None = None,
    cache_dtype: str = "auto",
    decode_weights: str = "auto",
    on_token: Callable[[], object] | None = None,
) -> Iterator[tuple[int, str]]:
    """(number of the prompt, piece of its text), as the tokens are computed.

    Args: as of `generate`, and `on_token`, called for each token, whether it makes a piece or not.
    """
    ids = [prompt_ids(tokenizer, prompt, chat, chat_template) for prompt in prompts]
    config = (model.base if isinstance(model, ForDecoding) else model).config
    tokens = generate_batch(
        model,
        ids,
        adapter=adapter,
        adapter_index=adapter_index,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        seeds=[seed + row for row in range(len(ids))] if isinstance(seed, int) else seed,
        stop=stops(config, tokenizer, stop_tokens, chat, chat_template),
        cache_dtype=cache_dtype,
        decode_weights=decode_weights,
    )
    detokenizers = [Detokenizer(tokenizer) for _ in ids]
    for row, token in tokens:
        if on_token:
            on_token()
        if piece := detokenizers[row].add(token):
            yield row, piece
    for row, detokenizer in enumerate(detokenizers):
        if piece := detokenizer.finish():
            yield row, piece


def stops(
    config: ModelConfig,
    tokenizer: "PreTrainedTokenizerBase",
    given: Iterable[int | str] | None,
    chat: bool,
    chat_template: str | None,
) -> set[int]:
    """The ids that end a text: those given, or the model's, the tokenizer's and the template's."""
    if given is not None:
        return {token_id(tokenizer, token) for token in given}
    own = {*config.eos_token_ids, tokenizer.eos_token_id}
    return own | set(template_stops(tokenizer, chat_template)) if chat else own


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
