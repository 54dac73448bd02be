"""Merges an adapter into its base as a model that transformers opens, and checks the result.

The result is dense, or with --bits 4 a 4-bit checkpoint. The written model is opened again; how far
its logits and its perplexity are from base + adapter is printed, and more than the tolerance is an
error.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_jax.cli.options import (
    base_arguments,
    dtype_argument,
    how,
    positive,
    shard_argument,
    sharding,
    written,
)
from qlora_jax.errors import InputError

if TYPE_CHECKING:
    from qlora_jax.checkpoints.load import Source
    from qlora_jax.models import Decoder
    from qlora_jax.workflows.merge_4bit import Into4Bits
    from qlora_jax.workflows.texts import Text


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declares adapter, base and output."""
    parser.add_argument("adapter", help="an adapter's folder: a run's, a checkpoint's, or PEFT's")
    parser.add_argument("out", help="a new folder")
    parser.add_argument(
        "--model", required=True, metavar="BASE", help="the base: a folder, a .gguf file, a Hub id"
    )
    parser.add_argument(
        "--base",
        choices=("dequantized", "original"),
        default="dequantized",
        help="dequantized: the weights that were trained on; original: what others merge into, "
        "which changes answers",
    )
    dtype_argument(parser, "the merged weights", whose="base")
    shard_argument(parser)
    bits_arguments(parser)
    group = parser.add_argument_group("the check")
    group.add_argument(
        "--text",
        metavar="FILE",
        help="what perplexity is measured on (default: what is held out of --calibration, or some "
        "of Python's documentation)",
    )
    group.add_argument(
        "--tolerance",
        type=float,
        metavar="X",
        help="largest logit difference (default 0.01 in float32, 0.25 in float16, 2 in bfloat16, "
        "50 in 4 bits)",
    )
    group.add_argument(
        "--perplexity-tolerance",
        type=float,
        metavar="X",
        help="largest growth of the perplexity, 0.05 is 5%% (default 0.001 in float32, 0.01 in "
        "float16, 0.05 in bfloat16, 0.25 in 4 bits)",
    )
    base_arguments(parser)


def bits_arguments(parser: argparse.ArgumentParser) -> None:
    """Back into 4 bits, and how."""
    group = parser.add_argument_group("back into 4 bits (all but --bits want --bits 4)")
    group.add_argument(
        "--bits",
        type=int,
        choices=(4,),
        help="write a 4-bit checkpoint, quantized as the base is, which must be 4-bit",
    )
    group.add_argument(
        "--method",
        choices=("requantize", "compensated"),
        help="requantize: each weight to its nearest code, which undoes part of what was trained; "
        "compensated: codes and scales chosen for the outputs on --calibration (default: "
        "compensated with --calibration, else requantize)",
    )
    group.add_argument(
        "--calibration",
        metavar="FILE",
        help="a text or rows like those that the model is for, of more tokens than its widest "
        "linear has inputs; a tenth is held out for the check",
    )
    group.add_argument(
        "--residual-rank",
        type=positive,
        metavar="N",
        help="also write what 4 bits lost as an adapter of this rank, OUT-residual",
    )


def run(args: argparse.Namespace) -> None:
    """Merges, and prints how far the result is from base + adapter."""
    from qlora_jax.checkpoints.atomic import refuse_existing
    from qlora_jax.checkpoints.load import source_dtype
    from qlora_jax.checkpoints.peft import CONFIG, present
    from qlora_jax.cli.progress import bar
    from qlora_jax.workflows.adapter_folder import load_adapter
    from qlora_jax.workflows.checked_merge import checked_merge
    from qlora_jax.workflows.companions import companions_of, has_tokenizer
    from qlora_jax.workflows.merge import refuse_packed
    from qlora_jax.workflows.open import load_model, open_source
    from qlora_jax.workflows.open_as_trained import choose

    check_options(args)
    refuse_existing(args.out)
    present(Path(args.adapter), CONFIG)
    with open_source(args.model) as source:
        if args.base == "original":
            refuse_packed(source)
        dtype = args.dtype or source_dtype(source)
        choice = choose(source, args.adapter, **how(args))
        with bar("loading the base") as progress:
            model = load_model(
                source, quantization=choice.quantization, dtype=choice.dtype, progress=progress
            )
        adapter = load_adapter(args.adapter, model, any_base=args.any_base)
        files = companions_of(source, first=args.adapter)
        into, text = texts(args, source, model, has_tokenizer(files))
        print(f"base       {args.model}: {choice.reason}; merging into the {args.base} weights")
        if into is not None:
            print(f"4 bits     {into}")
        check = checked_merge(
            model,
            adapter,
            args.out,
            config=source.config,
            base=args.base,
            source=source if args.base == "original" else None,
            dtype=dtype,
            into=into,
            residual_rank=args.residual_rank,
            tolerance=args.tolerance,
            growth=args.perplexity_tolerance,
            text=text,
            extra_files=files,
            **sharding(args),
        )
    form = dtype if args.dtype else f"{dtype} as the base"
    print(written(args.out, form if into is None else f"4 bits, the rest {form}"))
    print("\n".join(check.lines()))
    if not has_tokenizer(files):
        print("note       neither base nor adapter has a tokenizer, so the result has none")


def check_options(args: argparse.Namespace) -> None:
    """What the options say together, before any file is opened.

    Raises:
      InputError: MERGE-TOLERANCE, MERGE-BASE, MERGE-METHOD.
    """
    from qlora_jax.workflows.merge import refuse_original

    for option in ("tolerance", "perplexity_tolerance"):
        value = getattr(args, option)
        if value is not None and not value > 0:
            where = f"--{option.replace('_', '-')}"
            raise InputError("MERGE-TOLERANCE", where, f"{value}", "above 0")
    if args.bits is not None:
        refuse_original(args.base)
        return
    for option in ("method", "calibration", "residual_rank"):
        if getattr(args, option) is not None:
            where, found = f"--{option.replace('_', '-')}", "given for a dense result"
            raise InputError("MERGE-METHOD", where, found, "--bits 4 beside it")


def texts(
    args: argparse.Namespace, source: "Source", model: "Decoder", speaks: bool
) -> tuple["Into4Bits | None", "Text | None"]:
    """How to go back into 4 bits, and what to ask both models; `speaks`: there is a tokenizer."""
    from qlora_jax.workflows.merge_4bit import Into4Bits, refuse_unfit
    from qlora_jax.workflows.open_as_trained import tokenizer_for
    from qlora_jax.workflows.texts import python_text, text_windows

    calibration = text = None
    if speaks or args.text or args.calibration:
        tokenizer = tokenizer_for(source, args.adapter, model)
        if args.calibration:
            calibration, text = text_windows(args.calibration, tokenizer, model).parted()
        if args.text:
            text = text_windows(args.text, tokenizer, model)
        text = text or python_text(tokenizer, model)
    if args.bits is None:
        return None, text
    method = args.method or ("compensated" if calibration else "requantize")
    into = Into4Bits(method, calibration)
    refuse_unfit(model, into)
    return into, text
