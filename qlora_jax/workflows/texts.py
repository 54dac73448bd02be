"""Texts as windows of token ids: what a merge is calibrated on, and what it is asked afterwards."""

import dataclasses
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int

from qlora_jax.data.encode import TextEncoder
from qlora_jax.data.load import load_dataset
from qlora_jax.errors import InputError
from qlora_jax.evaluation.perplexity import windows
from qlora_jax.models import Decoder
from qlora_jax.workflows.evaluation_data import TEXT, read_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LENGTH = 256  # tokens of a window
ASKED = 8  # windows of a text that nobody named
HELD_OUT = 10  # every tenth window of a calibration text is kept for the question


@dataclasses.dataclass(frozen=True)
class Text:
    """A text in windows.

    Attributes:
      name: for people.
      ids: (N, S) int32, each row a text of its own.
      words: whether it is language; random ids have no perplexity that says anything.
    """

    name: str
    ids: Int[np.ndarray, "N S"]
    words: bool = True

    def to_json(self) -> dict[str, Any]:
        """Its name, size and SHA-256 of the ids."""
        digest = hashlib.sha256(self.ids.astype("<i4").tobytes()).hexdigest()
        return {"name": self.name, "tokens": self.ids.size, "sha256": digest}

    def parted(self) -> tuple["Text", "Text"]:
        """All windows but every tenth, and those.

        Raises:
          InputError: MERGE-CALIBRATION when there are fewer than two windows.
        """
        if len(self.ids) < 2:
            found, expected = f"{self.ids.size:,} tokens in one window", "two windows or more"
            raise InputError("MERGE-CALIBRATION", self.name, found, expected, "a longer text")
        apart = np.arange(len(self.ids)) % HELD_OUT == 1
        held_out = Text(f"held out of {self.name}", self.ids[apart], self.words)
        return dataclasses.replace(self, ids=self.ids[~apart]), held_out


def text_windows(path: str | Path, tokenizer: "PreTrainedTokenizerBase", model: Decoder) -> Text:
    """A file of text or of rows as windows; of rows all tokens count, one behind the other.

    Raises:
      InputError: DATA-... as of `load_dataset`, or EVAL-WINDOW for less than two tokens.
    """
    length = min(LENGTH, model.config.max_position_embeddings)
    if Path(path).suffix.lower() in TEXT:
        ids = np.asarray(TextEncoder(tokenizer).plain(read_text(Path(path))), np.int32)
    else:
        how = {"max_seq_length": length, "train_on": "all", "overlong": "split"}
        rows = load_dataset(path, tokenizer, packing=False, **how)
        ids = np.concatenate([sequence.ids for sequence in rows.sequences])
    return Text(Path(path).name, windows(ids, min(length, max(len(ids), 2)), str(path)))


def python_text(tokenizer: "PreTrainedTokenizerBase", model: Decoder) -> Text:
    """Some of Python's own documentation, which every CPython carries."""
    from pydoc_data.topics import topics

    length = min(LENGTH, model.config.max_position_embeddings)
    text = "\n".join(topics[name] for name in sorted(topics))[: 16 * ASKED * length]
    ids = TextEncoder(tokenizer).plain(text)
    return Text("Python's documentation", windows(ids, length)[:ASKED])


def random_ids(vocab_size: int, length: int) -> Text:
    """Two windows of ids from a fixed seed."""
    random = np.random.default_rng(0)
    ids = random.integers(0, vocab_size, (2, length)).astype(np.int32)
    return Text("random token ids", ids, words=False)
