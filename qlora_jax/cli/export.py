"""Writes a model or an adapter in another format; verified after writing, never overwriting.

hf      a 4-bit, GGUF or dense model as a dense Hugging Face folder
peft    an adapter (a run, a checkpoint, or one saved by orbax) as PEFT lays it out
orbax   an adapter, or a model's weights, as an Orbax checkpoint with digests
"""

import argparse
from pathlib import Path
from typing import Any

from qlora_jax.cli.options import dtype_argument
from qlora_jax.errors import InputError, nearest

FORMATS = ("hf", "peft", "orbax")
LATER = ("bnb-4bit", "gguf", "gguf-lora")


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declares path, output and format."""
    parser.add_argument("path", help="a model (folder or .gguf) or an adapter's folder")
    parser.add_argument("out", help="a new folder")
    parser.add_argument("--format", required=True, help=", ".join(FORMATS))
    parser.add_argument(
        "--model", metavar="BASE", help="an adapter's base; only its shapes are read"
    )
    dtype_argument(parser, "dense weights that are written")


def run(args: argparse.Namespace) -> None:
    """Writes OUT."""
    from qlora_jax.checkpoints.peft import CONFIG
    from qlora_jax.workflows.convert import refuse_taken

    check_format(args.format)
    refuse_taken(args.out)
    is_adapter = (Path(args.path) / CONFIG).exists() or (Path(args.path) / "manifest.json").exists()
    if args.format == "hf":
        if is_adapter:
            found = "is an adapter; a dense model of it and its base is a merge"
            hint = f"qlora-jax merge {args.path} {args.out} --model BASE"
            raise InputError("EXPORT-HF", args.path, found, "a model", hint)
        note = export_hf(args)
    elif is_adapter:
        note = export_adapter(args)
    elif args.format == "peft":
        found = "is no adapter" if Path(args.path).exists() else "missing adapter: no such folder"
        raise InputError("EXPORT-PEFT", args.path, found, "a folder with adapter_config.json")
    else:
        note = export_parameters(args)
    print(f"written    {args.out} ({args.format})")
    if note:
        print(f"note       {note}")


def check_format(name: str) -> None:
    """Refuses what is not written: by name what comes later, with the nearest what is unknown."""
    if name in LATER:
        hint = "qlora-jax quantize, which writes bitsandbytes' 4-bit format"
        found = f"{name} is not written by this version"
        hint = hint if name == "bnb-4bit" else "--format hf"
        raise InputError("EXPORT-FORMAT", "--format", found, f"one of {', '.join(FORMATS)}", hint)
    if name not in FORMATS:
        close = nearest(name, FORMATS)
        hint = f"--format {close[0]}" if close else ""
        expected = f"one of {', '.join(FORMATS)}"
        raise InputError("EXPORT-FORMAT", "--format", f"unknown format {name!r}", expected, hint)


def export_hf(args: argparse.Namespace) -> str:
    """A dense folder."""
    from qlora_jax.cli.progress import bar
    from qlora_jax.workflows.convert import dense_checkpoint

    with bar("writing") as progress:
        has_tokenizer = dense_checkpoint(args.path, args.out, dtype=args.dtype, progress=progress)
    return "" if has_tokenizer else "the source has no tokenizer, so the copy has none"


def export_adapter(args: argparse.Namespace) -> str:
    """An adapter as PEFT's folder or as Orbax's."""
    from qlora_jax.checkpoints import peft
    from qlora_jax.checkpoints.orbax_io import save_orbax
    from qlora_jax.workflows.companions import companions, has_tokenizer

    adapter = read_adapter(args)
    if args.format == "orbax":
        save_orbax(args.out, adapter)
        return "an Orbax checkpoint holds arrays alone: no tokenizer"
    files = companions(args.path)
    peft.save_adapter(
        args.out,
        adapter,
        base_model_name=args.model,
        extra=peft.read_extra(args.path),
        extra_files={name: path.read_bytes() for name, path in files.items()},
    )
    return "" if has_tokenizer(files) else "the source has no tokenizer, so the copy has none"


def read_adapter(args: argparse.Namespace) -> Any:
    """The adapter at PATH; one of Orbax knows its own shapes, one of PEFT needs the base's."""
    from qlora_jax.adapters.adapter import Adapter
    from qlora_jax.checkpoints import peft
    from qlora_jax.checkpoints.orbax_io import load_orbax
    from qlora_jax.models import ModelConfig
    from qlora_jax.models.families import linear_shapes
    from qlora_jax.workflows.open import open_source

    if not (Path(args.path) / peft.CONFIG).exists():
        adapter = load_orbax(args.path)
        if not isinstance(adapter, Adapter):
            found = "is an Orbax checkpoint of something else"
            raise InputError("EXPORT-ORBAX", args.path, found, "one of an adapter")
        return adapter
    if args.model is None:
        raise InputError("EXPORT-MODEL", "--model", "missing", "the adapter's base", "--model PATH")
    with open_source(args.model) as source:
        shape = ModelConfig.from_dict(source.config, args.model)
    return peft.read_adapter(args.path, linear_shapes(shape), shape.num_hidden_layers)


def export_parameters(args: argparse.Namespace) -> str:
    """A model's weights as Orbax's folder."""
    from qlora_jax.checkpoints.orbax_io import save_orbax
    from qlora_jax.cli.progress import bar
    from qlora_jax.workflows.convert import parameters

    with bar("reading") as progress:
        weights = parameters(args.path, args.dtype, progress)
    save_orbax(args.out, weights, metadata={"model": str(args.path)})
    return "an Orbax checkpoint holds arrays alone: no config.json, no tokenizer"
