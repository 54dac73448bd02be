"""What a model is evaluated on: plain text as windows, a file of rows as a dataset."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from qlora_jax.data.dataset import Dataset
from qlora_jax.data.encode import TextEncoder
from qlora_jax.data.load import load_dataset
from qlora_jax.data.rows import missing
from qlora_jax.errors import InputError
from qlora_jax.evaluation.perplexity import windows
from qlora_jax.models import Decoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEXT = (".txt", ".md", ".rst")
LENGTH = 1024  # tokens of a window, where nobody says


def evaluation_data(
    path: str | Path,
    tokenizer: "PreTrainedTokenizerBase",
    model: Decoder,
    length: int | None = None,
    train_on: str = "assistant",
) -> Dataset | np.ndarray:
    """Windows (N, length) int32 of a text file, or the packed rows of any other.

    Args:
      path: .txt, .md or .rst, or what `load_dataset` reads.
      tokenizer: the model's.
      model: has a number of positions.
      length: tokens of a window or a row; by default 1024, or the model's positions. A text that
        is shorter is one window.
      train_on: which tokens of a chat are predicted.

    Raises:
      InputError: EVAL-LENGTH, more than the model's positions; DATA-..., EVAL-...
    """
    most = model.config.max_position_embeddings
    if length is not None and length > most:
        raise InputError("EVAL-LENGTH", "seq_len", f"{length:,}", f"at most {most:,}, the model's")
    short = min(length or LENGTH, most)
    if Path(path).suffix.lower() not in TEXT:
        return load_dataset(path, tokenizer, max_seq_length=short, train_on=train_on)
    ids = TextEncoder(tokenizer).plain(read_text(Path(path)))
    short = short if length is not None else min(short, max(len(ids), 2))
    return windows(ids, short, str(path))


def read_text(path: Path) -> str:
    """A text file.

    Raises:
      InputError: DATA-MISSING, or DATA-UTF8 with the byte.
    """
    if not path.is_file():
        raise missing(path, "a text file")
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise InputError("DATA-UTF8", path, f"is not UTF-8 at byte {error.start}") from None
