r"""Rows to token ids, and which of them are trained.

train_on     text   prompt   completion eos   messages
assistant    all    none     all              every assistant's turn
completion   all    none     all              the last assistant's turn
all          all    all      all              every token
"""

from typing import TYPE_CHECKING

import numpy as np

from qlora_jax.data.chat import encode_chat, template_of
from qlora_jax.data.formats import Fields, Format, Prompt, check_text
from qlora_jax.data.packing import TokenSequence
from qlora_jax.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TRAIN_ON = ("assistant", "completion", "all")


class TextEncoder:
    """Texts to ids, with BOS and EOS where the tokenizer's own habits put them, and never twice."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase"):
        self.tokenizer = tokenizer
        self.eos = tokenizer.eos_token_id
        bos = tokenizer.bos_token_id
        puts_bos = bos is not None and tokenizer("a", verbose=False)["input_ids"][:1] == [bos]
        self.bos = [bos] if puts_bos else []
        feed, behind = self.plain("\n"), self.plain("\na")
        # SentencePiece puts a space before every text; behind a line feed it does not.
        spaced = behind[: len(feed)] == feed and behind[len(feed) :] != self.plain("a")
        self.feed = feed if spaced else []

    def plain(self, text: str) -> list[int]:
        """Ids of the text alone, whatever its length.

        Raises:
          InputError: DATA-UTF8 for half of a surrogate pair, DATA-NUL for a NUL.
        """
        check_text(text, "text", "tokenizer", of="the")
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def start(self, text: str) -> list[int]:
        """Ids of a text that begins a sequence: what `generate` gives the model for a prompt."""
        ids = self.plain(text)
        return ids if ids[:1] == self.bos else self.bos + ids

    def continuation(self, text: str) -> list[int]:
        """Ids of a text that goes on behind other text, so without a space of the tokenizer's."""
        if self.feed:
            ids = self.plain("\n" + text)
            if ids[: len(self.feed)] == self.feed:
                return ids[len(self.feed) :]
        return self.plain(text)

    def ended(self, ids: list[int]) -> list[int]:
        """The ids with one EOS at their end, if the tokenizer has one."""
        return ids if self.eos is None or ids[-1:] == [self.eos] else [*ids, self.eos]


class RowEncoder:
    """Rows of one format to sequences.

    Prompt and completion are tokenized apart, so that no token straddles the boundary and the
    prompt's ids are those that generation will begin with. EOS ends texts and completions, and is
    trained; a chat ends as its template says.

    Args:
      tokenizer: of the model.
      form: how the rows are read.
      train_on: assistant, completion or all; the table is above.
      chat_template: another template than the tokenizer's.

    Raises:
      InputError: CHAT-NONE, messages without a template.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        form: Format,
        train_on: str = "assistant",
        chat_template: str | None = None,
    ):
        self.tokenizer, self.form = tokenizer, form
        self.train_on, self.chat_template = train_on, chat_template
        self.text = TextEncoder(tokenizer)
        if form.needs_template:
            template_of(tokenizer, chat_template)

    def encode(self, fields: Fields, where: str) -> TokenSequence:
        """One row's ids and mask.

        Raises:
          InputError: what is wrong with the row, named by `where`, without its text.
        """
        content = self.form.read(fields, where)
        if isinstance(content, str):
            ids = self.text.ended(self.text.start(content))
            trained = [True] * len(ids)
        elif isinstance(content, Prompt):
            prompt = self.text.start(content.prompt)
            completion = self.text.ended(self.text.continuation(content.completion))
            ids = prompt + completion
            trained = [self.train_on == "all"] * len(prompt) + [True] * len(completion)
        else:
            ids, trained = self.chat(content, where)
        sequence = TokenSequence(np.array(ids, np.int32), np.array(trained, bool), where)
        if not sequence.targets:
            found = f"no trainable token among {len(ids)} (train_on={self.train_on})"
            raise InputError("DATA-UNTRAINED", where, found, "one behind the first")
        return sequence

    def chat(self, messages: list[dict], where: str) -> tuple[list[int], list[bool]]:
        """Messages by the template, and the turns that `train_on` names."""
        try:
            ids, trained = encode_chat(self.tokenizer, messages, self.chat_template)
        except InputError as problem:  # which row it was, instead of "chat template"
            raise InputError(
                problem.code, where, problem.found, problem.expected, problem.hint
            ) from None
        if self.train_on == "completion":
            trained = last_run(trained)
        elif self.train_on == "all":
            trained = [True] * len(ids)
        return ids, trained


def last_run(mask: list[bool]) -> list[bool]:
    """The mask with only its last run of True left: the last turn.

    0 1 1 0 0 1 1 1 0  ->  0 0 0 0 0 1 1 1 0
    """
    stop = len(mask)
    while stop and not mask[stop - 1]:
        stop -= 1
    start = stop
    while start and mask[start - 1]:
        start -= 1
    return [start <= at < stop for at in range(len(mask))]
