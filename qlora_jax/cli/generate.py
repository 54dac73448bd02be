"""Writes on from a prompt, with or without an adapter, token by token.

The prompt goes into the model's chat template, or that of the adapter; --raw takes it as it is.
"""

import argparse
import sys

from qlora_jax.cli.options import base_arguments, how, positive
from qlora_jax.errors import InputError


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declares model, adapter, prompt and sampling."""
    parser.add_argument("model", help="a model's folder, a .gguf file, or a Hub id")
    parser.add_argument("--adapter", metavar="PATH", help="an adapter's folder")
    parser.add_argument(
        "--prompt", metavar="TEXT", help="the text; without it, what comes on stdin"
    )
    parser.add_argument("--raw", action="store_true", help="no chat template around the prompt")
    parser.add_argument(
        "--max-new-tokens", type=positive, default=256, metavar="N", help="at most (default 256)"
    )
    group = parser.add_argument_group("sampling (greedy by default)")
    group.add_argument("--temperature", type=float, default=0.0, metavar="X", help="0 is greedy")
    group.add_argument(
        "--top-k", type=int, default=0, metavar="X", help="keep the k likeliest; 0 is off"
    )
    group.add_argument(
        "--top-p", type=float, default=1.0, metavar="X", help="keep this much probability"
    )
    group.add_argument(
        "--min-p", type=float, default=0.0, metavar="X", help="relative to the likeliest"
    )
    group.add_argument(
        "--repetition-penalty",
        type=float,
        default=1.0,
        metavar="X",
        help="over 1 avoids what was said",
    )
    group.add_argument(
        "--seed", type=int, default=0, metavar="N", help="the same seed gives the same text"
    )
    parser.add_argument(
        "--stop", action="append", metavar="TOKEN", help="ends the text; may come again"
    )
    base_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Streams the text to stdout; what is said about it goes to stderr."""
    from qlora_jax.cli.progress import bar
    from qlora_jax.inference.generate import stream_text
    from qlora_jax.inference.sampling import Sampling
    from qlora_jax.workflows.adapter_folder import load_adapter
    from qlora_jax.workflows.open_as_trained import open_as_trained

    sampling = Sampling(
        args.temperature, args.top_k, args.top_p, args.min_p, args.repetition_penalty
    )
    if args.prompt is None and sys.stdin.isatty():
        print("prompt, then Ctrl-D:", file=sys.stderr)
    try:
        prompt = args.prompt if args.prompt is not None else sys.stdin.read().rstrip("\n")
    except UnicodeDecodeError as error:
        raise InputError("DATA-UTF8", "stdin", f"is not UTF-8 at byte {error.start}") from None
    if not prompt:
        raise InputError("GEN-EMPTY", "prompt", "no text", "a prompt", "--prompt TEXT")
    with bar("loading the model") as progress:
        model, tokenizer, _ = open_as_trained(
            args.model, args.adapter, progress=progress, **how(args)
        )
    adapter = load_adapter(args.adapter, model, any_base=args.any_base) if args.adapter else None
    pieces = stream_text(
        model,
        tokenizer,
        prompt,
        adapter=adapter,
        max_new_tokens=args.max_new_tokens,
        sampling=sampling,
        seed=args.seed,
        stop_tokens=args.stop,
        chat=not args.raw and bool(tokenizer.chat_template),
    )
    for piece in pieces:
        print(piece, end="", flush=True)
    print()
