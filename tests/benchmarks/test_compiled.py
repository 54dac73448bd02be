"""What was compiled for absent GPUs: the records are whole, and what they tell reaches the bars."""

import json
import math

import pytest

from benchmarks import bars, compile_gpu, compile_steps, step_table
from pallas_kernels.gpu import KNOWN
from pallas_kernels.nf4_matmul.cases import CASES
from qlora_jax.models.config import ModelConfig
from qlora_jax.models.families import weight_shapes

KERNELS = json.loads(compile_gpu.RESULTS.read_text())
STEPS = json.loads(compile_steps.RESULTS.read_text())
README = (compile_steps.ROOT / "README.md").read_text()
LLAMA = compile_steps.MODELS["Llama-3.1-8B"]


def entry(**changes):
    """One that reaches every bar, but for `changes`."""
    good = {"kernel": "hopper", "gpu": "h100", "direction": "forward", "m": 256, "n": 4096}
    good |= {"k": 4096, "registers": 168, "spill_bytes": 0, "shared_bytes": 226_368}
    good |= {"instructions_per_weight": 6.9, "roofline_us": 10.0, "ideal_bf16_us": 10.0}
    assert tuple(good) == bars.KEYS
    return good | changes


def test_every_record_has_every_key():
    assert KERNELS
    assert STEPS
    assert {tuple(each) for each in KERNELS} == {bars.KEYS}
    assert {tuple(each) for each in STEPS} == {bars.STEP_KEYS}


def test_every_gpu_and_case_is_there():
    sizes = {(case.m, case.n, case.k) for case in CASES}
    products = [each for each in KERNELS if each["kernel"] in bars.BACKENDS]
    for gpu in KNOWN:
        for direction in ("forward", "backward"):
            found = {
                (each["m"], each["n"], each["k"])
                for each in products
                if (each["gpu"], each["direction"]) == (gpu, direction)
            }
            assert sizes - found == set(), (gpu, direction)
    assert {step["gpu"] for step in STEPS} == set(KNOWN)


def test_the_records_reach_the_bars():
    assert bars.missed(KERNELS) == []
    assert bars.missed_by_steps(STEPS) == []


@pytest.mark.parametrize("gpu", KNOWN)
def test_readme_shows_them(gpu):
    chosen = {
        (each["gpu"], each["m"]): each
        for each in bars.first_choices(KERNELS)
        if each["direction"] == "forward" and each["n"] == each["k"] == bars.SQUARE
    }
    cells = []
    for m in (16, 256, 2048):
        each = chosen[gpu, m]
        faster = each["ideal_bf16_us"] / each["roofline_us"]
        cells.append(f"{faster:.2f}x ({each['roofline_us']:.1f} us)")
    few, many = (chosen[gpu, m]["instructions_per_weight"] for m in (16, 256))
    assert f"| {' | '.join(cells)} | {few:.1f}, {many:.1f} |" in README


def test_readme_shows_what_fits_where():
    assert step_table.markdown(STEPS) in README


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"spill_bytes": 8}, "hopper h100 forward 256x4096x4096: spills 8 bytes"),
        ({"shared_bytes": 232_449}, "232449 bytes shared of 232448"),
        ({"instructions_per_weight": 7.1}, "7.1 instructions a weight, not 7.0"),
        ({"roofline_us": 11.1}, "1.110 of the time of bf16, not 1.100"),
        (
            {"kernel": "small_m", "m": 16, "gpu": "b200", "instructions_per_weight": 3.5},
            "1.000 of the time of bf16, not 0.714",
        ),
    ],
)
def test_a_missed_bar_is_named(changes, text):
    assert bars.missed([entry()]) == []
    (line,) = bars.missed([entry(**changes)])
    assert text in line


def test_the_time_is_that_of_the_backend_that_is_asked_first():
    slow = entry(kernel="ampere", roofline_us=99.0)
    assert bars.missed([slow, entry()]) == bars.missed([entry(), slow]) == []
    assert len(bars.missed([slow])) == 1


