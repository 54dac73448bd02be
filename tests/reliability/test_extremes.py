"""R18: the oddest finite weights come back from 4 bits finite, and as near as the code allows.

    |w - w'| <= absmax * (half the widest gap of the code)      absmax of w's block, as stored

and where scales are 8-bit too, as far more as the stored absmax is from the true one. What is
smaller than float32's smallest normal number may become zero.
"""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels.codebooks import CODEBOOKS, DYNAMIC_SIGNED
from qlora_jax.checkpoints.load import load_weights
from qlora_jax.checkpoints.shards import Shards
from qlora_jax.errors import InputError
from qlora_jax.models.config import ModelConfig
from qlora_jax.quantization.tensor import quantize
from tests.reliability import clean

RULE = "R18"
BLOCK = 64
LARGEST = float(np.finfo(np.float32).max)
SMALLEST = 1.1754943508222875e-38  # float32's smallest normal number


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


WEIGHTS = {
    "zeros": np.zeros((4, 64), np.float32),
    "a block of zeros": np.concatenate([noise(2, 64), np.zeros((2, 64), np.float32)]),
    "constant": np.full((4, 64), -0.3, np.float32),
    "subnormal": (noise(4, 64) * SMALLEST / 8).astype(np.float32),
    "smallest normal": np.sign(noise(4, 64)) * np.float32(SMALLEST),
    "one subnormal": np.where(np.arange(256).reshape(4, 64) % 64, 0, 1e-45).astype(np.float32),
    "largest": np.sign(noise(4, 64)) * np.float32(LARGEST),
    "largest and small": np.where(noise(4, 64) > 2, np.float32(LARGEST), noise(4, 64)),
    "one element": np.full((1, 1), 0.7, np.float32),
    "one row": noise(1, 3),
    "odd": noise(5, 33),
    "a last block of one": noise(1, 65),
    "no rows": np.zeros((0, 64), np.float32),
    "no columns": np.zeros((3, 0), np.float32),
    "float16's largest": (np.sign(noise(4, 64)) * 65504).astype(np.float16),
    "float16 subnormal": (noise(4, 64) * 6e-6).astype(np.float16),
    "bfloat16's largest": np.full((4, 64), ml_dtypes.finfo(ml_dtypes.bfloat16).max),
}


@pytest.mark.parametrize("double", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("kind", CODEBOOKS)
@pytest.mark.parametrize("case", WEIGHTS)
def test_comes_back(case, kind, double):
    w = WEIGHTS[case]
    tensor = quantize(w, kind=kind, block_size=BLOCK, double_quant=double)
    found = np.asarray(tensor.dequantize("float32"), np.float64)
    assert found.shape == w.shape
    assert np.isfinite(found).all()
    exact = np.asarray(w, np.float64).reshape(-1)
    absmax = np.array([abs(exact[i : i + BLOCK]).max() for i in range(0, exact.size, BLOCK)])
    stored = np.asarray(quantize(w, kind=kind, block_size=BLOCK, double_quant=False).absmax)
    np.testing.assert_allclose(stored.reshape(-1), absmax, rtol=0, atol=SMALLEST)
    scales = absmax
    if double:
        nested = tensor.absmax
        each = np.repeat(np.asarray(nested.absmax, np.float64), 256)[: exact.size // BLOCK + 1]
        codes = np.asarray(nested.codes).reshape(-1)
        scales = DYNAMIC_SIGNED[codes] * each[: codes.size] + float(nested.offset)
    gap = np.diff(np.sort(CODEBOOKS[kind])).max() / 2
    allowed = np.maximum(scales, absmax) * gap * (1 + 1e-5) + abs(scales - absmax) + SMALLEST
    error = abs(found.reshape(-1) - exact)
    assert (error <= np.repeat(allowed, BLOCK)[: exact.size]).all()


@pytest.mark.parametrize("value", [65520.0, 1e9, -LARGEST])
@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.0.mlp.up_proj.weight"])
def test_what_overflows_in_float16_is_refused(tmp_path, name, value):
    folder = clean.model(tmp_path / "model")
    config = {"model_type": "llama", **clean.CONFIG, **clean.FAMILIES["llama"]}
    arrays = clean.arrays_of(config)
    arrays[name].reshape(-1)[5] = value
    (folder / "model.safetensors").write_bytes(clean.packed(arrays))
    with Shards(folder) as source:
        read = ModelConfig.from_dict(source.config)
        weights = load_weights(source, read, dtype="float32")
        assert all(jnp.isfinite(leaf).all() for leaf in weights.values())
        with pytest.raises(InputError, match=r"W-FINITE.*inf at index .*finite in float16"):
            load_weights(source, read, dtype="float16")
