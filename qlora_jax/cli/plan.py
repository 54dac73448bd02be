"""Says before a run what it needs: bytes by owner, whether it fits, how long a step takes at least.

From config.json and the settings alone: no weight is read, and the GPU need not be there. `auto`
becomes the quickest way that fits. What was not measured is called a bound or an estimate.
"""

import argparse
import contextlib
import gc
import json
from collections.abc import Iterator

from qlora_jax.cli.options import config_arguments
from qlora_jax.errors import printable


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the configuration, --gpu, --compile and --json."""
    config_arguments(parser)
    parser.add_argument(
        "--gpu",
        metavar="NAME|SIZE",
        help="a GPU by name, such as rtx4090, or what programs may take of one, such as 24GB; "
        "by default the device of this machine",
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="compile the step for the GPU, which need not be there, and take XLA's own figures",
    )
    parser.add_argument("--json", action="store_true", help="print one line of JSON, the last")


def run(args: argparse.Namespace) -> None:
    """Prints the plan."""
    with uncollected():
        tell(args)


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Without Python's garbage collector: what tracing makes is left for the process's end.

    It would be looked through for 0.3 s meanwhile, and for 0.4 s when Python exits.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if enabled:
            gc.enable()


def tell(args: argparse.Namespace) -> None:
    """`run`."""
    if args.compile:
        from qlora_jax.memory.aot import load_plugin

        load_plugin()  # before anything asks jax for its devices
    from qlora_jax.train.config import TrainConfig
    from qlora_jax.workflows.planning import planned

    config = TrainConfig.from_yaml(args.config, args.overrides, required=("model",))
    plan = planned(config, args.gpu, compiled=args.compile)
    if args.json:
        print(json.dumps(plan.as_json()))
    else:
        print("\n".join(map(printable, plan.table())))
