"""Merges an adapter into its base as a dense model that transformers opens, and checks the result.

The written model is opened again; the largest difference of its logits from base + adapter is
printed, and one above the tolerance is an error.
"""

import argparse
from pathlib import Path

from qlora_jax.cli.options import (
    base_arguments,
    dtype_argument,
    how,
    shard_argument,
    sharding,
    written,
)
from qlora_jax.errors import InputError


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
    parser.add_argument(
        "--tolerance",
        type=float,
        metavar="X",
        help="largest logit difference (default 0.01 in float32, 0.25 in float16, 2 in bfloat16)",
    )
    base_arguments(parser)


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

    if args.tolerance is not None and not args.tolerance > 0:
        raise InputError("MERGE-TOLERANCE", "--tolerance", f"{args.tolerance}", "above 0")
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
        print(f"base       {args.model}: {choice.reason}; merging into the {args.base} weights")
        check = checked_merge(
            model,
            adapter,
            args.out,
            config=source.config,
            base=args.base,
            source=source if args.base == "original" else None,
            dtype=dtype,
            tolerance=args.tolerance,
            extra_files=files,
            **sharding(args),
        )
    print(written(args.out, dtype if args.dtype else f"{dtype} as the base"))
    print(
        f"checked    logits differ from base + adapter by {check.largest:.3g} at most, "
        f"{check.mean:.2g} on average (allowed {check.tolerance:g})"
    )
    print(f"           both rank the same token first at {check.same_choice:.1%} of positions")
    if check.from_training is not None:
        print(
            f"           from the 4-bit base + adapter that were trained they differ by "
            f"{check.from_training:.3g}"
        )
    if not has_tokenizer(files):
        print("note       neither base nor adapter has a tokenizer, so the result has none")
