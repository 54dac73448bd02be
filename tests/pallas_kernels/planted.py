"""Kernels with a bug planted in their source, and how the interpreter catches it, if it does."""

import dataclasses
import importlib
import re
import types

import jax.numpy as jnp

from pallas_kernels.nf4_matmul import reference
from pallas_kernels.nf4_matmul.weight import LowRank
from tests.pallas_kernels import kernels
from tests.pallas_kernels.interpreted import interpreter
from tests.tolerances import INTERPRETED_RTOL

# Seconds. An unbroken kernel takes one or two here, several times that on a busy machine.
STALLED, SURELY_STALLED = 10, 120


@dataclasses.dataclass(frozen=True)
class Bug:
    """A replacement in the source of a backend, or of a module that it imports from.

    Attributes:
      what: the bug, in words; the test's name.
      old, new: the text, found exactly `times` times.
      caught: how, as `verdict` says it; several where threads' timing decides.
      module: whose source is changed.
      shape: index of the backend's shape that reaches the bug.
      direction: forward or backward.
      rank: of a low-rank term, 0 for none.
    """

    what: str
    old: str
    new: str
    caught: tuple[str, ...]
    module: str
    shape: int = 0
    direction: str = "forward"
    rank: int = 0
    times: int = 1

    def __str__(self) -> str:
        return self.what


def verdict(backend: kernels.Backend, case: Bug, module: types.ModuleType) -> str:
    """How a module's kernel fails on a case: `race`, `stall`, `protocol`, `numbers`; or `none`.

    Protocol: a rule of barriers or of copies, which the interpreter checks. Other errors are
    raised, for instance that the changed source is no program.
    """
    shape = backend.shape(case.shape, case.direction)
    w = kernels.weight(shape, case.direction)
    x = kernels.rows(shape, jnp.bfloat16)
    exact = kernels.product(x, reference.dense(w, jnp.float32), case.direction)
    low = None
    if case.rank:
        h = kernels.rows(dataclasses.replace(shape, contraction=case.rank), jnp.bfloat16)
        b = kernels.rows(kernels.Shape(case.rank, 0, shape.n), jnp.bfloat16)
        low = LowRank(h, b)
        exact = exact + kernels.product(h, b, "backward")
    seconds = STALLED if "stall" in case.caught else SURELY_STALLED
    try:
        with interpreter(backend.gpu, sms=shape.sms, seconds=seconds):
            y = module.product(x, w, low, transposed=case.direction == "backward")
            y.block_until_ready()
    except (RuntimeError, ValueError, AssertionError) as error:
        return kind_of(error)
    return "none" if kernels.error(y, exact) < INTERPRETED_RTOL["bfloat16"] else "numbers"


def kind_of(error: Exception) -> str:
    """The verdict that a message means; the error again if it means none."""
    text = str(error)
    if "RACE DETECTED" in text:
        return "race"
    if "did not end within" in text:
        return "stall"
    if re.search(r"barrier|copy_smem_to_gmem|wgmma_wait", text, re.IGNORECASE):
        return "protocol"
    raise error


def planted(backend: kernels.Backend, bug: Bug) -> types.ModuleType:
    """The backend's module, built anew from source with the bug in it."""
    if bug.module == backend.name:
        return built(backend.module, bug)
    original = importlib.import_module(f"pallas_kernels.nf4_matmul.{bug.module}")
    changed, fresh = built(original, bug), built(backend.module)
    for name, value in vars(fresh).items():
        if value is original:
            setattr(fresh, name, changed)
        elif name in vars(original) and value is vars(original)[name]:
            setattr(fresh, name, vars(changed)[name])
    return fresh


def built(module: types.ModuleType, bug: Bug | None = None) -> types.ModuleType:
    """A second module from the same file, changed by the bug; the imported one stays as it is."""
    with open(module.__file__) as file:
        source = file.read()
    if bug is not None:
        found = source.count(bug.old)
        assert found == bug.times, (
            f"{bug.what}: {bug.old!r} stands {found} times in {module.__name__}, not {bug.times}: "
            "write the bug anew for the changed source"
        )
        source = source.replace(bug.old, bug.new)
    fresh = types.ModuleType(module.__name__)
    fresh.__file__ = module.__file__
    exec(compile(source, module.__file__, "exec"), vars(fresh))
    return fresh
