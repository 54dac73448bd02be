"""R33: a host without room for a page of optimizer state ends a step in one line.

That the checkpoints before are good is shown by tests/workflows/test_trainer.py.
"""

import subprocess
import sys

import pytest

RULE = "R33"
# A page of 8.4 MB goes home when the address space is limited to what is taken, and full.
PROGRAM = """
import resource

import jax
import numpy as np

from qlora_jax.errors import DoesNotFit
from qlora_jax.optim.paged_adamw import paged_adamw
from qlora_jax.placement import to_device

params, grads = to_device([{"w": np.ones((2, 1024, 1024), np.float32)} for _ in range(2)])
optimizer = paged_adamw(1e-3, memory="host", page_bytes=1)
state = optimizer.init(params)
params, state = optimizer.apply(params, grads, state)
page = optimizer.fetched(state, 0)
jax.block_until_ready((params, state, page))
with open("/proc/self/statm") as file:
    taken = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken, taken))
hog = []
try:
    while True:
        hog.append(np.ones(2**19, np.uint8))
except MemoryError:
    pass
try:
    optimizer.wait(optimizer.home(0, page))
except DoesNotFit as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits and /proc as on Linux")
def test_a_limit_of_memory_is_said_in_one_line():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(
        "error[OPT-HOST]: optim_memory: no room in pinned_host memory for"
    )
    assert done.stdout.count("\n") == 1