def step(**changes):
    """The entry of a case that has bars, and reaches them but for `changes`."""
    case = "rtx4090", "Llama-3.1-8B", 2048, "off", "full"
    entry = dict.fromkeys(bars.STEP_KEYS, 0) | dict(zip(bars.STEP_KEYS, case, strict=False))
    return entry | {"temp_bytes": 1_540_000_000, "device_bytes": 8_000_000_000} | changes


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"temp_bytes": 1_540_000_001}, "1540000001 temp_bytes, not 1540000000"),
        ({"device_bytes": 8_000_000_001}, "8000000001 device_bytes, not 8000000000"),
    ],
)
def test_a_step_that_takes_too_much_memory_is_named(changes, text):
    assert bars.missed_by_steps([step()]) == []
    assert bars.missed_by_steps([step(**changes)]) == [
        f"rtx4090 Llama-3.1-8B 1x2048 off full: {text}"
    ]
    assert bars.missed_by_steps([step(gpu="h100", **changes)]) == []


def test_every_bar_of_a_step_has_a_case():
    cases = {(c.model, c.length, c.stream_weights, c.remat): c for c in compile_steps.all_cases()}
    assert bars.STEPS.keys() <= cases.keys()


HLO = """
%fused_computation.1 (param: bf16[4096]) -> bf16[14336,8192] {
  ROOT %inside.1 = bf16[14336,8192]{1,0} broadcast(%param)
}

%body (param: bf16[4096]) -> bf16[4096,14336] {
  %wide.1 = bf16[4096,14336]{1,0} custom-call(%param)
  %kept.1 = bf16[32,1,2048,4096]{3,2,1,0} copy(%stack)
  %given.1 = bf16[128256,4096]{1,0} parameter(1)
  %fusion.1 = bf16[64,64]{1,0} fusion(%a), kind=kLoop, calls=%fused_computation.1
  ROOT %x.1 = bf16[4096,14336]{1,0} copy(%wide.1)
}
"""


@pytest.mark.parametrize(
    ("line", "held"),
    [
        ("", False),
        ("%bad.1 = bf16[32,4096,4096]{2,1,0} fusion(%c)", True),
        ("%bad.1 = f32[32,14336,4096]{2,1,0} copy(%c)", True),
        ("%bad.1 = bf16[4096,128256]{1,0} transpose(%c)", True),
        ("%bad.1 = bf16[536870912]{0} copy(%c)", True),
        ("%bad.1 = bf16[32,1,1024,4096]{3,2,1,0} copy(%c)", True),
        ("%good.1 = u8[32,4096,7168]{2,1,0} copy(%c)", False),
        ("%good.1 = bf16[32,1,4096,4096]{3,2,1,0} copy(%c)", False),
    ],
)
def test_a_dense_weight_in_a_program_is_found(line, held):
    case = compile_steps.Case("rtx4090", "Llama-3.1-8B", 4096)
    micro = compile_steps.planned(case)[0].micro
    copies = compile_steps.dense_copies(HLO.replace("  ROOT %x", f"  {line}\n  ROOT %x"), micro)
    assert bool(copies) == held


def test_the_shape_is_that_of_llama():
    config = ModelConfig.from_dict(json.loads(LLAMA.read_text()), "config.json")
    assert sum(math.prod(s) for s in weight_shapes(config).values()) > 700_000_000
    per_layer = {k: s for k, s in weight_shapes(config).items() if "layers" in k}
    total = sum(math.prod(s) for s in weight_shapes(config).values())
    total += 31 * sum(math.prod(s) for s in per_layer.values())
    assert total == 8_030_261_248  # the parameters of the public model


def test_the_table_has_a_row_for_each_model_and_length():
    entries = [
        step(stream_weights=stream, remat=remat, seq_len=length, host_bytes=length * 10**6)
        for length in (512, 4096)
        for stream, remat in step_table.PLACEMENTS
    ]
    table = step_table.markdown([*entries, step(gpu="h100")]).splitlines()
    assert len(table) == 4
    assert table[3] == (
        "| Llama-3.1-8B, 1 x 4096 | 8.0 GB | 8.0 GB | 8.0 GB | 8.0 GB | 4.1 to 4.1 GB |"
    )
