"""Writes on from a prompt, with or without an adapter, token by token.

The prompt goes into the model's chat template, or that of the adapter; --raw takes it as it is.
"""

import argparse
import sys

from qlora_jax.cli.options import (
    Once,
    base_arguments,
    how,
    positive,
    sampling_arguments,
    sampling_of,
)
from qlora_jax.errors import InputError


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declares model, adapter, prompt and sampling."""
    parser.add_argument("model", help="a model's folder, a .gguf file, or a Hub id")
    parser.add_argument(
        "--adapter", action=Once, metavar="PATH", help="an adapter's folder, for all prompts"
    )
    parser.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="the text; without it, what comes on stdin; may come again: a batch",
    )
    parser.add_argument("--raw", action="store_true", help="no chat template around the prompt")
    parser.add_argument(
        "--max-new-tokens", type=positive, default=256, metavar="N", help="at most (default 256)"
    )
    sampling_arguments(parser)
    parser.add_argument(
        "--stop",
        action="append",
        metavar="TOKEN",
        help="a token, or its id, that ends the text; may come again",
    )
    base_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Streams the text to stdout, of several prompts each when all are done."""
    from qlora_jax.cli.progress import bar
    from qlora_jax.inference.generate import stream_batch
    from qlora_jax.inference.weights import for_decoding
    from qlora_jax.workflows.adapter_folder import load_adapter
    from qlora_jax.workflows.open_as_trained import open_as_trained

    prompts, sampling = given_prompts(args.prompt), sampling_of(args)
    with bar("loading the model") as progress:
        model, tokenizer, choice = open_as_trained(
            args.model, args.adapter, progress=progress, **how(args)
        )
    adapter = load_adapter(args.adapter, model, any_base=args.any_base) if args.adapter else None
    fast = for_decoding(model, args.decode_weights, args.max_new_tokens)
    chat = not args.raw and bool(tokenizer.chat_template)
    told = "" if args.raw or chat else "; no chat template: the prompt is taken as it is"
    print(f"base {choice.reason}; weights {fast.reason}{told}; compiling (once)", file=sys.stderr)
    pieces = stream_batch(
        fast,
        tokenizer,
        prompts,
        adapter=adapter,
        max_new_tokens=args.max_new_tokens,
        sampling=sampling,
        seed=args.seed,
        stop_tokens=args.stop,
        chat=chat,
        cache_dtype=args.cache_dtype,
    )
    if len(prompts) == 1:
        for _, piece in pieces:
            print(piece, end="", flush=True)
        print()
        return
    texts = [""] * len(prompts)
    for row, piece in pieces:
        texts[row] += piece
    for number, text in enumerate(texts, 1):
        print(f"==> prompt {number} <==\n{text}")


def given_prompts(given: list[str] | None) -> list[str]:
    """The prompts, or what comes on stdin as one.

    Raises:
      InputError: GEN-EMPTY, one without text; DATA-UTF8.
    """
    if given is None and sys.stdin.isatty():
        print("prompt, then Ctrl-D:", file=sys.stderr)
    try:
        prompts = given if given is not None else [sys.stdin.read().rstrip("\n")]
    except UnicodeDecodeError as error:
        raise InputError("DATA-UTF8", "stdin", f"is not UTF-8 at byte {error.start}") from None
    if not all(prompts):
        raise InputError("GEN-EMPTY", "prompt", "no text", "a prompt", "--prompt TEXT")
    return prompts
