"""The paper roofline, where it can be worked out by hand."""

import dataclasses

import pytest

from benchmarks import roofline
from pallas_kernels.gpu import KNOWN

H100 = KNOWN["h100"]
CODE = roofline.Code(
    instructions=4.0,
    half_rate=2.0,
    weights=8192,  # 128 columns by 64
    rows=256,
    blocks=32,
    resident=1,
    warp_mma=False,
    partial_bytes=0,
)


def test_ideal_bf16_is_bound_by_memory_or_by_the_tensor_cores():
    few = roofline.ideal_bf16(H100, 16, 4096, 4096)
    assert few == pytest.approx(2 * (4096 * 4096 + 2 * 16 * 4096) / H100.bandwidth)
    many = roofline.ideal_bf16(H100, 4096, 4096, 4096)
    assert many == pytest.approx(2 * 4096**3 / H100.flops)


def test_a_block_a_tile():
    bound = roofline.bound(H100, CODE, 256, 4096, 4096)
    steps = 4096 // 64
    assert bound.issue == pytest.approx((steps * 256 * 4.0 / 4 + roofline.FILL) / H100.clock)
    assert bound.half == pytest.approx((steps * 256 * 2.0 / 2 + roofline.FILL) / H100.clock)
    fma = H100.flops / 2 / H100.sms / H100.clock
    clocks = steps * 256 * 8192 / fma + roofline.FILL
    assert bound.tensor == pytest.approx(clocks / H100.clock)
    assert bound.memory == pytest.approx(
        (4096 * 4096 * (1 / 2 + 1 / 16) + 2 * 256 * 8192) / H100.bandwidth
    )
    assert bound.l2 == 0
    assert (bound.limit, bound.seconds) == ("tensor", bound.tensor)


def test_a_warps_own_products_are_slower_than_the_peak_of_a_warpgroups():
    mma = dataclasses.replace(CODE, warp_mma=True)
    fill = roofline.FILL / H100.clock
    slow, fast = (roofline.bound(H100, code, 256, 4096, 4096).tensor for code in (mma, CODE))
    assert (fast - fill) / (slow - fill) == pytest.approx(0.63)
    a100 = KNOWN["a100"]
    same = [roofline.bound(a100, code, 256, 4096, 4096).tensor for code in (mma, CODE)]
    assert same[0] == same[1]


def test_sharing_the_steps_among_all_sms_shortens_the_longest_block():
    whole = roofline.bound(H100, CODE, 256, 4096, 4096)
    shared = dataclasses.replace(CODE, blocks=132, partial_bytes=163 * 256 * 128 * 4)
    bound = roofline.bound(H100, shared, 256, 4096, 4096)
    assert bound.issue - roofline.FILL / H100.clock == pytest.approx(
        (whole.issue - roofline.FILL / H100.clock) * 16 / 64  # ceil(32 x 64 / 132) steps
    )
    l2 = 2 * shared.partial_bytes / (roofline.L2_BYTES[9, 0] * H100.clock)
    assert bound.l2 == pytest.approx(l2)


def test_partial_tiles_that_the_cache_does_not_hold_are_memory():
    large = dataclasses.replace(CODE, partial_bytes=H100.l2_bytes + 1)
    bound, without = (roofline.bound(H100, code, 256, 4096, 4096) for code in (large, CODE))
    assert bound.l2 == 0
    assert bound.memory == pytest.approx(without.memory + 2 * large.partial_bytes / H100.bandwidth)


def test_a_second_wave_fills_the_pipeline_again():
    one, two = (dataclasses.replace(CODE, blocks=n) for n in (132, 264))
    sizes = (256, 4096 * 132, 64)
    first, second = (roofline.bound(H100, code, *sizes).issue for code in (one, two))
    assert second > first
    shared = dataclasses.replace(two, resident=2)
    both = roofline.bound(H100, shared, *sizes).issue
    assert second - both == pytest.approx(roofline.FILL / H100.clock)


@pytest.mark.parametrize(
    ("gpu", "registers", "threads", "shared_bytes", "blocks"),
    [
        ("h100", 168, 384, 226_368, 1),  # shared memory
        ("a100", 250, 128, 63_488, 2),
        ("rtx4090", 32, 512, 1_000, 3),  # 1536 threads
        ("h100", 128, 128, 1_000, 4),  # registers
        ("rtx4090", 255, 256, 101_376, 1),
    ],
)
def test_blocks_of_an_sm(gpu, registers, threads, shared_bytes, blocks):
    assert roofline.resident_blocks(KNOWN[gpu], registers, threads, shared_bytes) == blocks
