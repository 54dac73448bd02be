"""The files beside a model's weights that a copy needs too: tokenizer, generation settings."""

from pathlib import Path

from qlora_jax.checkpoints.files import inside
from qlora_jax.checkpoints.gguf import GGUF
from qlora_jax.checkpoints.load import Source
from qlora_jax.checkpoints.peft import tokenizer_files
from qlora_jax.data.tokenizer import load_tokenizer

TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
)
GGUF_TOKENIZER = "tokenizer.ggml.model"
OTHERS = ("generation_config.json",)
ENOUGH = {"tokenizer.json", "tokenizer.model", "vocab.json"}  # one of these makes a tokenizer


def companions(folder: str | Path) -> dict[str, Path]:
    """File name -> path of those that `folder` has."""
    paths = {name: inside(folder, name) for name in (*TOKENIZER, *OTHERS)}
    return {name: path for name, path in paths.items() if path.is_file()}


def companions_of(source: Source, first: str | Path | None = None) -> dict[str, bytes | Path]:
    """What a copy of a model gets beside its weights.

    Args:
      source: the model; a GGUF file's tokenizer is made from its metadata.
      first: a folder whose tokenizer files, if it has any, are taken instead: an adapter's.
    """
    if not isinstance(source, GGUF):
        own = companions(source.path)
    elif names_tokenizer(source):
        own = tokenizer_files(load_tokenizer(source.path, source.metadata))
    else:
        own = {}
    better = {} if first is None else companions(first)
    if has_tokenizer(better):
        own = {name: file for name, file in own.items() if name not in TOKENIZER}
    return {**own, **better}


def names_tokenizer(source: GGUF) -> bool:
    """Whether a GGUF file has a tokenizer; "none" is llama.cpp's word for a file without one."""
    return source.metadata.get(GGUF_TOKENIZER, "none") != "none"


def has_tokenizer(files: dict[str, bytes | Path]) -> bool:
    """Whether a tokenizer is among the files."""
    return bool(ENOUGH & files.keys())
