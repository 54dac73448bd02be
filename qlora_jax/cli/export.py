"""Writes a model or an adapter in another format; read back and compared, never overwriting.

of a model: a folder, 4-bit or dense, a .gguf file, or an id of the Hub
  hf         a dense Hugging Face folder
  bnb-4bit   a 4-bit folder that transformers opens with bitsandbytes
  gguf       one file for llama.cpp
  orbax      its weights as an Orbax checkpoint with digests

of an adapter: PEFT's folder, a run, a checkpoint, or one that Orbax holds
  peft       a folder that PEFT loads
  gguf-lora  one file for llama.cpp's --lora
  orbax      an Orbax checkpoint with digests
"""

import argparse
from pathlib import Path
from typing import Any

from qlora_jax.cli.options import dtype_argument, shard_argument, sharding, written
from qlora_jax.errors import InputError, nearest

OF_MODELS = ("hf", "bnb-4bit", "gguf", "orbax")
OF_ADAPTERS = ("peft", "gguf-lora", "orbax")
FORMATS = tuple(dict.fromkeys(OF_MODELS + OF_ADAPTERS))
GGUF = ("gguf", "gguf-lora")
GGUF_TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0")


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declares path, output and format."""
    parser.add_argument("path", help="a model (folder, .gguf, Hub id) or an adapter's folder")
    parser.add_argument("out", help="a new folder; for gguf and gguf-lora a new NAME.gguf")
    parser.add_argument("--format", required=True, metavar="F", help=", ".join(FORMATS))
    parser.add_argument(
        "--model", metavar="BASE", help="an adapter's base: its config.json and shapes are read"
    )
    dtype_argument(parser, "what is written dense")
    parser.add_argument(
        "--type",
        choices=GGUF_TYPES,
        help="of a GGUF file's matrices (default: as --dtype)",
    )
    shard_argument(parser)


def run(args: argparse.Namespace) -> None:
    """Writes OUT."""
    check_format(args.format)
    is_adapter = holds_adapter(args.path)
    check_kind(args, is_adapter)
    check_options(args, is_adapter)
    from qlora_jax.checkpoints.atomic import refuse_existing

    refuse_existing(args.out)
    write = {
        "hf": export_folder,
        "bnb-4bit": export_folder,
        "peft": export_peft,
        "gguf": export_gguf,
        "gguf-lora": export_gguf_lora,
        "orbax": export_adapter_arrays if is_adapter else export_weights,
    }[args.format]
    stored = storage(args, is_adapter)
    notes = write(args)
    print(written(args.out, f"{args.format}{stored}"))
    for note in notes:
        print(f"note       {note}")


def check_format(name: str) -> None:
    """Refuses an unknown format, and names the nearest."""
    if name not in FORMATS:
        close = nearest(name.lower(), FORMATS)
        hint = f"--format {close[0]}" if close else ""
        expected = f"one of {', '.join(FORMATS)}"
        raise InputError("EXPORT-FORMAT", "--format", f"unknown format {name!r}", expected, hint)


def holds_adapter(path: str) -> bool:
    """Whether an adapter is at `path`: PEFT's, or Orbax's; a state of a run is refused.

    Raises:
      InputError: EXPORT-ORBAX, an Orbax checkpoint of something else.
    """
    from qlora_jax.checkpoints.manifest import NAME, read_manifest, understood
    from qlora_jax.checkpoints.peft import CONFIG

    if Path(path, CONFIG).exists():
        return True
    if not Path(path, NAME).is_file():
        return False
    with understood(path):
        manifest = read_manifest(path)
        is_adapter = manifest["tree"].get("class") == "Adapter"
        model = manifest["metadata"].get("model")
    if is_adapter:
        return True
    found = "is an Orbax checkpoint of arrays without an adapter or a config.json"
    hint = f"the model that it was made from, {model}" if model else ""
    raise InputError("EXPORT-ORBAX", path, found, "a model or an adapter", hint)


def check_kind(args: argparse.Namespace, is_adapter: bool) -> None:
    """Refuses what is of models for an adapter, and the other way round.

    Raises:
      InputError: EXPORT-KIND.
    """
    if args.format in (OF_ADAPTERS if is_adapter else OF_MODELS):
        return
    if is_adapter:
        found = f"is an adapter; {args.format} is written of a model, so of it and its base merged"
        hint = f"qlora-jax merge {args.path} OUT --model BASE"
        if args.format == "gguf":
            hint += ", or --format gguf-lora for the adapter alone"
        raise InputError("EXPORT-KIND", args.path, found, "a model", hint)
    there = Path(args.path).exists()
    found = "is no adapter" if there else "missing adapter: no such folder"
    expected = "a folder with adapter_config.json"
    hint = "--format gguf" if there and args.format == "gguf-lora" else ""
    raise InputError("EXPORT-KIND", args.path, found, expected, hint)


def check_options(args: argparse.Namespace, is_adapter: bool) -> None:
    """Refuses an option without effect, and two that contradict each other.

    Raises:
      InputError: EXPORT-OPTION, EXPORT-TYPE.
    """
    used = {
        "--model": is_adapter,
        "--dtype": not is_adapter or args.format in GGUF,
        "--type": args.format in GGUF,
        "--shard-size": args.format in ("hf", "bnb-4bit"),
    }
    for option, has_use in used.items():
        value = getattr(args, option.removeprefix("--").replace("-", "_"))
        if value is not None and not has_use:
            what = "an adapter" if is_adapter else "a model"
            found = f"{value!r} has no use with --format {args.format} of {what}"
            raise InputError("EXPORT-OPTION", option, found, hint=f"leave {option} out")
    if args.type and args.dtype and meant(args.dtype) != args.type:
        found = f"{args.type}, but --dtype {args.dtype} means {meant(args.dtype)}"
        raise InputError("EXPORT-TYPE", "--type", found, "one of the two")


def storage(args: argparse.Namespace, is_adapter: bool) -> str:
    """How what is dense in a model's copy is stored, and why so; adapters stay as they are."""
    from qlora_jax.checkpoints.load import source_dtype
    from qlora_jax.workflows.open import open_source

    if is_adapter or args.type or args.dtype:
        asked = gguf_type(args) if args.format == "gguf" else args.type or args.dtype
        return f", {asked}" if asked else ""
    with open_source(args.path) as source:
        dtype = source_dtype(source)
    return f", {meant(dtype) if args.format == 'gguf' else dtype} as the source"


