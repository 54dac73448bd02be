"""Opens a base as its adapter was trained on it: quantized the same way, in the same dtype."""

import dataclasses
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_jax.checkpoints.bnb4bit import is_4bit
from qlora_jax.checkpoints.gguf import GGUF
from qlora_jax.checkpoints.load import Progress, Source, source_dtype
from qlora_jax.data.tokenizer import load_tokenizer
from qlora_jax.errors import InputError, Note
from qlora_jax.models import Decoder
from qlora_jax.quantization.policy import QuantizationConfig
from qlora_jax.workflows.adapter_folder import trained_with
from qlora_jax.workflows.closer import ADAPTER, is_residual
from qlora_jax.workflows.companions import companions, has_tokenizer
from qlora_jax.workflows.open import load_model, open_source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclasses.dataclass(frozen=True)
class Choice:
    """How a base is opened, and why.

    Attributes:
      quantization: None takes the weights as they are stored.
      dtype: of activations and dense weights.
      reason: for people.
    """

    quantization: QuantizationConfig | None
    dtype: str
    reason: str


def choose(
    source: Source,
    adapter: str | Path | None = None,
    *,
    kind: str = "auto",
    block_size: int = 64,
    double_quant: bool = True,
    dtype: str = "auto",
) -> Choice:
    """What was asked for; with auto as stored if that is 4-bit, else as the adapter was trained.

    With an adapter that does not say how, as one of PEFT, the weights are taken as they are stored,
    dense; without an adapter a dense model becomes NF4.

    Args:
      source: the base.
      adapter: a folder whose qlora_jax.json says how its base was quantized.
      kind: auto, none, nf4, fp4 or int4.
      block_size, double_quant: for a named kind.
      dtype: auto, bfloat16, float32 or float16.
    """
    said = None if adapter is None else trained_with(adapter)
    silent = adapter is not None and said is None
    if dtype == "auto":
        dtype = said[1] if said else source_dtype(source) if silent else "bfloat16"
    if kind == "none":
        return Choice(None, dtype, "as stored: asked for")
    if kind != "auto":
        return Choice(QuantizationConfig(kind, block_size, double_quant), dtype, "asked for")
    if is_4bit(source.config, str(source.path)):
        return Choice(None, dtype, "4-bit as stored")
    if silent:
        hint = "--quantization nf4 if it was trained on that"
        return Choice(None, dtype, f"as stored, since {adapter} does not say; {hint}")
    if said is None:
        return Choice(QuantizationConfig(), dtype, "nf4, the default")
    name = "dense" if said[0] is None else said[0].kind
    return Choice(said[0], dtype, f"{name}, as {adapter} was trained")


def open_as_trained(
    path: str | Path,
    adapter: str | Path | None = None,
    *,
    progress: Progress | None = None,
    **how,
) -> tuple[Decoder, "PreTrainedTokenizerFast", Choice]:
    """(model, tokenizer, why so): the tokenizer and template are the adapter's, if it has them.

    Args:
      path: a model's folder, a .gguf file, or an id of the Hub.
      adapter: a PEFT folder; it is not loaded here.
      progress: called after each tensor with (bytes done, bytes in all, name).
      **how: as for `choose`.

    Raises:
      InputError: whatever is wrong with the files, in one line.
    """
    if adapter is not None and not Path(adapter).is_dir():
        found = "missing adapter: there is no such folder"
        raise InputError("PEFT-FOLDER", adapter, found, "a PEFT adapter's folder")
    with open_source(path) as source:
        choice = choose(source, adapter, **how)
        if adapter is None and is_residual(source):
            text = f"{path} is what PiSSA left of a model: it is one only with {path}/{ADAPTER}"
            warnings.warn(Note(text), stacklevel=2)
        model = load_model(
            source, quantization=choice.quantization, dtype=choice.dtype, progress=progress
        )
        tokenizer = tokenizer_for(source, adapter, model)
    return model, tokenizer, choice


def tokenizer_for(
    source: Source, adapter: str | Path | None, model: Decoder
) -> "PreTrainedTokenizerFast":
    """The adapter's tokenizer if it has one, else the base's.

    Raises:
      InputError: TOK-..., what is wrong with it.
    """
    metadata = source.metadata if isinstance(source, GGUF) else None
    home = source.path
    if adapter is not None and has_tokenizer(companions(adapter)):
        home, metadata = adapter, None
    return load_tokenizer(home, metadata, vocab_size=model.config.vocab_size)
