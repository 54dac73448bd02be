"""The tokenizer of a model: from a Hugging Face folder, or from a GGUF file's metadata.

transformers and tokenizers are imported when the first tokenizer is loaded, since that takes a
second, and without transformers' note that PyTorch is missing: nothing here needs it.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_jax.data.gguf_tokenizer import gguf_special_tokens, gguf_tokenizer
from qlora_jax.data.tokenizer_json import check_tokenizer_json, read_object
from qlora_jax.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

QUIET = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
MAX_CONFIG_BYTES = 4 << 20
READ_BY_TRANSFORMERS = (".json", ".jinja", ".txt", ".model")


def load_tokenizer(
    path: str | Path, metadata: dict[str, Any] | None = None, *, vocab_size: int | None = None
) -> "PreTrainedTokenizerFast":
    """The tokenizer of a Hugging Face folder or, with its `metadata`, of a GGUF file.

    Nothing is downloaded and no code of the folder is run. Padding and truncation that the files
    set are switched off: lengths are the loader's.

    Args:
      path: the folder, or the GGUF file that `metadata` came from.
      metadata: a GGUF file's keys (`GGUF(path).metadata`).
      vocab_size: rows of the model's embedding; a tokenizer with more ids is refused.

    Returns:
      A transformers tokenizer: call it, `decode`, `save_pretrained`.

    Raises:
      InputError: TOK-... for files that are missing, damaged or hostile.
    """
    path = Path(path)
    with silenced(), as_input_error(str(path)):
        tokenizer = from_folder(path) if metadata is None else from_gguf(path, metadata)
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.backend_tokenizer.no_truncation()
    highest = max(tokenizer.get_vocab().values())
    if vocab_size is not None and highest >= vocab_size:
        found = f"token ids go up to {highest}"
        raise InputError("TOK-VOCAB", str(path), found, f"below the model's {vocab_size} rows")
    return tokenizer


def from_folder(folder: Path) -> "PreTrainedTokenizerFast":
    """tokenizer.json and tokenizer_config.json, or older files that transformers knows."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if not folder.is_dir():
        hint = "a folder with tokenizer.json, or pass the GGUF file's metadata"
        raise InputError("TOK-FILE", str(folder), "is not a folder", hint=hint)
    check_files(folder)
    if (config := folder / "tokenizer_config.json").exists():
        check_config(read_object(config, MAX_CONFIG_BYTES), str(config))
    # AutoTokenizer takes the class that tokenizer_config.json names, and in transformers 5 some of
    # those put their own pre-tokenizer in the place of the file's: SmolLM2, a "GPT2Tokenizer",
    # would no longer split digits. The plain class takes tokenizer.json as it is.
    loader = AutoTokenizer
    if (file := folder / "tokenizer.json").exists():
        check_tokenizer_json(file)
        loader = PreTrainedTokenizerFast
    elif not any(folder.glob("*token*")) and not any(folder.glob("vocab*")):
        raise InputError("TOK-FILE", str(folder), "tokenizer.json is missing")
    return loader.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)


def check_files(folder: Path) -> None:
    """Refuses a pipe, which would be waited for, and a link to nothing or out of the folder.

    transformers opens what it finds by itself; links from Hugging Face's cache to its blobs are
    followed.
    """
    home = Path(os.path.realpath(folder))
    homes = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    for path in sorted([*folder.iterdir(), *folder.glob("additional_chat_templates/*")]):
        real = Path(os.path.realpath(path))
        if path.suffix not in READ_BY_TRANSFORMERS or real.is_dir():
            continue
        if not any(real.is_relative_to(place) for place in homes):
            found = f"leads outside the folder, to {real}"
            raise InputError("TOK-FILE", str(path), found, "a file inside it")
        if not real.is_file():
            found = "is a pipe or device" if real.exists() else f"leads to {real}, which is missing"
            raise InputError("TOK-FILE", str(path), found, "a regular file")


def check_config(config: dict[str, Any], where: str) -> None:
    """Refuses values of tokenizer_config.json that transformers takes and fails on when used."""
    length = config.get("model_max_length")
    if length is not None and (type(length) not in (int, float) or length <= 0):
        found = f"model_max_length is {length!r:.80}"
        raise InputError("TOK-CONFIG", where, found, "a number above 0")
    template = config.get("chat_template") or ""
    several = template if isinstance(template, list) else []
    texts = [(item.get("name"), item.get("template")) for item in several if type(item) is dict]
    texts = [text for pair in texts for text in pair] if several else [template]
    if len(texts) < 2 * len(several) or not all(isinstance(text, str) for text in texts):
        found = f"chat_template is {template!r:.80}"
        raise InputError("TOK-CONFIG", where, found, "text, or a list of name and template")


def from_gguf(path: Path, metadata: dict[str, Any]) -> "PreTrainedTokenizerFast":
    """The metadata's tokenizer, wrapped so that it saves itself as a folder."""
    from transformers import PreTrainedTokenizerFast

    template = metadata.get("tokenizer.chat_template")
    length = metadata.get(f"{metadata.get('general.architecture')}.context_length")
    return PreTrainedTokenizerFast(
        tokenizer_object=gguf_tokenizer(metadata, str(path)),
        clean_up_tokenization_spaces=False,
        **gguf_special_tokens(metadata, str(path)),
        **({"chat_template": template} if isinstance(template, str) else {}),
        **({"model_max_length": length} if isinstance(length, int) else {}),
    )


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Without transformers' advice, which is about what users of this library do not do."""
    before = os.environ.get(QUIET)
    os.environ[QUIET] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[QUIET]
        else:
            os.environ[QUIET] = before


@contextlib.contextmanager
def as_input_error(where: str) -> Iterator[None]:
    """Failures of the libraries, and panics of their Rust code, as one line."""
    try:
        yield
    except (InputError, MemoryError):
        raise
    except BaseException as error:
        panic = type(error).__name__ == "PanicException"  # a BaseException that no module exports
        if not panic and not isinstance(error, Exception):
            raise
        reason = " ".join(str(error).split())[:300]
        raise InputError("TOK-LOAD", where, f"no tokenizer could be read: {reason}") from error
