"""The figures of the report are those of NumPy in float64, per weight and in all."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.quantization.plot import axes_of, place
from qlora_jax.quantization.report import Report, WeightError, measure
from qlora_jax.quantization.tensor import quantize, stack
from tests.tolerances import REPORT_RTOL


def weights(shape, dtype="float32", seed=0) -> np.ndarray:
    w = np.random.default_rng(seed).standard_normal(shape) * 0.05
    return w.astype(np.float32).astype(jnp.dtype(dtype))


def name_of(layer: int, projection: str = "mlp.up_proj") -> str:
    return f"model.layers.{layer}.{projection}.weight"


@pytest.fixture(scope="module")
def report() -> Report:
    cases = [(layer, projection) for layer in range(3) for projection in ("mlp.up_proj", "o_proj")]
    dense = [weights((8, 128), seed=i) * (i + 1) for i in range(len(cases))]
    errors = [
        measure(name_of(*case), w, quantize(w, kind="nf4" if case[0] else "int4"))
        for case, w in zip(cases, dense, strict=True)
    ]
    head = weights((16, 64))
    return Report((*errors, measure("lm_head.weight", head, quantize(head))))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("layout", ["bnb", "halves"])
@pytest.mark.parametrize("shape", [(32, 256), (7, 33)])
def test_figures_are_numpys(strict_promotion, shape, layout, dtype):
    w = weights(shape, dtype)
    tensor = quantize(w).prepack(layout)
    e = np.asarray(tensor.dequantize("float32"), np.float64) - w.astype(np.float64)
    norm = np.linalg.norm(w.astype(np.float64))
    ours = measure("w", w, tensor)
    assert (ours.name, ours.parameters, ours.nbytes) == ("w", w.size, tensor.nbytes)
    assert ours.bits_per_parameter == tensor.bits_per_parameter
    assert ours.max_error == pytest.approx(np.abs(e).max(), rel=REPORT_RTOL)
    assert ours.rms_error == pytest.approx(np.sqrt((e**2).mean()), rel=REPORT_RTOL)
    assert ours.relative_error == pytest.approx(np.linalg.norm(e) / norm, rel=REPORT_RTOL)
    snr = 20 * math.log10(norm / np.linalg.norm(e))
    assert ours.snr_db == pytest.approx(snr, rel=REPORT_RTOL)


def test_layers_at_once_are_layers_one_by_one():
    layers = [weights((8, 128), seed=i) for i in range(3)]
    tensors = [quantize(w) for w in layers]
    whole = measure("all", np.stack(layers), stack(tensors))
    total = Report(tuple(map(measure, "abc", layers, tensors))).total
    assert (whole.parameters, whole.nbytes) == (total.parameters, total.nbytes)
    assert whole.max_error == total.max_error
    assert whole.relative_error == pytest.approx(total.relative_error, rel=REPORT_RTOL)


def test_many_rows_lose_no_digits():
    """2,000,000 equal squares: a float32 sum, one after the other, would be off in the third."""
    w = np.full((15625, 128), 0.1, np.float32)
    assert measure("w", w, quantize(w)).squared_weight == pytest.approx(
        w.size * float(np.float32(0.1)) ** 2, rel=REPORT_RTOL
    )


def test_one_program_for_all_weights_of_a_shape():
    from qlora_jax.quantization.report import row_sums

    row_sums.clear_cache()
    for seed in range(3):
        w = weights((4, 64), seed=seed)
        measure(f"{seed}", w, quantize(w))
    assert row_sums._cache_size() == 1


def test_the_total_is_over_all_numbers():
    a = WeightError("a", 10, 5, 0.5, 2.0, 8.0)
    b = WeightError("b", 30, 15, 0.1, 0.0, 24.0)
    total = Report((a, b)).total
    assert total == WeightError("all 2 weights", 40, 20, 0.5, 2.0, 32.0)
    assert total.rms_error == math.sqrt(2 / 40)
    assert total.relative_error == 0.25
    assert total.snr_db == pytest.approx(20 * math.log10(4))
    assert total.bits_per_parameter == 4
    assert (b.relative_error, b.snr_db) == (0, math.inf)


def test_a_lossless_and_an_empty_weight_have_figures():
    for shape in ((2, 64), (0, 64)):
        zeros = np.zeros(shape, np.float32)
        error = measure("zeros", zeros, quantize(zeros))
        assert (error.max_error, error.rms_error, error.relative_error) == (0, 0, 0)
        assert error.snr_db == math.inf
        assert error.to_json()["snr_db"] is None
    assert Report(()).total.parameters == 0


def test_shapes_that_differ_are_refused():
    with pytest.raises(ValueError, match=r"w: dense is \(4, 64\), stored \(64, 4\)"):
        measure("w", weights((4, 64)), quantize(weights((64, 4))))


def test_the_worst_come_first(report):
    worst = report.worst(2)
    assert [place(w.name)[1] for w in worst] == [0, 0]  # int4 loses more than nf4
    assert worst[0].relative_error >= worst[1].relative_error


def test_table(report):
    assert report.table().row_count == len(report.weights) + 1
    assert report.table(worst=2).row_count == 3


def test_short_is_the_worst_and_the_total(report):
    lines = [line.split() for line in report.short(2).splitlines() if line.strip()]
    rows = [line for line in lines if line[0].startswith(("layers", "all"))]
    assert [row[0] for row in rows[:2]] == [
        w.name.removeprefix("model.").removesuffix(".weight") for w in report.worst(2)
    ]
    total = report.total
    assert rows[2] == [
        *("all", "7", "weights"),
        f"{total.parameters:,}",
        f"{total.bits_per_parameter:.3f}",
        f"{total.max_error:.3g}",
        f"{total.rms_error:.3g}",
        f"{total.relative_error:.2%}",
        f"{total.snr_db:.2f}",
    ]
    assert all(len(line) <= 100 for line in report.short(2).splitlines())


def test_json(report):
    tree = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert tree["total"] == report.total.to_json()
    assert [w["name"] for w in tree["weights"]] == [w.name for w in report.weights]
    assert set(tree["total"]) == {
        *("name", "parameters", "bytes", "max_error", "rms_error", "relative_error", "snr_db"),
        "bits_per_parameter",
    }


@pytest.mark.parametrize("count", [1, 7])
def test_plot_is_a_picture(report, tmp_path, count):
    path = tmp_path / "report.png"
    Report(report.weights[-count:]).plot(path)
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG")
    width, height = (int.from_bytes(data[i : i + 4], "big") for i in (16, 20))
    assert width > 1000
    assert height > 500


def test_the_axes_of_the_plot(report):
    assert axes_of(report) == (["mlp.up_proj", "o_proj", "lm_head"], [0, 1, 2, "none"])
    assert place("model.layers.12.self_attn.q_proj.weight") == ("self_attn.q_proj", 12)


def test_memory_is_that_of_one_weight():
    """Besides its arguments, a measurement holds at most three float32 copies of the matrix."""
    from qlora_jax.quantization.report import row_sums

    w = jnp.asarray(weights((512, 1024)))
    compiled = row_sums.lower(w, jax.block_until_ready(quantize(w))).compile()
    assert compiled.memory_analysis().temp_size_in_bytes <= 3 * w.nbytes
