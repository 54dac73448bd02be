"""The table of commands: each is imported when it is called, so that `--help` is quick.

A command is a module of this folder with two functions: `arguments(parser)` declares its options,
`run(args)` calls the library and prints; what it returns is the exit code, None means 0.
"""

import argparse
import errno
import importlib
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import NoReturn

from qlora_jax import process
from qlora_jax.cli.compile_cache import use_compile_cache
from qlora_jax.errors import (
    FULL,
    DoesNotFit,
    InputError,
    Note,
    QloraError,
    StorageError,
    first_line,
    listed,
    nearest,
)

COMMANDS = {
    "train": "fine-tune an adapter on a 4-bit model, as a configuration file says",
    "validate": "check a run without its weights: all that is wrong, at once",
    "plan": "memory and time that a run needs, before it starts; for a GPU that need not be here",
    "data": "show what a run would train on: text, trained tokens, lengths",
    "quantize": "write a model as a 4-bit checkpoint, and what that lost",
    "evaluate": "loss and perplexity of a model, and of adapters beside it",
    "generate": "write on from a prompt, or from several at once",
    "chat": "talk with a model, and switch between adapters",
    "merge": "merge an adapter into its base, and check the result",
    "compose": "combine adapters into one, with weights that are given or fitted",
    "export": "write a model or an adapter in another format",
    "inspect": "what is in a model or an adapter: layers, shapes, bits per parameter, targets",
    "doctor": "versions, devices, memory, and whether the kernels compute right here",
}

USAGE = "usage: qlora-jax COMMAND ...      (qlora-jax COMMAND --help says more)"
INTERRUPTED = 130  # 128 + SIGINT, what shells expect


class Parser(argparse.ArgumentParser):
    """argparse, with its errors as ours: one line and exit code 2."""

    def error(self, message: str) -> NoReturn:
        """Raises instead of printing the usage."""
        raise InputError("CLI-ARGS", self.prog, message, hint=f"{self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and gives the exit code: 0, that of the error, or 130 after Ctrl-C."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = shown(warnings.showwarning)
            return dispatch(argv)
    except QloraError as error:
        if "--debug" in argv:
            raise
        print(error, file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # `qlora-jax ... | head` is no error. Python would complain once more when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (OSError, MemoryError, RuntimeError) as error:
        told = as_ours(error)
        if "--debug" in argv or told is None:
            raise
        print(told, file=sys.stderr)
        return told.exit_code


def as_ours(error: Exception) -> QloraError | None:
    """What the system or an allocator refused; None for what only a bug of ours explains."""
    if isinstance(error, OSError):
        return system_error(error)
    if not process.ran_out(error):
        return None
    hint = "qlora-jax plan says what a run needs; shorter or fewer rows take less"
    return DoesNotFit("MEMORY", "memory", f"ran out: {first_line(error)}", hint=hint)


def system_error(error: OSError) -> QloraError:
    """What the system refused about a path: it is too long, in a folder without permission."""
    where, found = error.filename or "system", f"{error.strerror or error}"
    if error.errno in (*FULL, errno.EIO):
        return StorageError("OUT-WRITE", where, found)
    return InputError("FILE-READ", where, f"cannot be used: {found}", hint="another path")


def shown(otherwise: Callable) -> Callable:
    """Prints a Note as one line; other warnings as Python does."""

    def show(message, category, *where, **more) -> None:
        if issubclass(category, Note):
            print(f"note       {message}", file=sys.stderr)
        else:
            otherwise(message, category, *where, **more)

    return show


def dispatch(argv: list[str]) -> int:
    """Imports the command that `argv` names, parses its options and runs it.

    Raises:
      InputError: an unknown command or option.
    """
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(overview())
        return 0
    if argv[0] == "--version":
        from importlib.metadata import version

        print(version("qlora-jax"))
        return 0
    verb, *rest = argv
    if verb not in COMMANDS:
        close = nearest(verb, COMMANDS)
        hint = f"qlora-jax {close[0]}" if close else "qlora-jax --help"
        found = f"unknown command {verb!r}"
        raise InputError("CLI-COMMAND", "qlora-jax", found, f"one of {listed(COMMANDS)}", hint)
    command = importlib.import_module(f"qlora_jax.cli.{verb}")
    parser = Parser(
        prog=f"qlora-jax {verb}",
        description=command.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.arguments(parser)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_intermixed_args(rest)
    use_compile_cache()
    code = command.run(args)
    sys.stdout.flush()
    return code or 0


def overview() -> str:
    """What `--help` prints."""
    width = max(map(len, COMMANDS))
    rows = (f"  {verb:<{width}}  {about}" for verb, about in COMMANDS.items())
    return "\n".join(["QLoRA for JAX.", "", USAGE, "", *rows])
