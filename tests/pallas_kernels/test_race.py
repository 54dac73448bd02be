"""The interpreter finds planted bugs in every kernel, each in the way that it should.

A kernel that the interpreter passes is only as right as the interpreter is strict: these are the
mistakes that it is trusted to see.
"""

import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu

from tests.pallas_kernels import (
    ampere_bugs,
    blackwell_bugs,
    hopper_bugs,
    kernels,
    mma_on_cpu,
    small_m_bugs,
)
from tests.pallas_kernels.interpreted import interpreter
from tests.pallas_kernels.planted import planted, verdict
from tests.tiers import tiered

mma_on_cpu.install()

BACKENDS = {backend.name: backend for backend in kernels.BACKENDS}
PLANTED = {
    "hopper": hopper_bugs.BUGS,
    "blackwell": blackwell_bugs.BUGS,
    "ampere": ampere_bugs.BUGS,
    "small_m": small_m_bugs.BUGS,
}
BUGS = [(name, bug) for name, bugs in PLANTED.items() for bug in bugs]
# Each way to be caught, once a backend: `race`, `stall`, `protocol`, `numbers`.
QUICK = [*{(name, bug.caught): (name, bug) for name, bug in BUGS if len(bug.caught) == 1}.values()]
CASES = {(name, bug.shape, bug.direction, bug.rank): bug for name, bug in BUGS}


@pytest.mark.parametrize(("name", "bug"), tiered(BUGS, QUICK), ids=str)
def test_caught(name, bug):
    assert verdict(BACKENDS[name], bug, planted(BACKENDS[name], bug)) in bug.caught


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=str(case), marks=pytest.mark.slow) for case in CASES]
)
def test_unbroken_kernels_pass(case):
    backend = BACKENDS[case[0]]
    assert verdict(backend, CASES[case], backend.module) == "none"


def test_bugs_enough():
    assert len(BUGS) >= 15
    assert set(PLANTED) == {name for name, backend in BACKENDS.items() if backend.fused}


def test_the_stricter_interpreter_is_left_behind():
    """When a kernel fails too: other tests get jax's own."""

    def callbacks():
        return gpu_callbacks.wgmma, gpu_callbacks.wait_smem_to_gmem, plgpu.wgmma_wait

    def fail():
        with interpreter("h100", sms=1):
            assert not set(callbacks()) & set(own)
            raise RuntimeError("a kernel failed")

    own = callbacks()
    with pytest.raises(RuntimeError, match="a kernel failed"):
        fail()
    assert callbacks() == own
