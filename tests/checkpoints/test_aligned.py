"""The promise that makes loading cheap: JAX takes these arrays over without a copy."""

import jax
import ml_dtypes
import numpy as np
import pytest

from qlora_jax.checkpoints.aligned import aligned_empty


@pytest.mark.parametrize("dtype", [np.uint8, np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("shape", [(), (3,), (7, 5, 3), (0, 4)])
def test_shape_dtype_and_address(shape, dtype):
    array = aligned_empty(shape, dtype)
    assert (array.shape, array.dtype) == (shape, np.dtype(dtype))
    assert array.ctypes.data % 64 == 0 or array.size == 0
    assert array.flags.c_contiguous
    assert array.flags.writeable


def test_jax_does_not_copy():
    array = aligned_empty((1000, 3), np.float32)
    array[:] = 1
    assert jax.device_put(array).unsafe_buffer_pointer() == array.ctypes.data
