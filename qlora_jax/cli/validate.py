"""Checks a run: configuration, model, template, data, targets; all that is wrong, at once.

Exit code 2 when anything is wrong. No weight is read, nothing is written.
"""

import argparse
import sys

from qlora_jax.cli.options import config_arguments
from qlora_jax.errors import printable

BAD_INPUT = 2


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the configuration."""
    config_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Prints an `ok` line for each part that is right, and every error."""
    from qlora_jax.workflows.validation import validate

    found = validate(args.config, args.overrides)
    for part, text in found.fine:
        print(printable(f"ok  {part:<10} {text}"))
    for problem in found.problems:
        print(problem, file=sys.stderr)
    if found.problems:
        count = len(found.problems)
        print(f"{count} error{'s' if count > 1 else ''}; the rest is as above", file=sys.stderr)
        return BAD_INPUT
    print(f"all is well: qlora-jax train {args.config}")
    return 0
