"""The plans of the kernel of few rows, and what it refuses."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import gpu
from pallas_kernels.backends import Unsupported
from pallas_kernels.nf4_matmul import small_m
from pallas_kernels.nf4_matmul.cases import CASES
from pallas_kernels.nf4_matmul.on_gpu import OnGpu
from pallas_kernels.nf4_matmul.small_m import Plan, share
from tests.pallas_kernels import kernels
from tests.pallas_kernels.interpreted import interpreter

FEW = [case for case in CASES if case.m <= small_m.MOST]
PLANS = [
    (target, case, share(case.m, case.n, case.k, target, alone=True))
    for target in gpu.KNOWN.values()
    for case in FEW
]


def test_every_step_counts_once():
    for _, case, plan in PLANS:
        begins = [plan.begin(split) for split in range(plan.splits + 1)]
        assert begins[0] == 0
        assert begins[-1] * plan.step == case.k
        lengths = np.diff(begins)
        assert set(lengths) <= {plan.most, plan.most - 1}, "only a first step may be dropped"
        assert lengths[0] == plan.most, "no step before the first is read"


def test_plans_fill_the_gpu():
    """The busiest SM has at most a quarter more than its share, and two steps."""
    for target, case, plan in PLANS:
        fair = plan.tiles * plan.steps / target.sms
        busiest = -(-plan.tiles * plan.splits // target.sms) * plan.most
        assert busiest <= 1.25 * fair + 2, (target.name, str(case), plan)


def test_plans_fit_into_shared_memory():
    for target, case, plan in PLANS:
        ring = plan.stages * (plan.rows * plan.step // 2 + 2 * plan.columns * plan.step)
        assert ring + small_m.RESERVED <= target.shared_bytes, (target.name, str(case), plan)


def test_a_plan_for_an_h100():
    """64 tiles, cut in 4, are 256 blocks on 132 SMs."""
    plan = share(1, 4096, 4096, gpu.KNOWN["h100"], alone=True)
    assert plan == Plan(4096, 8, 64, 64, splits=4, steps=8, step=512, stages=4, whole=False)
    plan = share(1, 14336, 4096, gpu.KNOWN["h100"], alone=True)
    assert plan == Plan(14336, 8, 64, 224, splits=1, steps=8, step=512, stages=4, whole=True)
    plan = share(1, 14336, 4096, gpu.KNOWN["h100"], alone=False)
    assert not plan.whole, "an adapter's term is added before the sum is rounded"


def refusal(direction, shape):
    w = kernels.weight(shape, direction)
    run = getattr(OnGpu("small_m"), direction)
    with interpreter("h100", sms=1), pytest.raises(Unsupported) as reason:
        run(kernels.rows(shape, jnp.bfloat16), w)
    return str(reason.value)


def test_what_is_refused_says_why():
    many, narrow = kernels.Shape(17, 64, 64), kernels.Shape(1, 56, 64)
    assert refusal("forward", many) == "x has 17 rows; this kernel takes at most 16"
    assert refusal("forward", narrow) == "W is (56, 64): a tile is 64 rows of W"
    assert "paired in registers" in refusal("backward", kernels.Shape(1, 64, 64))
