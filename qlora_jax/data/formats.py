"""What a row says: a text, a prompt with its completion, or messages, known by its columns.

A format is one entry of `FORMATS`. Errors name file, line and field, and hold no text of the row.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from qlora_jax.data.text_rows import kind
from qlora_jax.errors import InputError, listed, nearest

Fields = Mapping[str, Any]
ROLES = ("system", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "tool": "tool",
    "observation": "tool",
}
ALPACA = (
    "Below is an instruction that describes a task{more}. Write a response that appropriately "
    "completes the request.\n\n### Instruction:\n{instruction}\n\n{input}### Response:\n"
)
ALPACA_INPUT = ", paired with an input that provides further context"


class Prompt(NamedTuple):
    """A prompt and its completion, as text and with nothing between them."""

    prompt: str
    completion: str


Messages = list[dict[str, Any]]
Content = str | Prompt | Messages


class Format(NamedTuple):
    """The columns that a kind of row has, how its content is read, and what to tell of it."""

    columns: tuple[str, ...]
    read: Callable[[Fields, str], Content]
    note: str
    optional: tuple[str, ...] = ()
    needs_template: bool = False


def text_field(fields: Fields, name: str, where: str, of: str = "field") -> str:
    """`fields[name]`, which must be text that is not blank, or the error that says what it is."""
    if name not in fields:
        raise InputError("DATA-FIELD", where, f"{of} {name} is missing")
    value = fields[name]
    if not isinstance(value, str):
        raise InputError("DATA-FIELD", where, f"{of} {name} is {kind(value)}", "a string")
    if not value.strip():
        raise InputError("DATA-FIELD", where, f"{of} {name} is empty", "text")
    check_text(value, name, where, of)
    return value


def check_text(value: str, name: str, where: str, of: str = "field") -> None:
    """Refuse what no tokenizer reads as written: NUL, and half of a surrogate pair."""
    if "\0" in value:
        raise InputError("DATA-NUL", where, f"{of} {name} has a NUL character", "text")
    try:
        value.encode()
    except UnicodeEncodeError:
        found = f"{of} {name} is not Unicode text: a lone surrogate, or bytes that are not UTF-8"
        raise InputError("DATA-UTF8", where, found) from None


def read_text(fields: Fields, where: str) -> str:
    """A document: `text`."""
    return text_field(fields, "text", where)


def read_prompt(fields: Fields, where: str) -> Prompt:
    """`prompt` and `completion`, as TRL has them."""
    return Prompt(text_field(fields, "prompt", where), text_field(fields, "completion", where))


def read_alpaca(fields: Fields, where: str) -> Prompt:
    """`instruction`, `input` (may be empty) and `output`, in Stanford Alpaca's words."""
    instruction = text_field(fields, "instruction", where)
    more = fields.get("input") or ""
    if more:
        text_field(fields, "input", where)
    prompt = ALPACA.format(
        more=ALPACA_INPUT if more else "",
        instruction=instruction,
        input=f"### Input:\n{more}\n\n" if more else "",
    )
    return Prompt(prompt, text_field(fields, "output", where))


def read_question(fields: Fields, where: str) -> Prompt:
    """`question` and `answer`, as GSM8K has them."""
    question, answer = (text_field(fields, name, where) for name in ("question", "answer"))
    return Prompt(f"Question: {question}\nAnswer:", f" {answer}")


def read_messages(fields: Fields, where: str) -> Messages:
    """`messages`, each with `role` and `content`; what else they hold goes to the template."""
    messages = objects(fields, "messages", where)
    check_roles([message.get("role") for message in messages], where)
    for number, message in enumerate(messages, 1):
        if message["role"] != "assistant" or not message.get("tool_calls"):
            text_field(message, "content", where, of=f"message {number}:")
    return messages


def read_sharegpt(fields: Fields, where: str) -> Messages:
    """`conversations`, each with `from` and `value`, under the names of `messages`."""
    turns = objects(fields, "conversations", where)
    for number, turn in enumerate(turns, 1):
        text_field(turn, "from", where, of=f"message {number}:")
        text_field(turn, "value", where, of=f"message {number}:")
    roles = [SHAREGPT_ROLES.get(turn["from"]) for turn in turns]
    check_roles(roles, where, expected=tuple(SHAREGPT_ROLES))
    return [
        {"role": role, "content": turn["value"]} for role, turn in zip(roles, turns, strict=True)
    ]


def objects(fields: Fields, name: str, where: str) -> list[dict[str, Any]]:
    """A column that is a list of objects with at least one in it."""
    value = fields.get(name)
    if not isinstance(value, list):
        found = f"is {kind(value)}" if name in fields else "is missing"
        raise InputError("DATA-FIELD", where, f"field {name} {found}", "an array of messages")
    if not value:
        raise InputError("DATA-FIELD", where, f"field {name} is empty", "at least one message")
    for number, item in enumerate(value, 1):
        if not isinstance(item, dict):
            found = f"message {number} is {kind(item)}"
            raise InputError("DATA-FIELD", where, found, "an object with role and content")
    return value


def check_roles(roles: list[Any], where: str, expected: tuple[str, ...] = ROLES) -> None:
    """One system message at most, at the start; then user and assistant in turn.

    Tool messages follow an assistant's, any number of them, and an assistant's follows those.
    """
    allowed = {
        None: ("system", "user"),
        "system": ("user",),
        "user": ("assistant",),
        "assistant": ("user", "tool"),
        "tool": ("tool", "assistant"),
    }
    before = None
    for number, role in enumerate(roles, 1):
        if role not in ROLES:
            found = f"message {number} has no known role"
            raise InputError("DATA-ROLE", where, found, "one of " + ", ".join(expected))
        if role not in allowed[before]:
            place = "is first" if before is None else f"follows {before}"
            found = f"role order: message {number} ({role}) {place}"
            raise InputError("DATA-ROLE", where, found, " or ".join(allowed[before]))
        before = role


FORMATS = {
    "messages": Format(
        ("messages",),
        read_messages,
        "messages are encoded by the chat template",
        needs_template=True,
    ),
    "sharegpt": Format(
        ("conversations",),
        read_sharegpt,
        "conversations (from, value) are read as messages (role, content)",
        needs_template=True,
    ),
    "prompt_completion": Format(
        ("prompt", "completion"), read_prompt, "prompt and completion are joined as they are"
    ),
    "alpaca": Format(
        ("instruction", "output"),
        read_alpaca,
        "instruction and input are read as Alpaca's prompt, output as completion",
        optional=("input",),
    ),
    "question_answer": Format(
        ("question", "answer"),
        read_question,
        "question and answer are read as prompt 'Question: ...\\nAnswer:' and completion ' ...'",
    ),
    "text": Format(("text",), read_text, "text rows train on all their tokens"),
}


def format_of(fields: Fields, name: str, where: str) -> str:
    """The format of a dataset whose first row is `fields`: the one named, or by its columns.

    Raises:
      InputError: an unknown name, or columns that match no format.
    """
    if name in FORMATS:
        return name
    if name != "auto":
        hint = listed(nearest(name, FORMATS)) or "auto"
        expected = ", ".join(("auto", *FORMATS))
        raise InputError("DATA-FORMAT", "dataset_format", f"unknown {name!r}", expected, hint)
    for candidate, form in FORMATS.items():
        if fields.keys() >= set(form.columns):
            return candidate
    expected = "; ".join("+".join(form.columns) for form in FORMATS.values())
    found = f"columns {listed(fields) or '(none)'} match no format"
    raise InputError("DATA-COLUMNS", where, found, expected, "rename the columns")
