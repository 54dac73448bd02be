"""Talks with a model, with or without adapters, answer after answer.

What is said goes through the model's chat template, or that of the first adapter, the whole
conversation each time. Lines that begin with / are commands: /help lists them.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from qlora_jax.cli.options import base_arguments, how, positive, sampling_arguments, sampling_of
from qlora_jax.errors import InputError, listed, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qlora_jax.adapters.adapter import Adapter
    from qlora_jax.inference.weights import ForDecoding

HELP = """/adapter NAME   answer with this adapter from now on; /adapter none for the base alone
/reset          forget the conversation
/help           this list
/quit           leave; so do Ctrl-D and Ctrl-C"""
NONE = "none"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the model, the adapters and the sampling."""
    parser.add_argument("model", help="a model's folder, a .gguf file, or a Hub id")
    parser.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="[NAME=]PATH",
        help="an adapter's folder, and how you call it; may come again, the first answers first",
    )
    parser.add_argument("--system", metavar="TEXT", help="what the conversation begins with")
    parser.add_argument(
        "--max-new-tokens", type=positive, default=512, metavar="N", help="an answer (default 512)"
    )
    sampling_arguments(parser)
    base_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Reads lines and answers them until there are no more."""
    from qlora_jax.cli.progress import bar
    from qlora_jax.inference.weights import for_decoding
    from qlora_jax.workflows.adapter_folder import load_adapter
    from qlora_jax.workflows.open_as_trained import open_as_trained

    paths, sampling = named_paths(args.adapter), sampling_of(args)
    first = next(iter(paths.values()), None)
    with bar("loading the model") as progress:
        model, tokenizer, choice = open_as_trained(
            args.model, first, progress=progress, **how(args)
        )
    adapters = {n: load_adapter(p, model, any_base=args.any_base) for n, p in paths.items()}
    fast = for_decoding(model, args.decode_weights)
    say(f"base {choice.reason}; weights {fast.reason}; compiling (once); /help lists the commands")
    options = {"sampling": sampling, "max_new_tokens": args.max_new_tokens}
    options |= {"cache_dtype": args.cache_dtype}
    chat = Chat(fast, tokenizer, adapters, options, args.seed, args.system)
    try:
        for line in lines():
            if chat.hear(line):
                return
    except KeyboardInterrupt:
        say("")


class Chat:
    """One conversation: what was said, and who answers."""

    def __init__(
        self,
        model: "ForDecoding",
        tokenizer: "PreTrainedTokenizerBase",
        adapters: dict[str, "Adapter"],
        options: dict[str, Any],
        seed: int,
        system: str | None,
    ):
        self.model, self.tokenizer, self.options = model, tokenizer, options
        self.adapters: dict[str, Adapter | None] = {**adapters, NONE: None}
        self.using = next(iter(self.adapters))
        self.seed, self.system = seed, system
        self.reset()

    def reset(self) -> None:
        """Forgets what was said."""
        begun = [] if self.system is None else [{"role": "system", "content": self.system}]
        self.messages: list[dict[str, Any]] = begun

    def hear(self, line: str) -> bool:
        """Does what a line asks for, and says whether that was the last one."""
        verb, _, rest = line.strip().partition(" ")
        if not verb:
            return False
        if not verb.startswith("/"):
            self.told(self.answer, line)
            return False
        if verb == "/quit":
            return True
        if verb == "/adapter":
            self.told(self.switch, rest.strip())
        elif verb == "/reset":
            self.reset()
            say("the conversation is forgotten")
        elif verb == "/help":
            say(HELP)
        else:
            say(f"no command {verb}; /help lists them")
        return False

    def told(self, act: Callable[[str], None], text: str) -> None:
        """Does something that can be refused, which does not end the conversation."""
        try:
            act(text)
        except InputError as error:
            say(str(error))
            if error.code == "GEN-LENGTH" and self.messages:
                say("the conversation fills the model's positions; /reset begins another")

    def switch(self, name: str) -> None:
        """Answers with another adapter; the conversation stays."""
        if name not in self.adapters:
            close = nearest(name, self.adapters)
            hint = f"/adapter {close[0]}" if close else "/help"
            found = f"no adapter {name!r}" if name else f"this is {self.using}"
            expected = f"one of {listed(self.adapters)}"
            raise InputError("CHAT-ADAPTER", "/adapter", found, expected, hint)
        self.using = name
        say(f"adapter {name}")

    def answer(self, line: str) -> None:
        """Prints the answer as it comes, and how fast it came."""
        from qlora_jax.inference.generate import stream_text

        messages = [*self.messages, {"role": "user", "content": line}]
        clock = Clock()
        pieces = stream_text(
            self.model,
            self.tokenizer,
            messages,
            adapter=self.adapters[self.using],
            seed=self.seed + len(self.messages),
            chat=True,
            on_token=clock.tick,
            **self.options,
        )
        said = []
        for piece in pieces:
            said.append(piece)
            print(piece, end="", flush=True)
        print(flush=True)
        text = "".join(said).replace("\0", "")  # which no text may hold when it is encoded again
        self.messages = [*messages, {"role": "assistant", "content": text}]
        say(clock.told())


class Clock:
    """When tokens came: how long the first one took, and how fast the others were."""

    def __init__(self):
        self.begun, self.times = time.perf_counter(), []

    def tick(self) -> None:
        """A token is here."""
        self.times.append(time.perf_counter())

    def told(self) -> str:
        """In words. The first token waits for the prompt, and for compiling; the rest do not."""
        if not self.times:
            return "0 tokens"
        count, first = len(self.times), self.times[0] - self.begun
        text = f"{count} token{'s' * (count > 1)}, the first after {first:.2f} s"
        if count > 1:
            rate = (count - 1) / max(self.times[-1] - self.times[0], 1e-9)
            text += f", then {rate:.1f} tokens per second"
        return text


def named_paths(given: list[str]) -> dict[str, str]:
    """NAME=PATH of each --adapter, in order; a path alone is named by its last part.

    Raises:
      InputError: CHAT-ADAPTER, a name that comes twice, or none.
    """
    paths: dict[str, str] = {}
    for one in given:
        name, equals, path = one.partition("=")
        if not equals or os.path.isdir(one):  # a path may itself hold a `=`
            name, path = one.rstrip("/").rsplit("/", 1)[-1], one
        if not name or not path or name == NONE:
            raise InputError("CHAT-ADAPTER", f"--adapter {one}", "no name and path", "NAME=PATH")
        if name in paths:
            found = f"{name!r} comes twice"
            raise InputError("CHAT-ADAPTER", f"--adapter {one}", found, "names that differ")
        paths[name] = path
    return paths


def lines() -> Iterator[str]:
    """What is typed, or comes on a pipe, line by line; the prompt is shown to people alone."""
    shown = sys.stdin.isatty()
    while True:
        if shown:
            print("> ", end="", file=sys.stderr, flush=True)
        try:
            line = sys.stdin.readline()
        except UnicodeDecodeError as error:
            found = f"is not UTF-8 at byte {error.start}"
            raise InputError("DATA-UTF8", "stdin", found) from None
        if not line:
            return
        yield line.rstrip("\n")


def say(text: str) -> None:
    """What is not the model's: to stderr, so that answers alone are on stdout."""
    print(text, file=sys.stderr, flush=True)
