r"""Chats to token ids: a template in, ids and the mask of what the assistant writes out.

    <|im_start|> user \n Hi <|im_end|> \n <|im_start|> assistant \n Hello . <|im_end|> \n
         0        0   0  0      0      0       0           0      0    1   1      1     0

The mask covers an assistant's content and the token that ends its turn, so that a model learns to
stop, and nothing else.
"""

import re
from typing import TYPE_CHECKING, Any

import numpy as np

from qlora_jax.data.template import RENDERER, Rendered
from qlora_jax.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WHERE = "chat template"
ASSISTANT = "assistant"
GENERATION = re.compile(r"{%-?\s*generation\s*-?%}")
REASONING = ("reasoning_content", "thinking", "reasoning")
Messages = list[dict[str, Any]]
Call = tuple[Messages, bool]  # messages, add_generation_prompt


def render_chat(
    tokenizer: "PreTrainedTokenizerBase",
    messages: Messages,
    template: str | None = None,
    add_generation_prompt: bool = False,
) -> str:
    """The text of a chat, byte for byte what transformers' apply_chat_template gives.

    Args:
      tokenizer: gives its template and its special tokens' texts.
      messages: objects with `role` and what else the template reads, mostly `content`.
      template: another template than the tokenizer's.
      add_generation_prompt: also begin the assistant's next turn.

    Raises:
      InputError: CHAT-NONE without a template, CHAT-MESSAGES, or what template.py lists.
    """
    template = template_of(tokenizer, template)
    return render(tokenizer, template, [(checked(messages), add_generation_prompt)])[0].text


def encode_chat(
    tokenizer: "PreTrainedTokenizerBase",
    messages: Messages,
    template: str | None = None,
    add_generation_prompt: bool = False,
) -> tuple[list[int], list[bool]]:
    """Token ids of a chat, and which of them the assistant writes.

    The text is tokenized in one call and no special token is added: all of them, BOS too, are the
    template's. An assistant's turn is what follows the chat before it, rendered with a generation
    prompt; if the template has `{% generation %}` marks, they are taken instead.

    Args: as `render_chat`.

    Returns:
      ids and mask, of equal length.

    Raises:
      InputError: CHAT-TURN for a template that writes earlier turns differently once later ones
        follow, so that no turn can be told apart; CHAT-TEXT for a lone surrogate; and what
        `render_chat` raises.
    """
    template, messages = template_of(tokenizer, template), checked(messages)
    whole = (messages, add_generation_prompt)
    if GENERATION.search(template):
        text, spans = render(tokenizer, template, [whole])[0]
        return masked(tokenizer, text, spans, until_special=False)
    turns = [i for i, message in enumerate(messages) if message["role"] == ASSISTANT]
    calls = [whole]
    for turn in turns:
        if turn == 0:
            raise InputError("CHAT-TURN", WHERE, "message 0 is the assistant's", "user or system")
        calls += [(messages[:turn], True), (messages[: turn + 1], False)]
    (text, _), *parts = render(tokenizer, template, calls)
    spans = [
        turn_span(text, before.text, after.text, turn)
        for turn, before, after in zip(turns, parts[::2], parts[1::2], strict=True)
    ]
    return masked(tokenizer, text, spans, until_special=True)


def stop_tokens(
    tokenizer: "PreTrainedTokenizerBase", template: str | None = None
) -> tuple[int, ...]:
    """Ids that end an assistant's turn: the template's own first, then the tokenizer's EOS.

    Raises:
      InputError: as `encode_chat`.
    """
    stops = []
    if template is not None or tokenizer.chat_template:
        probe = [{"role": "user", "content": "x"}, {"role": ASSISTANT, "content": "y"}]
        ids, mask = encode_chat(tokenizer, probe, template)
        special = special_ids(tokenizer)
        written = [index for index, counted in zip(ids, mask, strict=True) if counted]
        stops += [index for index in written[-1:] if index in special]
    if tokenizer.eos_token_id is not None:
        stops.append(tokenizer.eos_token_id)
    return tuple(dict.fromkeys(stops))


def template_of(tokenizer: "PreTrainedTokenizerBase", template: str | None) -> str:
    """The template that counts: the one given, else the tokenizer's default."""
    template = tokenizer.chat_template if template is None else template
    if isinstance(template, dict):  # several by name, such as default and tool_use
        template = template.get("default")
    if not template:
        found = "the tokenizer has no chat template"
        raise InputError("CHAT-NONE", WHERE, found, hint="give one with chat_template")
    return template


def checked(messages: Messages) -> Messages:
    """Copies of the messages without null fields, reasoning under the names that templates read."""
    if not isinstance(messages, list) or not messages:
        raise InputError("CHAT-MESSAGES", WHERE, "there are no messages", "a list of objects")
    plain = []
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            found = f"message {index} has no role"
            raise InputError("CHAT-MESSAGES", WHERE, found, "an object with role and content")
        message = {key: value for key, value in message.items() if value is not None}
        reasoning = next((message[name] for name in REASONING if name in message), None)
        if reasoning is not None:
            message = {"thinking": reasoning} | message | {"reasoning_content": reasoning}
        plain.append(message)
    return plain


def render(
    tokenizer: "PreTrainedTokenizerBase", template: str, calls: list[Call]
) -> list[Rendered]:
    """Each call's text and marks, with the special tokens by name as transformers passes them."""
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    variables = [
        {
            **special,
            "messages": messages,
            "tools": None,
            "documents": None,
            "add_generation_prompt": prompt,
        }
        for messages, prompt in calls
    ]
    return RENDERER.render(template, variables, WHERE)


def turn_span(text: str, before: str, after: str, turn: int) -> tuple[int, int]:
    """[start, end) of a turn in `text`, between the chat before it and the chat up to it."""
    for part, what in ((before, "what comes before it"), (after, "it")):
        if not text.startswith(part):
            pairs = enumerate(zip(text, part, strict=False))
            at = next((i for i, (a, b) in pairs if a != b), len(text))
            raise InputError(
                "CHAT-TURN",
                WHERE,
                f"writes message {turn}, or what precedes it, in two ways: {what} alone differs "
                f"from the whole chat at character {at}",
                "earlier turns that stay as they are",
                "one row per turn, or a template with {% generation %} marks",
            )
    return len(before), len(after)


def masked(
    tokenizer: "PreTrainedTokenizerBase",
    text: str,
    spans: list[tuple[int, int]],
    until_special: bool,
) -> tuple[list[int], list[bool]]:
    """Ids of `text`, and whether each lies in a span, up to the span's last special token if asked.

    A token counts where its last character does: a token's start moves when a tokenizer trims
    leading spaces off its offsets, its end does not.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        found = f"the text is not Unicode: {error.reason} at character {error.start}"
        raise InputError("CHAT-TEXT", WHERE, found) from None
    encoded = tokenizer(
        text,
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    ids = encoded["input_ids"]
    ends = np.array([end for _, end in encoded["offset_mapping"]], np.int64)
    special = special_ids(tokenizer)
    mask = np.zeros(len(ids), bool)
    for start, end in spans:
        inside = np.flatnonzero((ends > start) & (ends <= end))
        stops = [at for at, index in enumerate(inside) if ids[index] in special]
        if until_special and stops:
            inside = inside[: stops[-1] + 1]
        mask[inside] = True
    return ids, mask.tolist()


def special_ids(tokenizer: "PreTrainedTokenizerBase") -> set[int]:
    """Ids of control tokens, such as BOS and the end of a turn."""
    return {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
