"""Token ids to text as they come: never half a character, and never a space too many or too few."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

UNFINISHED = "\ufffd"  # what bytes that are no whole character decode to


class Detokenizer:
    """Text piece by piece; the pieces joined are the text of all ids, special tokens left out.

    What a token adds depends on the one before it (a space, the rest of a character), so a short
    window of ids is decoded with and without the new one, and the difference is given:

        ids      ... | the  ca | f  Ã          given: "the ca"; "f" waits, for its é is half there
        window         the  ca   f  Ã  ©       given: "fé"; the window goes on from "f"

    Source: the incremental decoding of vLLM and text-generation-inference.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase"):
        self.tokenizer = tokenizer
        self.ids: list[int] = []  # the window
        self.given = 0  # how many ids of the window have been given as text

    def add(self, token: int) -> str:
        """The text that is whole now; empty while a character is not."""
        self.ids.append(token)
        before, after = self.decode(self.ids[: self.given]), self.decode(self.ids)
        if len(after) <= len(before) or after.endswith(UNFINISHED):
            return ""
        self.ids, self.given = self.ids[self.given :], len(self.ids) - self.given
        return after[len(before) :]

    def finish(self) -> str:
        """What is left, whole or not."""
        before, after = self.decode(self.ids[: self.given]), self.decode(self.ids)
        self.ids, self.given = [], 0
        return after[len(before) :]

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
