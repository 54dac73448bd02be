"""PiSSA and LoftQ begin as PEFT's do, with every scale divided out once."""

import functools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_jax.adapters.closer import Closer, begin_closer
from qlora_jax.adapters.low_rank import low_rank
from qlora_jax.adapters.spec import make_spec
from qlora_jax.checkpoints.load import quantized_as
from qlora_jax.errors import InputError
from qlora_jax.quantization.policy import QuantizationConfig
from tests.golden_data import GoldenFile, golden_folder
from tests.tolerances import INIT_DELTA_ATOL, INIT_LENGTH_RTOL, LOW_RANK_ATOL

FILE = golden_folder("init") / "init.npz"
SHAPES = {  # of the tiny llama
    "self_attn.q_proj": (64, 64),
    "self_attn.k_proj": (32, 64),
    "mlp.up_proj": (128, 64),
    "mlp.down_proj": (64, 128),
}
LOFTQ = {"r": 8, "alpha": 8}
CASES = {
    "pissa": (Closer("pissa"), {"r": 8, "alpha": 16}),
    "pissa_rslora": (Closer("pissa"), {"r": 8, "alpha": 16, "use_rslora": True}),
    "pissa_patterns": (
        Closer("pissa"),
        {
            **{"r": 8, "alpha": 16},
            **{"rank_pattern": {"down_proj": 4}, "alpha_pattern": {"up_proj": 24}},
        },
    ),
    "loftq1": (Closer("loftq"), LOFTQ),
    "loftq5": (Closer("loftq", iterations=5), LOFTQ),
}
single = functools.partial(quantized_as, QuantizationConfig(double_quant=False))
double = functools.partial(quantized_as, QuantizationConfig())


def opened(case: str) -> GoldenFile:
    """What belongs to a case, and the dense weights."""
    return GoldenFile(
        FILE,
        inputs=lambda key: key.startswith("weight."),
        part=lambda key: key.startswith(("weight.", f"{case}.")),
    )


def compare(golden: GoldenFile, case: str, module: str, A, B, scale: float) -> None:
    """s B A, and what each half got of it."""
    golden.compare(f"{case}.delta.{module}", scale * (B @ A), atol=INIT_DELTA_ATOL)
    lengths = np.linalg.norm(A, axis=1), np.linalg.norm(B, axis=0)
    for half, length in zip("AB", lengths, strict=True):
        golden.compare(f"{case}.{half}_lengths.{module}", length, rtol=INIT_LENGTH_RTOL)


def weights(golden: GoldenFile):
    """(module, its dense weight) of each."""
    for key in golden.keys():  # noqa: SIM118  # not a dict
        if key.startswith("weight."):
            yield key.removeprefix("weight."), golden.input(key)


@pytest.mark.parametrize("case", CASES)
def test_golden(case):
    how, settings = CASES[case]
    spec = make_spec(SHAPES, 2, **settings)
    dense_base = how.method == "pissa"  # as PEFT leaves it; the 4 bits come behind
    with opened(case) as golden:
        for module, weight in weights(golden):
            layer, target = module.removeprefix("model.layers.").split(".", 1)
            rank, scale = spec.ranks(target)[int(layer)], float(spec.scales(target)[int(layer)])
            quantize = (lambda aim: aim) if dense_base else single
            begun = begin_closer(weight, rank, scale, how, quantize)
            compare(golden, case, module, begun.A, begun.B, scale)
            if f"{case}.base.{module}" in golden.keys():  # noqa: SIM118
                base = begun.base if dense_base else begun.base.dequantize()
                golden.compare(f"{case}.base.{module}", base, atol=INIT_DELTA_ATOL)


def test_golden_of_a_base_as_it_is():
    """peft.replace_lora_weights_loftq, of scales in 8 bits; and LoftQ of one iteration is that."""
    with opened("replaced") as golden:
        for module, weight in weights(golden):
            kept = np.asarray(double(weight).dequantize())
            golden.compare(f"replaced.base.{module}", kept, atol=INIT_DELTA_ATOL)
            A, B = low_rank(weight - kept, 8, 1.0)
            compare(golden, "replaced", module, A, B, 1.0)
            begun = begin_closer(weight, 8, 1.0, Closer("loftq"), double)
            np.testing.assert_array_equal(begun.A, A)
            np.testing.assert_array_equal(begun.B, B)


def random_matrix(seed: int, out: int, width: int, dtype="float32") -> np.ndarray:
    random = np.random.default_rng(seed)
    return random.standard_normal((out, width)).astype(np.float32).astype(dtype)


