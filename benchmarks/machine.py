"""What a measurement was made on."""

import datetime
from pathlib import Path
from typing import Any

from qlora_jax.workflows.environment import environment


def described() -> dict[str, Any]:
    """The date, the machine and the versions, for a file in results/."""
    here = environment()
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    memory = here["memory"]["total"] / 1e9
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": f"{here['cpus']} cores of {cpu}, {memory:.0f} GB",
        "versions": {"python": here["python"], **here["packages"]},
    }
