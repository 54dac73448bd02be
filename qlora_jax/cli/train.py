"""Fine-tunes an adapter on a frozen 4-bit model, as a configuration file says.

The folder `output_dir` becomes a PEFT adapter; Ctrl-C and SIGTERM save a checkpoint first.
"""

import argparse
from typing import TYPE_CHECKING

from qlora_jax.cli.options import config_arguments

if TYPE_CHECKING:
    from qlora_jax.workflows.trainer import Trainer


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the configuration, --resume and --dry-run."""
    config_arguments(parser)
    parser.add_argument(
        "--resume", metavar="auto|PATH", help="go on from the newest checkpoint, or from this one"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="open and print everything, and stop before step 1"
    )


def run(args: argparse.Namespace) -> None:
    """Opens everything and trains."""
    from qlora_jax.cli.progress import bar
    from qlora_jax.train.config import TrainConfig
    from qlora_jax.workflows.header import header
    from qlora_jax.workflows.training import open_run

    config = TrainConfig.from_yaml(args.config, args.overrides)
    with bar("loading the model") as progress:
        trainer = open_run(config, resume=args.resume is not None, say=plain, progress=progress)
    if args.dry_run:
        print("\n".join(header(trainer)))
        print("dry run    all is well; nothing was trained or written")
        return
    fit(trainer, args.resume)


def plain(line: str) -> None:
    """A line that a pipe shows at once."""
    print(line, flush=True)


def fit(trainer: "Trainer", resume: str | None) -> None:
    """Trains, with a bar below the rows when stdout is a terminal."""
    from rich.console import Console

    from qlora_jax.cli.progress import drawn

    console = Console()
    if not console.is_terminal:
        trainer.fit(resume)
        return
    with drawn(console, transient=True) as progress:
        task = progress.add_task("training", total=trainer.total_steps)
        trainer.say = lambda line: progress.console.print(line, markup=False, highlight=False)
        trainer.on_step = lambda step, total: progress.update(task, completed=step, total=total)
        trainer.fit(resume)