@given(
    seed=st.integers(0, 2**16),
    out=st.integers(1, 24),
    width=st.integers(1, 24),
    share=st.floats(0, 1),
    scale=st.sampled_from([0.25, 1.0, 2.0, 16 / 8**0.5]),
    flat=st.booleans(),
)
def test_it_is_the_nearest_of_its_rank(seed, out, width, share, scale, flat):
    """Against NumPy's decomposition in float64; also of matrices with fewer directions."""
    matrix = random_matrix(seed, out, width)
    if flat:
        matrix = np.outer(matrix[:, 0], matrix[0])
    rank = max(1, round(share * min(out, width)))
    A, B = low_rank(matrix, rank, scale)
    assert (A.dtype, A.shape, B.shape) == (np.float32, (rank, width), (out, rank))
    values = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)
    lost = np.linalg.norm(matrix - scale * (B @ A))
    np.testing.assert_allclose(lost, np.linalg.norm(values[rank:]), atol=LOW_RANK_ATOL * out)
    assert np.isfinite(A).all()
    assert np.isfinite(B).all()
    for length in (np.linalg.norm(A, axis=1), np.linalg.norm(B, axis=0)):
        np.testing.assert_allclose(length**2 * scale, values[:rank], atol=LOW_RANK_ATOL * out)


@pytest.mark.parametrize("shape", [(40, 96), (96, 40)])
def test_a_sampled_one_is_near_the_nearest_and_the_same_by_seed(shape):
    matrix = random_matrix(1, *shape)
    best = np.linalg.norm(np.linalg.svd(matrix, compute_uv=False)[8:])

    def lost(niter, seed):
        A, B = low_rank(matrix, 8, 2.0, niter=niter, seed=seed)
        return np.linalg.norm(matrix - 2.0 * (B @ A)), A

    rough, first = lost(0, 3)
    near, _ = lost(16, 3)
    assert best - LOW_RANK_ATOL <= near <= 1.002 * best < rough
    np.testing.assert_array_equal(first, lost(0, 3)[1])
    assert np.any(first != lost(0, 4)[1])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", ["pissa", "loftq", "pissa_niter_8", "loftq_niter_8"])
def test_it_begins_closer_whatever_the_scale(name, dtype):
    W = random_matrix(0, 96, 64, dtype)
    wide = W.astype(np.float32)
    plain = np.linalg.norm(double(W).dequantize("float32") - wide)
    found = []
    for scale in (1.0, 0.25):
        begun = begin_closer(W, 16, scale, Closer(name), double)
        together = np.asarray(begun.base.dequantize("float32")) + scale * (begun.B @ begun.A)
        found.append(np.linalg.norm(together - wide))
        assert found[-1] < 0.85 * plain
        assert begun.base.dtype == dtype
    assert found[0] == pytest.approx(found[1], rel=1e-3)


@pytest.mark.parametrize("method", ["pissa", "loftq"])
def test_more_iterations_come_closer(method):
    W = random_matrix(0, 96, 64)

    def lost(iterations):
        begun = begin_closer(W, 16, 1.0, Closer(method, iterations), double)
        return np.linalg.norm(np.asarray(begun.base.dequantize()) + begun.B @ begun.A - W)

    assert lost(5) < lost(1)


def test_only_loftq_of_one_iteration_keeps_the_base():
    W = random_matrix(0, 32, 64)
    for how in (Closer("loftq"), Closer("loftq_niter_4"), Closer("loftq", 2), Closer("pissa")):
        base = begin_closer(W, 4, 1.0, how, double).base
        same = np.array_equal(base.codes, double(W).codes)
        assert same == how.keeps_base


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (lambda: Closer("piza"), r"INIT-NAME\]: init: unknown 'piza' .*did you mean pissa"),
        (lambda: Closer("loftq_niter"), r"INIT-NAME.*loftq_niter_N.*did you mean loftq"),
        (lambda: Closer("gaussian"), r"INIT-NAME.*'gaussian' .expected pissa, loftq"),
        (lambda: Closer("loftq", 0), r"INIT-ITERATIONS\]: iterations: 0 .expected a whole number"),
        (
            lambda: begin_closer(np.ones((4, 8), np.float32), 5, 1.0, Closer("pissa"), double),
            r"INIT-RANK\]: matrix: rank 5 for a matrix of 4 x 8 .expected at most 4",
        ),
    ],
)
def test_what_cannot_be_is_said(build, text):
    with pytest.raises(InputError, match=text):
        build()
