"""A model or an adapter as a GGUF file for llama.cpp, its tokenizer too."""

from collections.abc import Collection
from itertools import chain
from pathlib import Path

from qlora_jax.adapters.adapter import check_finite
from qlora_jax.checkpoints.atomic import refuse_existing
from qlora_jax.checkpoints.gguf import GGUF
from qlora_jax.checkpoints.gguf_lora import lora_metadata, lora_tensors
from qlora_jax.checkpoints.gguf_metadata import FILE_TYPES, model_metadata
from qlora_jax.checkpoints.gguf_tensors import rope_tensors, specs_of, stored, weight_table
from qlora_jax.checkpoints.gguf_write import Value, save_gguf
from qlora_jax.checkpoints.load import Loader, Progress, Source, source_dtype
from qlora_jax.data.gguf_vocabulary import gguf_vocabulary
from qlora_jax.data.tokenizer import load_tokenizer
from qlora_jax.errors import InputError, listed
from qlora_jax.models import ModelConfig
from qlora_jax.workflows.adapter_folder import read_adapter
from qlora_jax.workflows.companions import companions, has_tokenizer, names_tokenizer
from qlora_jax.workflows.convert import dense_weights
from qlora_jax.workflows.open import open_source

TYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}  # of a source's own dtype


def export_gguf(
    path: str | Path,
    out: str | Path,
    *,
    type: str | None = None,
    progress: Progress | None = None,
) -> list[str]:
    """Writes a model as one GGUF file that llama.cpp opens; never overwrites.

    Tensors are read, packed and written one at a time; the file is read again before it appears.

    Args:
      path: a Hugging Face folder, 4-bit or not, or a .gguf file, whose tokenizer is kept as it is.
      out: a path where nothing is yet, ending with .gguf.
      type: f32, f16, bf16, q8_0 or q4_0; by default the source's own dtype.
      progress: called after each tensor with (bytes done, bytes in all, name).

    Returns:
      What is to be said about the file: what llama.cpp computes otherwise, what has another format.

    Raises:
      InputError: OUT-EXISTS, GG-SUFFIX, GG-RANGE, GGOUT-..., TOK-GGUF, and what is wrong
        with the files of `path`.
      StorageError: OUT-FULL, OUT-WRITE, OUT-VERIFY.
    """
    refuse_existing(out)
    with open_source(path) as source:
        where = str(source.path)
        config = ModelConfig.from_dict(source.config, where)
        loader = Loader(source, config, None, exact_dtype(source), progress=progress)
        kind = checked_type(TYPES[source_dtype(source)] if type is None else type, FILE_TYPES)
        metadata, notes = model_metadata(config, name_of(source), kind, where)
        vocabulary, more = vocabulary_of(source, config)
        table, extra = weight_table(config), rope_tensors(config)
        shapes = {name: array.shape for name, array in extra.items()} | dict(table.values())
        specs, others = specs_of(shapes, kind)
        tensors = (
            (table[name][0], stored(name, weight, config)) for name, weight in dense_weights(loader)
        )
        save_gguf(out, {**metadata, **vocabulary}, specs, chain(extra.items(), tensors))
    return [*notes, *more, *others]


def export_gguf_lora(
    adapter_path: str | Path, out: str | Path, model_path: str | Path, type: str | None = None
) -> list[str]:
    """Writes a LoRA adapter as a GGUF file that llama.cpp puts on its base; never overwrites.

    Args:
      adapter_path: a PEFT folder, or an adapter that was saved by orbax.
      out: a path where nothing is yet, ending with .gguf.
      model_path: the adapter's base, of which only config and shapes are read.
      type: f32, f16 or bf16; by default f32, as adapters are trained.

    Returns:
      What is to be said about the file.

    Raises:
      InputError: OUT-EXISTS, GG-SUFFIX, GGOUT-TYPE, GG-RANGE, GGOUT-DORA, GGOUT-SAVED,
        LORA-FINITE, EXPORT-BASE, and what is wrong with the files.
      StorageError: OUT-FULL, OUT-WRITE, OUT-VERIFY.
    """
    refuse_existing(out)
    kind = checked_type("f32" if type is None else type, TYPES.values())
    with open_source(model_path) as source:
        config = ModelConfig.from_dict(source.config, str(source.path))
    adapter = read_adapter(adapter_path, config)
    check_finite(adapter)
    name = name_at(Path(adapter_path))
    metadata, alpha = lora_metadata(adapter.spec, config, name, str(adapter_path))
    specs = {
        name: (kind.upper(), array.shape) for name, array in lora_tensors(adapter, config, alpha)
    }
    save_gguf(out, metadata, specs, lora_tensors(adapter, config, alpha))
    return []


def checked_type(kind: str, choices: Collection[str]) -> str:
    """`kind`, if it is one of `choices`."""
    if kind not in choices:
        raise InputError("GGOUT-TYPE", "--type", f"unknown type {kind!r}", listed(choices))
    return kind


def exact_dtype(source: Source) -> str:
    """A dtype that holds all of the source's weights as they are: half of float32, if that does."""
    found = {source.dtype(name) for name in source.names()}
    return found.pop() if found in ({"bfloat16"}, {"float16"}) else "float32"


def name_of(source: Source) -> str:
    """What a GGUF file calls its model: as its source does, or by where that lies."""
    name = source.metadata.get("general.name") if isinstance(source, GGUF) else None
    return name if isinstance(name, str) else name_at(source.path)


def name_at(path: Path) -> str:
    """The name of a file or folder; in Hugging Face's cache that of the Hub's id."""
    path = path.absolute()
    if path.parent.name == "snapshots":  # models--ORG--NAME/snapshots/REVISION
        path = Path(path.parent.parent.name.rpartition("--")[2])
    return path.name.removesuffix(".gguf").encode(errors="replace").decode()


def vocabulary_of(source: Source, config: ModelConfig) -> tuple[dict[str, Value], list[str]]:
    """The metadata keys of the source's tokenizer, and what is to be said about them."""
    if isinstance(source, GGUF) and names_tokenizer(source):
        keys = [key for key in source.metadata if key.startswith("tokenizer.")]
        return {key: source.encoded(key) for key in keys}, []
    if not isinstance(source, GGUF) and has_tokenizer(companions(source.path)):
        tokenizer = load_tokenizer(source.path, vocab_size=config.vocab_size)
        return gguf_vocabulary(tokenizer, config.vocab_size, str(source.path), name_of(source))
    ids = {
        "bos": config.bos_token_id,
        "eos": next(iter(config.eos_token_ids), None),
        "padding": config.pad_token_id,
    }
    named = {role: i for role, i in ids.items() if i is not None and 0 <= i < config.vocab_size}
    keys = {f"tokenizer.ggml.{role}_token_id": index for role, index in named.items()}
    note = "the source has no tokenizer, so the file has none: llama.cpp takes token ids alone"
    return {"tokenizer.ggml.model": "none", **keys}, [note]
