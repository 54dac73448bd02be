"""Writes a model as a 4-bit checkpoint in bitsandbytes' format, which opens in seconds.

The folder also opens in transformers, unless the kind is int4. Nothing is ever overwritten.
With --init an adapter lies beside it, and both together are closer to the model than 4 bits alone.
"""

import argparse
import warnings

from qlora_jax.cli.init_options import (
    how_settings,
    init_arguments,
    lora_settings,
    refuse_idle,
)
from qlora_jax.cli.options import KINDS, dtype_argument, shard_argument, sharding, size
from qlora_jax.errors import Note


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the paths and how to quantize."""
    parser.add_argument("model", help="a dense Hugging Face folder, a .gguf file, or a Hub id")
    parser.add_argument("out", help="a new folder")
    parser.add_argument("--kind", choices=KINDS, default="nf4", help="the code (default nf4)")
    parser.add_argument(
        "--block-size", type=int, default=64, metavar="N", help="weights a scale (default 64)"
    )
    parser.add_argument("--no-double-quant", action="store_true", help="scales stay float32")
    parser.add_argument("--quantize-lm-head", action="store_true", help="an untied head too")
    dtype_argument(parser, "what stays dense: embeddings, norms")
    shard_argument(parser)
    parser.add_argument(
        "--report",
        action="store_true",
        help="what each weight lost: a table, and quantization.json and quantization.png in OUT",
    )
    init_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Quantizes, and prints where the result is."""
    from qlora_jax.cli.progress import bar
    from qlora_jax.quantization.policy import QuantizationConfig
    from qlora_jax.workflows.convert import quantize_checkpoint
    from qlora_jax.workflows.describe import describe

    refuse_idle(args)
    quantize, settings = quantize_checkpoint, {}
    if args.init is not None:
        from qlora_jax.adapters.closer import Closer
        from qlora_jax.workflows.closer import quantize_closer

        closer = Closer(args.init, **how_settings(args))
        quantize, settings = quantize_closer, {"how": closer, **lora_settings(args)}
    how = QuantizationConfig(
        args.kind, args.block_size, not args.no_double_quant, args.quantize_lm_head
    )
    with bar("quantizing") as progress:
        report, has_tokenizer = quantize(
            args.model,
            args.out,
            quantization=how,
            **settings,
            dtype=args.dtype,
            report=args.report,
            progress=progress,
            **sharding(args),
        )
    if args.report:
        from rich.console import Console

        Console(width=None if Console().is_terminal else 120).print(report.table())
        print(f"report     {args.out}/quantization.json, {args.out}/quantization.png")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Note)  # the source's, which were printed
        found = describe(args.out)
    bits = found.bits_per_parameter
    dense = args.dtype or f"{found.facts['dtype']} as the source"
    print(
        f"written    {args.out} ({args.kind}, the rest {dense}): {size(found.nbytes)}, "
        f"{bits:.2f} bits each in all"
    )
    if args.init is not None:
        together, alone = (100 * error.relative_error for error in (report.total, report.plain))
        folder = f"{args.out}/adapter"
        print(
            f"adapter    {folder} ({args.init}): train with model={args.out} and adapter={folder}"
        )
        print(f"closer     {together:.2f}% from the model, 4 bits alone {alone:.2f}%")
    if args.kind == "int4":
        print("note       int4 is read here alone: bitsandbytes and transformers know nf4 and fp4")
    if not has_tokenizer:
        print("note       the source has no tokenizer, so the copy has none")
