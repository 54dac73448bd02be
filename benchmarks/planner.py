"""Holds the planner's figures for this CPU against XLA's and against what runs really take.

    python -m benchmarks.planner --model PATH --record     every case; half an hour
    python -m benchmarks.planner --model PATH --case NAME  some; --case more than once

A case is a configuration of two steps. Its temporaries are compared with XLA's analysis of the
compiled gradients, its host peak with the largest resident memory of `qlora-jax train`, which is a
process of its own; loading, compiling, two steps and writing the adapter are all in it. Then the
same run is started with less memory than the plan, which has to be refused. Bars: 10%, 15%, exit 4.

`--model` is SmolLM2's .gguf file; the others are random weights of real models' shapes with its
tokenizer. One line of JSON a case, and `--record` writes results/planner.json.
"""

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import random_model
from benchmarks.machine import described
from qlora_jax.memory import budget
from qlora_jax.memory.planner import Plan, plan
from qlora_jax.memory.program import arguments
from qlora_jax.train.config import TrainConfig
from qlora_jax.train.step import gradients
from qlora_jax.workflows.companions import companions_of
from qlora_jax.workflows.demo import write_text
from qlora_jax.workflows.open import open_source
from qlora_jax.workflows.planning import shape_of

RESULTS = Path(__file__).parent / "results" / "planner.json"
SMALL = "SmolLM2-135M"
LIMIT = 0.9  # of the plan, for the run that has to be refused
# A limit of address space, which holds much that is never touched: what is there already is added.
LIMITED = """import resource, jax
from qlora_jax import process
jax.devices()
limit = process.address_space() + {room} - process.resident()
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
"""
TRAIN = """import sys
from qlora_jax.cli.main import main
sys.exit(main(["train", {config!r}]))
"""


@dataclasses.dataclass(frozen=True)
class Case:
    """A run.

    Attributes:
      model: SMALL, or one of random_model.SHAPES.
      length, rows: of a micro batch.
      rank: of the adapter, on all linears.
      remat: gradient_checkpointing.
      dtype: of activations.
      others: further settings.
    """

    model: str
    length: int
    rank: int
    remat: str
    dtype: str = "bfloat16"
    rows: int = 1
    others: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Unlike any other case's."""
        size = f"{self.rows}x{self.length}"
        return " ".join((self.model, size, f"r{self.rank}", self.remat, self.dtype, *self.others))

    def config(self, model: Path, folder: Path) -> TrainConfig:
        """Two steps on `folder`/train.jsonl."""
        settings = {"model": model, "dataset": folder / "train.jsonl", "overlong": "split"}
        settings |= {"dtype": self.dtype, "max_seq_length": self.length, "lora_r": self.rank}
        settings |= {"batch_size": self.rows, "gradient_checkpointing": self.remat}
        settings |= {"gradient_accumulation_steps": 1, "max_steps": 2, "output_dir": folder / "out"}
        lines = [f"{key}: {value}\n" for key, value in settings.items()]
        path = folder / "run.yaml"
        path.write_text("".join(lines))
        return TrainConfig.from_yaml(path, overrides=self.others)


CASES = (
    Case(SMALL, 256, 16, "none"),
    Case(SMALL, 256, 16, "full"),
    Case(SMALL, 1024, 16, "none"),
    Case(SMALL, 1024, 64, "save-attention"),
    Case(SMALL, 512, 256, "full"),
    Case(SMALL, 512, 16, "none", "float32"),
    Case(SMALL, 256, 16, "none", rows=4),
    Case(SMALL, 256, 16, "none", others=("load_in_4bit=false",)),
    Case("SmolLM2-360M", 512, 16, "none"),
    Case("SmolLM2-360M", 1024, 8, "full"),
    Case("Qwen2.5-0.5B", 512, 16, "full"),
    Case("Qwen2.5-0.5B", 256, 64, "none"),
    Case("Qwen3-0.6B", 512, 16, "save-attention"),
    Case("Llama-3.2-1B", 256, 16, "none"),
    Case("Llama-3.2-1B", 1024, 16, "full"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="SmolLM2-135M, a .gguf file")
    parser.add_argument("--case", action="append", help="its name, as the lines have it")
    parser.add_argument("--record", action="store_true", help="write results/planner.json")
    args = parser.parse_args()
    cases = [case for case in CASES if args.case is None or case.name in args.case]
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_text(folder / "text")
        for model in dict.fromkeys(case.model for case in cases):
            path = args.model.absolute() if model == SMALL else written(model, folder, args.model)
            for case in (case for case in cases if case.model == model):
                rows.append(compared(case, path, folder / "text"))
                print(json.dumps(rows[-1]), flush=True)
    if args.record:
        RESULTS.write_text(json.dumps({**described(), "rows": rows}, indent=2) + "\n")


def written(model: str, folder: Path, small: Path) -> Path:
    """A folder of random weights with the small model's tokenizer."""
    path = folder / model
    with open_source(small) as source:
        random_model.write(random_model.SHAPES[model], path, companions_of(source))
    return path


def compared(case: Case, model: Path, folder: Path) -> dict[str, Any]:
    """What was planned, what XLA says, what a run took, and how a run with less memory ended."""
    config = case.config(model, folder)
    path = folder / "run.yaml"
    path.write_text(config.to_yaml())
    found = plan(shape_of(config.model), config, budget.of_here())
    device = found.estimate.device
    planned = sum(device[owner] for owner in ("activations", "loss", "workspace"))
    real = xla_temporaries(found)
    code, peak = trained(path, folder)
    if code:
        printed = (folder / "printed").read_text()
        raise SystemExit(f"{case.name}: train ended with code {code}\n{printed}")
    refused, _ = trained(path, folder, room=int(LIMIT * whole(found)))
    return {
        "case": case.name,
        "temporaries": {"planned": planned, "xla": real, "off": planned / real - 1},
        "host": {"planned": whole(found), "measured": peak, "off": whole(found) / peak - 1},
        "with less memory": f"exit {refused}",
    }


def whole(found: Plan) -> int:
    """Device and host are one memory on a CPU."""
    return found.device_bytes + found.host_bytes


def xla_temporaries(found: Plan) -> int:
    """Of the gradients, compiled for this machine."""
    micro, choices = found.micro, found.choices
    params, model, batch, *_ = arguments(micro, "off")
    step = gradients.lower(
        params, model, batch, spec=micro.spec, remat=choices.gradient_checkpointing
    )
    return step.compile().memory_analysis().temp_size_in_bytes


def trained(config: Path, folder: Path, room: int | None = None) -> tuple[int, int]:
    """(exit code, largest resident memory) of a run; `room` is all that it may take."""
    shutil.rmtree(folder / "out", ignore_errors=True)
    begin = LIMITED.format(room=room) if room else ""
    code = f"{begin}{TRAIN.format(config=str(config))}"
    with open(folder / "printed", "w+") as printed:
        child = subprocess.Popen([sys.executable, "-c", code], stdout=printed, stderr=printed)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    return child.returncode, usage.ru_maxrss * 1024


if __name__ == "__main__":
    main()