def export_folder(args: argparse.Namespace) -> list[str]:
    """A dense folder, or a 4-bit one in bitsandbytes' layout."""
    from qlora_jax.cli.progress import bar
    from qlora_jax.workflows.convert import bnb_checkpoint, dense_checkpoint

    write = dense_checkpoint if args.format == "hf" else bnb_checkpoint
    with bar("writing") as progress:
        has_tokenizer = write(
            args.path, args.out, dtype=args.dtype, progress=progress, **sharding(args)
        )
    return without_tokenizer(has_tokenizer)


def export_gguf(args: argparse.Namespace) -> list[str]:
    """A model as one file."""
    from qlora_jax.cli.progress import bar
    from qlora_jax.workflows.export_gguf import export_gguf

    with bar("writing") as progress:
        return export_gguf(args.path, args.out, type=gguf_type(args), progress=progress)


def export_gguf_lora(args: argparse.Namespace) -> list[str]:
    """An adapter as one file."""
    from qlora_jax.workflows.export_gguf import export_gguf_lora

    return export_gguf_lora(args.path, args.out, needed_model(args), type=gguf_type(args))


def export_peft(args: argparse.Namespace) -> list[str]:
    """An adapter as PEFT's folder."""
    from qlora_jax.checkpoints import peft
    from qlora_jax.workflows.companions import companions, has_tokenizer
    from qlora_jax.workflows.hub import repository

    files = companions(args.path)
    peft.save_adapter(
        args.out,
        adapter_of(args),
        base_model_name=repository(args.model),
        extra=peft.read_extra(args.path),
        extra_files={name: path.read_bytes() for name, path in files.items()},
    )
    return without_tokenizer(has_tokenizer(files))


def export_adapter_arrays(args: argparse.Namespace) -> list[str]:
    """An adapter as Orbax's folder."""
    from qlora_jax.checkpoints.orbax_io import save_orbax

    save_orbax(args.out, adapter_of(args))
    return ["an Orbax checkpoint holds arrays alone: no tokenizer"]


def export_weights(args: argparse.Namespace) -> list[str]:
    """A model's weights as Orbax's folder."""
    from qlora_jax.checkpoints.orbax_io import save_orbax
    from qlora_jax.cli.progress import bar
    from qlora_jax.workflows.convert import parameters

    with bar("reading") as progress:
        weights = parameters(args.path, args.dtype, progress)
    save_orbax(args.out, weights, metadata={"model": str(args.path)})
    return ["an Orbax checkpoint holds arrays alone: no config.json, no tokenizer"]


def adapter_of(args: argparse.Namespace) -> Any:
    """The adapter at PATH; one of Orbax knows its own shapes, one of PEFT needs the base's."""
    from qlora_jax.checkpoints import peft
    from qlora_jax.checkpoints.orbax_io import load_orbax
    from qlora_jax.models import ModelConfig
    from qlora_jax.workflows.adapter_folder import read_adapter
    from qlora_jax.workflows.open import open_source

    if args.model is None and not Path(args.path, peft.CONFIG).exists():
        return load_orbax(args.path)
    with open_source(needed_model(args)) as source:
        return read_adapter(args.path, ModelConfig.from_dict(source.config, args.model))


def needed_model(args: argparse.Namespace) -> str:
    """The base that --model names.

    Raises:
      InputError: EXPORT-MODEL, none is named.
    """
    if args.model is None:
        expected, hint = "the adapter's base", "--model BASE"
        raise InputError("EXPORT-MODEL", "--model", "missing", expected, hint)
    return args.model


def gguf_type(args: argparse.Namespace) -> str | None:
    """What --type says, or --dtype as one of GGUF's types."""
    return args.type or meant(args.dtype)


def meant(dtype: str | None) -> str | None:
    """The type of GGUF that is this dtype."""
    from qlora_jax.workflows.export_gguf import TYPES

    return TYPES.get(dtype)


def without_tokenizer(has_tokenizer: bool) -> list[str]:
    """A note on a copy without one."""
    return [] if has_tokenizer else ["the source has no tokenizer, so the copy has none"]
